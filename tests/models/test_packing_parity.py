"""Packed, padded and one by one: the same loss and the same gradients, on every architecture of the list."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache, wraps
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.packing_parity import (
    ARCHITECTURES,
    REQUESTS,
    Subject,
    compare,
    cross_document_gradient,
    make_subject,
    prepare,
    together,
)
from ftkit.data.batches import Batch
from ftkit.errors import UserError
from ftkit.models import isolation
from ftkit.models.isolation import ON_CPU, Arithmetic
from ftkit.models.objective import Objective
from tests.models import flash_stand_in
from tests.tiny_models import tiny_config

TOLERANCE = 1e-5
"""Of the loss, and of each parameter's gradient as a share of its largest entry.

float32 rounds by 6e-8, and the layouts add up in another order what is some thousand terms: most were off by 4e-7 to
1e-6. Qwen 3.5 was by 5e-6: its linear attention takes exponentials of sums of 64 decays. Experts need no more: a token
whose second and third expert tie to the last bit would be routed by chance, and none does here.
"""
HYBRID = ("qwen3_5", "lfm2")
"""Convolutions and linear attention see documents before their own, whatever the attention does."""
BY_BOUNDS_ONLY = ("opt", "gpt_oss")
"""These do not tell their mask or attention about position_ids."""
Subjects = Callable[[str], Subject]


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Subjects:
    """The subject of an architecture, made once."""
    return cache(lambda architecture: make_subject(architecture, tmp_path_factory.mktemp(architecture)))


def expected_rung(architecture: str, requested: str) -> str:
    if architecture in HYBRID or (requested != "auto" and architecture in BY_BOUNDS_ONLY):
        return "padded"
    return "ftkit" if requested == "auto" else "position_ids"


def assert_equal_to_alone(objective: Objective, subject: Subject, *, packed: bool) -> None:
    difference = compare(together(objective, packed=packed), subject.alone)
    assert difference.loss <= TOLERANCE, difference
    assert difference.gradient <= TOLERANCE, difference
    assert cross_document_gradient(objective, packed=packed) == 0.0


@pytest.mark.parametrize("requested", REQUESTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_is_padded_is_one_by_one(subjects: Subjects, architecture: str, requested: str) -> None:
    subject = subjects(architecture)
    if (architecture, requested) == ("gpt_oss", "sdpa"):
        with pytest.raises(UserError, match="gpt_oss cannot use attention sdpa"):
            prepare(subject, requested)
        return
    chosen, objective = prepare(subject, requested)
    assert chosen.rung == expected_rung(architecture, requested), chosen.reason
    assert chosen.attn_implementation == (
        None if (requested == "auto" and not chosen.packed) else {"auto": "ftkit"}.get(requested, requested)
    )
    if chosen.packed:
        assert_equal_to_alone(objective, subject, packed=True)
        _, objective = prepare(subject, requested, "off")
    assert_equal_to_alone(objective, subject, packed=False)


@pytest.mark.parametrize("architecture", HYBRID)
def test_what_the_proof_finds_is_so(subjects: Subjects, architecture: str) -> None:
    """Packed against its verdict, with position_ids alone: documents leak, and the numbers are others."""
    _, objective = prepare(subjects(architecture), "sdpa", "off")
    assert cross_document_gradient(objective, packed=True) > 0.01
    assert compare(together(objective, packed=True), subjects(architecture).alone).gradient > 0.1


def test_experts_train_without_a_router_loss_or_not_at_all(subjects: Subjects) -> None:
    """That loss is no sum over documents: it would differ with how a batch is split."""
    for architecture in ("mixtral", "gpt_oss"):
        _, objective = prepare(subjects(architecture), "auto")
        assert any("load-balancing loss is off" in note for note in objective.notes)
        model = copy.deepcopy(objective.model)
        model.config.output_router_logits = True
        with pytest.raises(UserError, match="asks for a router loss"):
            Objective(model, num_datasets=2, packed_attention=True)


# --------------------------------------------------------------------------------- the comparison finds what is broken


def bounds_off_by_one(batch: Batch) -> Batch:
    assert batch.cu_seq_lens is not None
    inner = torch.ones_like(batch.cu_seq_lens)
    inner[[0, -1]] = 0
    return replace(batch, cu_seq_lens=batch.cu_seq_lens - inner)


def positions_count_on(batch: Batch) -> Batch:
    return replace(batch, position_ids=torch.arange(batch.input_ids.shape[1])[None])


def one_target_less(batch: Batch) -> Batch:
    names = ("target_positions", "target_ids", "target_datasets")
    return replace(batch, **{name: getattr(batch, name)[1:] for name in names})


@pytest.mark.parametrize("broken", [bounds_off_by_one, positions_count_on, one_target_less])
# Rotary positions are relative: a document that starts elsewhere is the same; a learned position is not.
@pytest.mark.parametrize("architecture", ["mistral", "gpt2"])
def test_a_broken_batch_is_seen(subjects: Subjects, architecture: str, broken: Callable[[Batch], Batch]) -> None:
    subject = subjects(architecture)
    for requested in ("auto", "sdpa"):
        _, objective = prepare(subject, requested)
        blind = broken is bounds_off_by_one and requested == "sdpa"
        blind |= broken is positions_count_on and requested == "auto" and architecture == "mistral"
        found = compare(together(objective, packed=True, change=broken), subject.alone)
        assert (found.gradient > 1e-3) != blind, found


def test_a_window_that_is_ignored_is_seen(subjects: Subjects) -> None:
    for architecture in ("mistral", "phi3"):
        _, objective = prepare(subjects(architecture), "auto")
        for module in objective.modules():
            if hasattr(module, "sliding_window"):
                module.sliding_window = None
        objective.model.config.sliding_window = None
        assert compare(together(objective, packed=True), subjects(architecture).alone).gradient > 1e-3


# --------------------------------------------------------------------------------------------------- flash attention


# GPT-OSS knows only kernels of the hub, which stay off.
@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name not in (*HYBRID, "gpt_oss")])
def test_flash_attention_packs_by_positions(
    subjects: Subjects, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's way to the kernels, with a stand-in for the kernels themselves, which need a GPU."""
    flash_stand_in.use_stand_in(monkeypatch)
    monkeypatch.setattr(isolation, "ON_GPU", Arithmetic("cpu", torch.float32, ON_CPU.tolerance, ON_CPU.clearly))
    subject = subjects(architecture)
    chosen, objective = prepare(subject, "flash_attention_2")
    assert (chosen.rung, chosen.attn_implementation) == ("position_ids", "flash_attention_2"), chosen.reason
    assert "proven with flash_attention_2: off by" in chosen.reason
    for packed in (True, False):
        assert_equal_to_alone(objective, subject, packed=packed)


