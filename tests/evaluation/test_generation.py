"""Greedy answers: a batch gives what single prompts give, and answers end where they should."""

import pytest
import torch

from ftkit.evaluation.generation import generate
from tests.tiny_models import CONFIGS, tiny_model

PROMPTS = [[256, *range(3, 3 + length)] for length in (3, 9, 1, 40, 22)]


def greedy(model: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    """The definition: the whole sequence anew for every token, no cache, no padding."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_batch_gives_what_single_prompts_give(architecture: str) -> None:
    model = tiny_model(architecture).eval()
    expected = [greedy(model, prompt, 12) for prompt in PROMPTS]
    for max_tokens in (1, 70, 10_000):
        found = generate(model, PROMPTS, end_ids=[258], max_new_tokens=12, max_tokens=max_tokens)
        assert [list(answer.ids) for answer in found] == [
            ids[: ids.index(258)] if 258 in ids else ids for ids in expected
        ]


def test_an_answer_ends_at_any_end_token_which_is_counted_and_not_kept() -> None:
    model = tiny_model().eval()
    ids = [greedy(model, prompt, 10) for prompt in PROMPTS]
    ends = [ids[0][4], ids[1][2]]
    found = generate(model, PROMPTS, end_ids=ends, max_new_tokens=10, max_tokens=1000)
    for expected, answer in zip(ids, found, strict=True):
        length = next((place for place, token in enumerate(expected) if token in ends), None)
        assert list(answer.ids) == (expected if length is None else expected[:length])
        assert answer.num_generated == (10 if length is None else length + 1)
        assert answer.finished is (length is not None)
    assert any(answer.finished for answer in found)


def test_a_complete_answer_ends_too_and_keeps_its_last_token() -> None:
    model = tiny_model().eval()
    expected = greedy(model, PROMPTS[1], 10)
    found = generate(
        model, PROMPTS, end_ids=[], max_new_tokens=10, max_tokens=1000, is_complete=lambda ids: len(ids) >= 3
    )
    assert list(found[1].ids) == expected[:3]
    assert [answer.num_generated for answer in found] == [3] * len(PROMPTS)


def test_the_models_own_generation_settings_are_set_aside_and_kept() -> None:
    model = tiny_model().eval()
    plain = generate(model, PROMPTS, end_ids=[], max_new_tokens=10, max_tokens=1000)
    own = model.generation_config
    own.repetition_penalty, own.min_new_tokens, own.do_sample, own.temperature = 9.0, 10, True, 5.0
    assert generate(model, PROMPTS, end_ids=[], max_new_tokens=10, max_tokens=1000) == plain
    assert model.generation_config is own


def test_progress_and_counts() -> None:
    done: list[int] = []
    found = generate(tiny_model().eval(), PROMPTS, end_ids=[], max_new_tokens=4, max_tokens=60, on_progress=done.append)
    assert done[-1] == len(PROMPTS)
    assert len(done) > 1
    assert sum(answer.num_generated for answer in found) == 4 * len(PROMPTS)
    assert all(answer.num_fed >= len(prompt) for answer, prompt in zip(found, PROMPTS, strict=True))
