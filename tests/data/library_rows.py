"""For every data set of the library a made-up row in the shape of the hub's: its own column names and types."""

from typing import Any

ROWS: dict[str, dict[str, Any]] = {
    # ------------------------------------------------------------------------------------------------ arithmetic
    "gsm8k": {
        "question": "Nuno packs 6 boxes with 4 candles each and sells 9 candles. How many candles are left?",
        "answer": "He packs 6 * 4 = <<6*4=24>>24 candles.\nOf these 24 - 9 = <<24-9=15>>15 are left.\n#### 15",
    },
    "aqua_rat": {
        "question": "A tram covers 18 km in 40 minutes. What is its speed in km/h?",
        "options": ["A)24", "B)27", "C)30", "D)32", "E)36"],
        "rationale": "40 minutes are 2/3 of an hour.\nThe speed is 18 / (2/3) = 27 km/h.\nB is correct.",
        "correct": "B",
    },
    "svamp": {
        "ID": "chal-0",
        "Body": "Ines had 31 stamps. She gave 14 of the stamps away",
        "Question": "How many stamps does Ines have now?",
        "Equation": "( 31.0 - 14.0 )",
        "Answer": "17",
        "Type": "Subtraction",
        "question_concat": "Ines had 31 stamps. She gave 14 of the stamps away How many stamps does Ines have now?",
    },
    # ----------------------------------------------------------------------------------------------- commonsense
    "commonsense_qa": {
        "id": "0" * 32,
        "question": "Where would a gardener leave a wet spade overnight?",
        "question_concept": "spade",
        "choices": {
            "label": ["A", "B", "C", "D", "E"],
            "text": ["library", "tool shed", "oven", "handbag", "cinema"],
        },
        "answerKey": "B",
    },
    "piqa": {
        "goal": "keep a door from slamming",
        "sol1": "Push a wedge of wood under the open door.",
        "sol2": "Hang a wedge of cheese over the open door.",
        "label": 0,
    },
    "hellaswag": {
        "ind": 7,
        "activity_label": "Waxing a surfboard",
        "ctx_a": "A woman lays a surfboard on two trestles.",
        "ctx_b": "she",
        "ctx": "A woman lays a surfboard on two trestles. she",
        "endings": [
            "rubs a block of wax over it in small circles.",
            "eats the trestles one after the other.",
            "is driven away on a snowplough.",
            "counts the sheep in the background.",
        ],
        "source_id": "activitynet~v_made_up",
        "split": "train",
        "split_type": "indomain",
        "label": "0",
    },
    "social_iqa": {
        "context": "Rui lent his only umbrella to a neighbour before the storm.",
        "question": "How would you describe Rui?",
        "answerA": "as dry as before",
        "answerB": "as a generous person",
        "answerC": "as afraid of the neighbour",
        "label": "2",
    },
    "strategyqa": {
        "qid": "0" * 20,
        "term": "Giraffe",
        "description": "A tall mammal of the savanna",
        "question": "Could a giraffe stand upright in a usual lift?",
        "answer": False,
        "facts": "A grown giraffe is over four metres tall. The cabin of a usual lift is lower than three metres.",
    },
    "creak": {
        "ex_id": "train_0",
        "sentence": "A cello is usually played by a person who sits.",
        "explanation": "The instrument rests on the floor between the knees of the player.",
        "label": "true",
        "entity": "Cello",
        "en_wiki_pageid": "1",
        "entity_mention_loc": [[2, 7]],
    },
    "copa": {
        "premise": "The candle went out.",
        "choice1": "Someone opened the window.",
        "choice2": "Someone closed the book.",
        "question": "cause",
        "idx": 0,
        "label": 0,
    },
    # ----------------------------------------------------------------------------------------------- coreference
    "winogrande": {
        "sentence": "The wardrobe did not go through the door because the _ was too narrow.",
        "option1": "wardrobe",
        "option2": "door",
        "answer": "2",
    },
    "wsc": {
        "text": "Marta thanked Olga because she had watered the plants.",
        "span1_index": 2,
        "span2_index": 4,
        "span1_text": "Olga",
        "span2_text": "she",
        "idx": 0,
        "label": 1,
    },
    # ------------------------------------------------------------------------------------------------ extraction
    "ade_effect": {
        "text": "A patient on examplamide developed a transient rash.",
        "drug": "examplamide",
        "effect": "transient rash",
        "indexes": {
            "drug": {"start_char": [13], "end_char": [24]},
            "effect": {"start_char": [37], "end_char": [51]},
        },
    },
    "ade_dosage": {
        "text": "She received examplamide at 20 mg daily.",
        "drug": "examplamide",
        "dosage": "20 mg daily",
        "indexes": {
            "drug": {"start_char": [13], "end_char": [24]},
            "dosage": {"start_char": [28], "end_char": [39]},
        },
    },
    "semeval_relation": {"sentence": "The <e1>frost</e1> brought about the <e2>crack</e2> in the pipe.", "relation": 0},
    # ------------------------------------------------------------------------------------------------ generation
    "common_gen": {
        "concept_set_idx": 0,
        "concepts": ["bench", "read", "sun"],
        "target": "An old man reads on a bench in the sun.",
    },
    # ------------------------------------------------------------------------------------------------- inference
    "snli": {
        "premise": "Three girls carry a canoe to the lake.",
        "hypothesis": "Some people are outdoors.",
        "label": 0,
    },
    "mnli": {
        "premise": "The museum opens at ten, except on Mondays.",
        "hypothesis": "The museum has a large garden.",
        "label": 1,
        "idx": 0,
    },
    "rte": {
        "sentence1": "The bridge over the Lima was finished in spring.",
        "sentence2": "The bridge is not finished.",
        "label": 1,
        "idx": 0,
    },
    "anli": {
        "uid": "00000000-0000-0000-0000-000000000000",
        "premise": "The Harbour Choir was founded in 1981 by two dockers. It gave its last concert in 2004.",
        "hypothesis": "The choir sang for more than forty years.",
        "label": 2,
        "reason": "From 1981 to 2004 there are only 23 years.",
    },
    # ---------------------------------------------------------------------------------------------------- intent
    "banking77": {"text": "The machine has kept my card, what now?", "label": 18},
    # ------------------------------------------------------------------------------------------------ paraphrase
    "mrpc": {
        "sentence1": "The firm said on Tuesday that it would close two plants.",
        "sentence2": "On Tuesday the firm announced the closing of two plants.",
        "label": 1,
        "idx": 0,
    },
    "qqp": {
        "question1": "How do I get rust off a bicycle chain?",
        "question2": "How often does a bicycle chain rust?",
        "label": 0,
        "idx": 0,
    },
    "paws": {
        "id": 1,
        "sentence1": "The road leads from Arden to Belmor.",
        "sentence2": "The road leads from Belmor to Arden.",
        "label": 0,
    },
    # ------------------------------------------------------------------------------------- reading comprehension
    "squad": {
        "id": "0" * 24,
        "title": "Lighthouse",
        "context": "The lighthouse of Corvo was lit for the first time in 1911 and has been automatic since 1986.",
        "question": "In what year was the lighthouse lit for the first time?",
        "answers": {"text": ["1911"], "answer_start": [54]},
    },
    "boolq": {
        "question": "can you see the lighthouse from the ferry",
        "answer": True,
        "passage": "From the deck of the ferry the lighthouse is in sight during the whole crossing.",
    },
    "race": {
        "example_id": "middle0.txt",
        "article": "Tom forgot his lunch. A classmate gave him an apple. The next day Tom brought two apples.",
        "answer": "D",
        "question": "Tom brought two apples because he _ .",
        "options": [
            "was very hungry",
            "had bought too many",
            "did not like sandwiches",
            "wanted to give one back",
        ],
    },
    "adversarial_qa": {
        "id": "0" * 40,
        "title": "Tea",
        "context": "The tea of the upper slopes is picked in May, that of the valley not before July.",
        "question": "When is the later of the two harvests?",
        "answers": {"text": ["July"], "answer_start": [76]},
        "metadata": {"split": "train", "model_in_the_loop": "BiDAF"},
    },
    # ------------------------------------------------------------------------------------------------ science_qa
    "sciq": {
        "question": "What do we call the change of a liquid into a gas at its surface?",
        "distractor3": "melting",
        "distractor1": "freezing",
        "distractor2": "condensation",
        "correct_answer": "evaporation",
        "support": "Evaporation takes place at the surface of a liquid, at any temperature.",
    },
    "arc_challenge": {
        "id": "Made_Up_1",
        "question": "Which part of a plant takes up most of its water?",
        "choices": {"text": ["flower", "leaf", "root", "fruit"], "label": ["1", "2", "3", "4"]},
        "answerKey": "3",
    },
    "arc_easy": {
        "id": "Made_Up_2",
        "question": "Which of these gives off its own light?",
        "choices": {"text": ["the moon", "a star", "a mirror", "a planet"], "label": ["A", "B", "C", "D"]},
        "answerKey": "B",
    },
    "openbookqa": {
        "id": "0-000",
        "question_stem": "A compass needle points north because of",
        "choices": {
            "text": ["the wind", "the tides", "the moon", "a magnetic field"],
            "label": ["A", "B", "C", "D"],
        },
        "answerKey": "D",
    },
    "qasc": {
        "id": "0" * 32,
        "question": "What do bees carry from one blossom to another?",
        "choices": {
            "text": ["sand", "pollen", "ice", "roots", "bark", "seaweed", "salt", "feathers"],
            "label": ["A", "B", "C", "D", "E", "F", "G", "H"],
        },
        "answerKey": "B",
        "fact1": "Pollen sticks to insects that visit flowers.",
        "fact2": "Bees visit flowers.",
        "combinedfact": "Pollen sticks to bees that visit flowers.",
        "formatted_question": "What do bees carry from one blossom to another? (A) sand (B) pollen (C) ice ...",
    },
    # ------------------------------------------------------------------------------------------------- sentiment
    "sst2": {"idx": 0, "sentence": "a dull and shapeless comedy ", "label": 0},
    "imdb": {"text": "I laughed all the way through.<br /><br />The cast is a joy, go and see it.", "label": 1},
    "yelp_polarity": {"text": "Cold soup, rude waiter.\\nWe will not be back.", "label": 0},
    "rotten_tomatoes": {"text": "a tender , sharply observed portrait of two sisters .", "label": 1},
    "tweet_sentiment": {"text": "@user The library opens at nine on Friday", "label": 1},
    # --------------------------------------------------------------------------------------------- summarisation
    "xsum": {
        "document": "The old mill on the river Vez burned for hours.\nNobody was hurt. The owner wants to rebuild it.",
        "summary": "A fire has destroyed an old mill, but nobody was hurt.",
        "id": "0",
    },
    "cnn_dailymail": {
        "article": "(Made up) The council of Pinhal voted on Monday for a new swimming pool. Work begins in autumn.",
        "highlights": "Pinhal gets a new swimming pool .\nWork begins in autumn .",
        "id": "0" * 40,
    },
    "samsum": {
        "id": "0",
        "dialogue": "Bea: Are you coming at 8?\r\nLuis: 9, the bus is late\r\nBea: ok, I'll wait",
        "summary": "Luis will come to Bea at 9 because his bus is late.",
    },
    # ----------------------------------------------------------------------------------------------------- topic
    "ag_news": {"text": "Rowers win by a length. The crew of Viana led from the first stroke on Sunday.", "label": 1},
    "dbpedia_14": {
        "label": 7,
        "title": "Lake Tarn",
        "content": " Lake Tarn is a mountain lake fed by melting snow. It freezes over in most winters.",
    },
    "trec": {
        "text": "Who built the first lighthouse on Corvo ?",
        "label": 13,
        "label_text": "an individual",
        "label_original": "HUM:ind",
        "label_coarse": 3,
        "label_coarse_text": "human beings",
        "label_coarse_original": "HUM",
    },
    "sms_spam": {"sms": "You have won a cruise! Reply YES to claim it now.\n", "label": 1},
    # ----------------------------------------------------------------------------------------------- translation
    "wmt16_de_en": {
        "translation": {"de": "Die Sitzung beginnt um neun Uhr.", "en": "The meeting begins at nine o'clock."}
    },
    "opus100_en_fr": {"translation": {"en": "Where is the station?", "fr": "Où est la gare ?"}},
}
"""Data set -> row."""