def ignores_bounds(q: Tensor, k: Tensor, v: Tensor, *_: Any, **kwargs: Any) -> Tensor:
    return flash_stand_in.flash_attn_func(q[None], k[None], v[None], causal=True)[0]


# transformers passes the arguments that it finds in the signature.
@wraps(flash_stand_in.flash_attn_varlen_func, assigned=())
def window_too_wide(*args: Any, window_size: tuple[int, int], **kwargs: Any) -> Tensor:
    wider = (window_size[0] + 1, window_size[1])
    return flash_stand_in.flash_attn_varlen_func(*args, window_size=wider, **kwargs)


@pytest.mark.parametrize(
    ("kernel", "found"),
    [
        (flash_stand_in.flash_attn_varlen_func, None),
        (ignores_bounds, "a document's gradient reaches another one"),
        (window_too_wide, "hidden states differ from the document alone"),
    ],
)
def test_rounding_to_bfloat16_hides_no_broken_kernel(
    kernel: Callable[..., Tensor], found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tolerances of a proof on a GPU."""
    flash_stand_in.use_stand_in(monkeypatch, packed=kernel)
    monkeypatch.setattr(isolation, "ON_GPU", replace(isolation.ON_GPU, device_type="cpu"))
    chosen = isolation.prove_isolation(tiny_config("mistral"), requested="flash_attention_2")
    assert chosen.packed == (found is None), chosen.reason
    assert found is None or f"position_ids: {found}" in chosen.reason
