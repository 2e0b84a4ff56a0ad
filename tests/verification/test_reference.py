"""The trained model reads others' answers: every token that it would not have written is noted."""

from pathlib import Path

import pytest
import torch

from ftkit.errors import UserError
from ftkit.evaluation.contestants import load_target
from ftkit.evaluation.generation import generate
from ftkit.runs import find_target
from ftkit.verification.reference import Reference
from ftkit.verification.sides import Answer
from tests.tiny_models import save_tiny, tiny_tokenizer

END = 258  # <|im_end|>


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(find_target(str(save_tiny(tmp_path_factory.mktemp("reference") / "tiny"))))


@pytest.fixture(scope="module")
def model(reference: Reference):
    return load_target(reference.target, dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def prompt(reference: Reference) -> list[int]:
    return reference.prompt(reference.probes()[0])


@pytest.fixture(scope="module")
def own(reference: Reference, model, prompt) -> tuple[int, ...]:
    """Ten tokens that the model writes by itself."""
    (written,) = generate(model, [prompt], end_ids=[END], max_new_tokens=10, max_tokens=1000)
    assert not written.finished
    return written.ids


def test_the_models_own_answer_has_no_partings(reference, model, prompt, own) -> None:
    judged = reference.judge(model, prompt, Answer(own, "", stopped=False))
    assert (judged.partings, judged.runs_on, judged.worst, judged.ids) == ((), None, None, own)


def test_another_token_is_found_where_it_is_and_weighed(reference, model, prompt, own) -> None:
    other = (*own[:4], (own[4] + 1) % 256, *own[5:])
    partings = reference.judge(model, prompt, Answer(other, "", stopped=False)).partings
    first = partings[0]
    assert (first.place, first.taken, first.favoured) == (4, other[4], own[4])
    with torch.no_grad():
        expected = model(torch.tensor([[*prompt, *own[:4]]])).logits[0, -1].log_softmax(-1)
    assert first.gap == pytest.approx(float(expected[own[4]] - expected[other[4]]), abs=1e-4)
    # What follows is held against the model too, after the answer's own tokens.
    with torch.no_grad():
        favourites = model(torch.tensor([[*prompt, *other]])).logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()
    assert [one.place for one in partings] == [
        p for p, (a, b) in enumerate(zip(other, favourites, strict=True)) if a != b
    ]


def test_an_end_that_the_model_would_not_write(reference, model, prompt, own) -> None:
    for answer in (Answer((*own[:3], END), "", stopped=True), Answer(own[:3], "", stopped=True)):
        (parting,) = reference.judge(model, prompt, answer).partings
        assert (parting.place, parting.favoured) == (3, own[3])
    assert parting.taken is None


def test_tokens_after_the_end_of_the_turn_run_on(reference, model, prompt, own) -> None:
    assert reference.judge(model, prompt, Answer((own[0], END, own[1]), "", stopped=False)).runs_on == 1
    assert reference.judge(model, prompt, Answer((own[0], END), "", stopped=False)).runs_on == 1
    assert reference.judge(model, prompt, Answer((own[0], END), "", stopped=True)).runs_on is None


def test_an_id_beyond_the_vocabulary_is_no_token_of_the_model(reference, model, prompt, own) -> None:
    answer = Answer((own[0], 10_000_000), "", stopped=False)
    with pytest.raises(IndexError):
        model(torch.tensor([[10_000_000]]))
    judged = reference.judge(model, prompt, answer)
    assert judged.partings[-1].gap == float("inf")


def test_of_an_answer_without_ids_the_text_is_read(reference, model, prompt, own) -> None:
    text = reference.tokenizer.decode(list(own))
    assert reference.judge(model, prompt, Answer(None, "abc", stopped=False)).ids == tuple(
        tiny_tokenizer()("abc").input_ids
    )
    if tuple(reference.tokenizer(text).input_ids) == own:
        assert reference.judge(model, prompt, Answer(None, text, stopped=False)).partings == ()


def test_prompts_are_those_of_training(reference) -> None:
    probe = reference.probes()[0]
    text = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    assert reference.prompt(probe) == reference.tokenizer(text).input_ids
    assert reference.turn_ends == reference.end_ids == (END,)


def test_without_a_template_there_is_nothing_to_render(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "tiny")
    tiny_tokenizer(None).save_pretrained(directory)
    (directory / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template: there is nothing that a server would render"):
        Reference(find_target(str(directory)))


def test_the_date_is_todays_as_a_server_has_it(tmp_path: Path) -> None:
    from datetime import datetime

    directory = save_tiny(tmp_path / "tiny")
    dated = "{{ strftime_now('%Y-%m-%d') }}" + tiny_tokenizer().chat_template
    tiny_tokenizer(dated).save_pretrained(directory)
    reference = Reference(find_target(str(directory)))
    prompt = reference.prompt(reference.probes()[0])
    assert reference.tokenizer.decode(prompt[:10]) == datetime.now().strftime("%Y-%m-%d")
