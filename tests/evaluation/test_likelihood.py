"""Log-likelihoods: batched as one by one, for every architecture, and the model's own loss."""

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from ftkit.data.types import IGNORE, Example
from ftkit.errors import NonFiniteError
from ftkit.evaluation import likelihood
from ftkit.evaluation.likelihood import score_targets
from tests.tiny_models import CONFIGS, tiny_model


def example(rng: np.random.Generator, length: int, first_target: int) -> Example:
    ids = rng.integers(1, 250, size=length).astype(np.int32)
    labels = np.where(np.arange(length) >= first_target, ids, IGNORE).astype(np.int32)
    return Example(ids, labels)


def examples() -> list[Example]:
    rng = np.random.default_rng(0)
    ragged = [example(rng, length, first) for length, first in [(5, 4), (40, 3), (40, 38), (1, 1), (17, 1), (30, 29)]]
    gaps = example(rng, 25, 2)  # two turns with a gap between them
    gaps.labels[8:15] = IGNORE
    return [*ragged, gaps]


def one_by_one(model: PreTrainedModel, row: Example) -> float:
    with torch.no_grad():
        logits = model(torch.from_numpy(row.input_ids.astype(np.int64))[None]).logits[0]
    log_probabilities = logits.double().log_softmax(-1)
    return sum(
        log_probabilities[t - 1, row.labels[t]].item() for t in range(1, len(row.labels)) if row.labels[t] != IGNORE
    )


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("max_tokens", [1, 100, 10_000])
def test_batches_give_what_single_rows_give(architecture: str, max_tokens: int) -> None:
    model, rows = tiny_model(architecture).eval(), examples()
    found = score_targets(model, rows, max_tokens=max_tokens)
    assert found.log_likelihoods == pytest.approx([one_by_one(model, row) for row in rows], abs=1e-4)
    assert found.num_targets.tolist() == [row.num_targets for row in rows]
    assert found.tokens_run >= sum(row.num_tokens for row in rows if row.num_targets)


def test_it_is_the_models_own_loss() -> None:
    model, row = tiny_model().eval(), examples()[-1]
    ids, labels = (torch.from_numpy(a.astype(np.int64))[None] for a in (row.input_ids, row.labels))
    with torch.no_grad():
        loss = model(ids, labels=labels).loss.item()
    found = score_targets(model, [row], max_tokens=100)
    assert -found.log_likelihoods[0] / found.num_targets[0] == pytest.approx(loss, abs=1e-5)


def test_batches_respect_the_budgets_of_tokens_and_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny_model().eval(), examples() * 3
    seen: list[tuple[int, int]] = []
    head = model.lm_head

    def note(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append(tuple(inputs[0].shape[:2]))

    head.register_forward_pre_hook(note)
    monkeypatch.setattr(likelihood, "MAX_LOGITS", 60 * model.config.vocab_size)
    found = score_targets(model, rows, max_tokens=120)
    assert all(batch * positions <= 60 for batch, positions in seen)
    assert any(batch > 1 for batch, _ in seen)
    first, second, third = found.log_likelihoods.reshape(3, -1)
    assert first == pytest.approx(second, abs=1e-4)
    assert first == pytest.approx(third, abs=1e-4)


def test_progress_reaches_the_number_of_rows_with_targets() -> None:
    done: list[int] = []
    score_targets(tiny_model().eval(), examples(), max_tokens=60, on_progress=done.append)
    assert done == sorted(done)
    assert done[-1] == 6  # of seven one has no target


def test_logits_that_are_not_finite_are_an_error() -> None:
    model = tiny_model().eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError):
        score_targets(model, examples(), max_tokens=100)
