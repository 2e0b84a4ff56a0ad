"""One made-up row in the hub's shape for every data set of the library."""

from typing import Any

_PAIR = {"sentence1": "The shop opened on Monday.", "sentence2": "On Monday the shop opened.", "idx": 0}
_NLI = {"premise": "Two children play in the snow.", "hypothesis": "Children are outside."}
_CHOICES = {"text": ["a lamp", "a spoon", "a river", "a boot"], "label": ["A", "B", "C", "D"]}
_PASSAGE = {
    "context": "The bridge at Varn was built in 1902 by two brothers. It carries a road and a tram.",
    "question": "When was the bridge built?",
    "answers": {"text": ["1902", "in 1902"], "answer_start": [35, 32]},
}

ROWS: dict[str, dict[str, Any]] = {
    # arithmetic
    "gsm8k": {"question": "Mia has 3 bags of 4 nuts. How many nuts?", "answer": "3 * 4 = <<3*4=12>>12\n#### 12"},
    "aqua_rat": {
        "question": "A train runs 60 km in 2 hours. What is its speed?",
        "options": ["A)20", "B)25", "C)30", "D)40", "E)60"],
        "rationale": "60 / 2 = 30 km per hour",
        "correct": "C",
    },
    "svamp": {
        "ID": "chal-1",
        "Body": "Ann had 9 pens and gave away 4.",
        "Question": "How many are left?",
        "question_concat": "Ann had 9 pens and gave away 4. How many are left?",
        "Equation": "( 9.0 - 4.0 )",
        "Answer": "5",
        "Type": "Subtraction",
    },
    # commonsense
    "commonsense_qa": {
        "id": "1",
        "question": "What do you eat soup with?",
        "question_concept": "soup",
        "choices": {"text": ["a fork", "a spoon", "a hat", "a wall", "a pen"], "label": ["A", "B", "C", "D", "E"]},
        "answerKey": "B",
    },
    "piqa": {"goal": "Cool a drink", "sol1": "Put ice into it.", "sol2": "Put it onto the stove.", "label": 0},
    "hellaswag": {
        "ind": 1,
        "activity_label": "Washing dishes",
        "ctx_a": "A man fills the sink.",
        "ctx_b": "he",
        "ctx": "A man fills the sink. he",
        "endings": ["paints the wall.", "puts a plate into the water.", "rides a horse.", "reads a map."],
        "label": "1",
    },
    "social_iqa": {
        "context": "Kim lent Lou her umbrella.",
        "question": "How would Lou feel?",
        "answerA": "thankful",
        "answerB": "hungry",
        "answerC": "bored",
        "label": "1",
    },
    "strategyqa": {
        "qid": "1",
        "term": "Heron",
        "question": "Can a heron drive a car?",
        "answer": False,
        "facts": "A heron is a bird. Birds cannot hold a wheel.",
    },
    "creak": {
        "ex_id": "1",
        "sentence": "A violin has strings.",
        "explanation": "A violin is played by drawing a bow over strings.",
        "label": "true",
        "entity": "Violin",
    },
    "copa": {
        "premise": "The ground was wet.",
        "choice1": "It had rained.",
        "choice2": "It was noon.",
        "question": "cause",
        "label": 0,
        "idx": 1,
    },
    # coreference
    "winogrande": {
        "sentence": "The box did not fit into the bag because the _ was too large.",
        "option1": "box",
        "option2": "bag",
        "answer": "1",
    },
    "wsc": {
        "text": "The nurse called the driver because she was late.",
        "span1_index": 1,
        "span2_index": 6,
        "span1_text": "The nurse",
        "span2_text": "she",
        "idx": 0,
        "label": 1,
    },
    # extraction
    "ade_effect": {"text": "After taking zolin the patient had a rash.", "drug": "zolin", "effect": "rash"},
    "ade_dosage": {"text": "He was given 20 mg of zolin a day.", "drug": "zolin", "dosage": "20 mg"},
    "semeval_relation": {"sentence": "The <e1>storm</e1> led to a <e2>flood</e2>.", "relation": 0},
    # generation
    "common_gen": {
        "concept_set_idx": 0,
        "concepts": ["dog", "ball", "park"],
        "target": "A dog chases a ball in the park.",
    },
    # inference
    "snli": {**_NLI, "label": 0},
    "mnli": {**_NLI, "label": 0, "idx": 0},
    "rte": {**_PAIR, "label": 0},
    "anli": {"uid": "1", **_NLI, "label": 0, "reason": "Snow lies outside."},
    # intent
    "banking77": {"text": "My new card does not work yet, what do I do?", "label": 0},
    # paraphrase
    "mrpc": {**_PAIR, "label": 1},
    "qqp": {"question1": "How do I knit?", "question2": "How can one learn to knit?", "label": 1, "idx": 0},
    "paws": {"id": 1, **_PAIR, "label": 1},
    # reading comprehension
    "squad": {"id": "1", "title": "Varn", **_PASSAGE},
    "boolq": {"question": "does the bridge carry a tram", "answer": True, "passage": _PASSAGE["context"]},
    "race": {
        "example_id": "1",
        "article": _PASSAGE["context"],
        "question": "Who built the bridge?",
        "options": ["A king", "Two brothers", "A school", "Nobody"],
        "answer": "B",
    },
    "adversarial_qa": {"id": "1", "title": "Varn", **_PASSAGE, "metadata": {"split": "train"}},
    # science
    "sciq": {
        "question": "What do plants take up with their roots?",
        "distractor1": "light",
        "distractor2": "sound",
        "distractor3": "wind",
        "correct_answer": "water",
        "support": "Roots take up water and minerals.",
    },
    "arc_challenge": {"id": "1", "question": "Which of these gives light?", "choices": _CHOICES, "answerKey": "A"},
    "arc_easy": {
        "id": "2",
        "question": "Which of these flows?",
        "choices": {**_CHOICES, "label": ["1", "2", "3", "4"]},
        "answerKey": "3",
    },
    "openbookqa": {"id": "3", "question_stem": "You stir tea with", "choices": _CHOICES, "answerKey": "B"},
    "qasc": {
        "id": "4",
        "question": "What is worn on a foot?",
        "choices": _CHOICES,
        "answerKey": "D",
        "fact1": "Boots are worn.",
        "fact2": "Boots cover feet.",
        "combinedfact": "A boot is worn on a foot.",
    },
    # sentiment
    "sst2": {"idx": 0, "sentence": "a warm and clever film ", "label": 1},
    "imdb": {"text": "I fell asleep in the second act.", "label": 0},
    "yelp_polarity": {"text": "The staff were kind and the soup was hot.", "label": 1},
    "rotten_tomatoes": {"text": "dull from its first minute on .", "label": 0},
    "tweet_sentiment": {"text": "The bus leaves at nine", "label": 1},
    # summarisation
    "xsum": {
        "document": "The town of Varn will close its bridge for a year.",
        "summary": "Varn closes a bridge.",
        "id": "1",
    },
    "cnn_dailymail": {
        "article": "(Varn) The town will close its bridge for a year, its mayor said.",
        "highlights": "Bridge closes for a year .\nMayor announced it .",
        "id": "1",
    },
    "samsum": {"id": "1", "dialogue": "Kim: Lunch?\nLou: At one.", "summary": "Kim and Lou will have lunch at one."},
    # topic
    "ag_news": {"text": "Varn United win the cup after extra time.", "label": 1},
    "dbpedia_14": {"label": 0, "title": "Varn Works", "content": " Varn Works is a maker of bells."},
    "trec": {
        "text": "Who wrote the first dictionary ?",
        "label": 0,
        "label_original": "HUM:ind",
        "label_coarse": 3,
        "label_coarse_original": "HUM",
    },
    "sms_spam": {"sms": "See you at the station at six.\n", "label": 0},
    # translation
    "wmt16_de_en": {"translation": {"de": "Die Brücke ist alt.", "en": "The bridge is old."}},
    "opus100_en_fr": {"translation": {"en": "Good morning.", "fr": "Bonjour."}},
}
