"""The chunked cross-entropy against torch's, in float64 and in the precision of training."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ftkit.models.loss import CHUNK_BYTES, chunk_size, chunked_cross_entropy

N, D, V = 37, 16, 50


def random_inputs(dtype: torch.dtype = torch.float32, *, bias: bool = True, n: int = N) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_ND": torch.randn(n, D, generator=generator).to(dtype).requires_grad_(),
        "weight_VD": torch.randn(V, D, generator=generator).requires_grad_(),
        "bias_V": torch.randn(V, generator=generator).requires_grad_() if bias else None,
        "targets_N": torch.randint(0, V, (n,), generator=generator),
        "datasets_N": torch.randint(0, 3, (n,), generator=generator),
    }


def reference(inputs: dict[str, Any], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Sum, sums by data set and gradients of torch's cross-entropy in `dtype`."""
    leaves = [
        inputs[name].detach().to(dtype).requires_grad_()
        for name in ("hidden_ND", "weight_VD", "bias_V")
        if inputs[name] is not None
    ]
    losses = F.cross_entropy(F.linear(*leaves), inputs["targets_N"], reduction="none")
    by_dataset = torch.stack([losses[inputs["datasets_N"] == dataset].sum() for dataset in range(3)])
    losses.sum().backward()
    return losses.sum().detach(), by_dataset.detach(), [leaf.grad for leaf in leaves]


def gradients(inputs: dict[str, Any]) -> list[Tensor]:
    return [inputs[name].grad for name in ("hidden_ND", "weight_VD", "bias_V") if inputs[name] is not None]


@pytest.mark.parametrize("chunk", [1, 5, N, 1000, None])
@pytest.mark.parametrize("bias", [True, False])
def test_loss_and_gradients_are_torchs(chunk: int | None, bias: bool) -> None:
    inputs = random_inputs(bias=bias)
    loss, by_dataset = chunked_cross_entropy(**inputs, num_datasets=3, chunk=chunk)
    expected, expected_by_dataset, expected_gradients = reference(inputs)
    loss.backward()
    assert loss.dtype == by_dataset.dtype == torch.float32
    assert not by_dataset.requires_grad
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(by_dataset.double(), expected_by_dataset, rtol=1e-6, atol=0)
    for ours, theirs in zip(gradients(inputs), expected_gradients, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=2e-6 * float(theirs.abs().max()))


def test_the_gradient_is_scaled_by_what_comes_after() -> None:
    inputs = random_inputs()
    loss, _ = chunked_cross_entropy(**inputs, num_datasets=3)
    (loss * 0.25 + 3).backward()
    for ours, theirs in zip(gradients(inputs), reference(inputs)[2], strict=True):
        torch.testing.assert_close(ours.double(), theirs / 4, rtol=0, atol=1e-6 * float(theirs.abs().max()))


def test_a_second_backward_pass_is_refused() -> None:
    loss, _ = chunked_cross_entropy(**random_inputs(), num_datasets=3)
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="only one backward pass"):
        loss.backward()


def test_large_logits_do_not_overflow() -> None:
    inputs = random_inputs()
    inputs["weight_VD"] = (inputs["weight_VD"].detach() * 1e4).requires_grad_()
    loss, _ = chunked_cross_entropy(**inputs, num_datasets=3)
    loss.backward()
    torch.testing.assert_close(loss.double(), reference(inputs)[0], rtol=1e-6, atol=0)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients(inputs))


def test_a_float32_master_under_bfloat16_hidden_states() -> None:
    inputs = random_inputs(torch.bfloat16)
    loss, _ = chunked_cross_entropy(**inputs, num_datasets=3, chunk=8)
    loss.backward()
    hidden, weight, bias = gradients(inputs)
    assert (hidden.dtype, weight.dtype, bias.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    rounded = {**inputs, "weight_VD": inputs["weight_VD"].bfloat16(), "bias_V": inputs["bias_V"].bfloat16()}
    expected, _, expected_gradients = reference(rounded)
    # The logits are rounded to bfloat16 (relative 2^-9), the gradient with respect to them once more.
    torch.testing.assert_close(loss.double(), expected, rtol=2e-3, atol=0)
    for ours, theirs in zip((hidden, weight, bias), expected_gradients, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-2 * float(theirs.abs().max()))


def test_the_weights_gradient_is_accumulated_in_float32() -> None:
    # 4,096 equal contributions: bfloat16 would stop growing at 256 times one of them.
    hidden, weight = torch.ones(4096, 1, dtype=torch.bfloat16), torch.zeros(2, 1, requires_grad=True)
    zeros = torch.zeros(4096, dtype=torch.int64)
    loss, _ = chunked_cross_entropy(hidden, weight, None, zeros, zeros, 1, chunk=1)
    loss.backward()
    assert weight.grad.tolist() == [[-2048.0], [2048.0]]


def test_only_the_gradients_that_are_needed() -> None:
    inputs = random_inputs()
    inputs["weight_VD"].requires_grad_(False)
    inputs["bias_V"].requires_grad_(False)
    loss, _ = chunked_cross_entropy(**inputs, num_datasets=3)
    assert [gradient is not None for gradient in loss.grad_fn.gradients] == [True, False, False]
    loss.backward()
    torch.testing.assert_close(inputs["hidden_ND"].grad.double(), reference(inputs)[2][0], rtol=0, atol=1e-5)


def test_without_gradients_none_is_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = random_inputs()
    expected = reference(inputs)[0]
    products = []
    monkeypatch.setattr("ftkit.models.loss._add_product", lambda *_: products.append(1))
    with torch.no_grad():
        loss, _ = chunked_cross_entropy(**inputs, num_datasets=3)
    assert not loss.requires_grad
    assert products == []
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    chunked_cross_entropy(**inputs, num_datasets=3)
    assert products == [1]


def test_no_targets_give_zero_and_a_gradient_of_zeros() -> None:
    inputs = random_inputs(n=0)
    loss, by_dataset = chunked_cross_entropy(**inputs, num_datasets=3)
    loss.backward()
    assert loss.item() == 0.0
    assert by_dataset.tolist() == [0.0, 0.0, 0.0]
    assert inputs["hidden_ND"].grad.shape == (0, D)
    assert torch.equal(inputs["weight_VD"].grad, torch.zeros(V, D))
    assert torch.equal(inputs["bias_V"].grad, torch.zeros(V))


def test_nothing_of_the_size_of_all_logits_is_saved() -> None:
    inputs = random_inputs(n=500)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss, _ = chunked_cross_entropy(**inputs, num_datasets=3, chunk=10)
    assert saved == []
    assert max(gradient.numel() for gradient in loss.grad_fn.gradients) == max(500 * D, V * D)


@pytest.mark.parametrize(("vocabulary", "size"), [(49_152, 640), (151_936, 192), (262_144, 128), (1_000_000, 128)])
def test_chunks_keep_to_their_budget(vocabulary: int, size: int) -> None:
    assert chunk_size(vocabulary) == size
    assert size == 128 or 4 * size * vocabulary <= CHUNK_BYTES
