"""DoRA's layer: known answers, gradients, memory. Its files are compared with peft in test_lora_variants.py."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ftkit.methods import dora
from ftkit.methods.dora import row_norms
from ftkit.methods.lora_init import zeros
from ftkit.methods.lora_layer import LoraLayer, insert_lora, weight_OI
from tests.methods.test_lora_layer import Sizes

IN, OUT, RANK, SCALE, TOKENS = 6, 10, 3, 2.0, 50
both_kinds = pytest.mark.parametrize("kind", ["linear", "conv1d"])


def layer(kind: str, *, dropout: float = 0.0, dtype: torch.dtype = torch.float32, start: bool = False) -> LoraLayer:
    """Random weights, factors and lengths."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    base: nn.Module = nn.Linear(IN, OUT) if kind == "linear" else Conv1D(OUT, IN)
    for parameter in base.parameters():
        parameter.data = random(*parameter.shape)
    frozen = (random(RANK, IN), random(OUT, RANK)) if start else None
    factors = random(RANK, IN), random(OUT, RANK)
    module = insert_lora(base, factors, scale=SCALE, dropout=dropout, start=frozen, magnitude=random(OUT).abs())
    return module.to(dtype)


def reference(module: LoraLayer, x: Tensor, keep: Tensor | None = None) -> Tensor:
    """Equation 5 in plain autograd, with the norm as a constant, and dropout on the update's input."""
    weight, update = weight_OI(module), SCALE * module.lora_B @ module.lora_A
    frozen = weight if module.lora_A0 is None else weight - SCALE * module.lora_B0 @ module.lora_A0
    gain = module.lora_magnitude / (frozen + update).norm(dim=1).detach()
    dropped = x if keep is None else x * keep / (1.0 - module.lora_dropout)
    return gain * (x @ frozen.t() + dropped @ update.t()) + module.bias


def random_input(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(TOKENS, IN, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def trained(module: LoraLayer) -> list[Tensor]:
    return [module.lora_A, module.lora_B, module.lora_magnitude]


def test_known_answer():
    """W = [[3, 0]], B A = [[0, 2]] at scale 2: V = (3, 4), |V| = 5. m = 10, x = (1, 1), b = 1: 10 / 5 * 7 + 1 = 15."""
    linear = nn.Linear(2, 1)
    linear.weight.data, linear.bias.data = torch.tensor([[3.0, 0.0]]), torch.tensor([1.0])
    factors = torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0]])
    module = insert_lora(linear, factors, scale=2.0, dropout=0.0, magnitude=torch.tensor([10.0]))
    assert module(torch.tensor([1.0, 1.0])).tolist() == [15.0]


@both_kinds
@pytest.mark.parametrize("start", [False, True], ids=["dora", "dora+pissa"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_equals_autograd_in_float64(kind, start, dropout):
    module, x = layer(kind, dtype=torch.float64, start=start, dropout=dropout), random_input(torch.float64)
    torch.manual_seed(4)
    ours = module(x)
    torch.manual_seed(4)
    keep = torch.empty(x.shape, dtype=torch.bool).bernoulli_(1.0 - dropout) if dropout else None
    plain = reference(module, x, keep)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    weights = torch.randn(ours.shape, dtype=torch.float64)
    gradients = [torch.autograd.grad((output * weights).sum(), [x, *trained(module)]) for output in (ours, plain)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 4, 10, 512])
def test_norms_of_any_number_of_rows_at_a_time(rows, monkeypatch):
    monkeypatch.setattr(dora, "ROWS", rows)
    module = layer("linear")
    norms = row_norms(module.weight, module.lora_A, module.lora_B, SCALE)
    torch.testing.assert_close(norms, (module.weight + SCALE * module.lora_B @ module.lora_A).norm(dim=1))
    assert not norms.requires_grad


@both_kinds
def test_nothing_of_the_weights_size_is_formed_or_kept(kind, monkeypatch):
    """Neither V nor a float32 copy of the weight; for the backward pass one activation more than LoRA."""
    monkeypatch.setattr(dora, "ROWS", 4)
    module, x, saved = layer(kind), random_input(), []
    weight = module.weight
    weight.data = weight.data.bfloat16()
    with Sizes() as seen, torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        module(x).sum().backward()
    # The base product in the precision of x casts the weight, as without DoRA.
    assert seen.shapes.count((OUT, IN)) + seen.shapes.count((IN, OUT)) <= 2
    known = {tensor.data_ptr() for tensor in (x, module.weight, *trained(module))}
    new = sorted(tuple(tensor.shape) for tensor in saved if tensor.data_ptr() not in known)
    assert new == sorted([(TOKENS, RANK), (TOKENS, OUT), (OUT,), (OUT,)])


def test_a_row_of_zeros_stays_finite():
    linear = nn.Linear(2, 2, bias=False)
    linear.weight.data = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    norms = row_norms(linear.weight, *zeros(linear.weight, 1), 1.0)
    module = insert_lora(linear, (torch.ones(1, 2), torch.zeros(2, 1)), scale=1.0, dropout=0.0, magnitude=norms)
    output = module(torch.ones(3, 2))
    assert output.tolist() == [[0.0, 7.0]] * 3
    output.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in trained(module))


def test_computes_in_the_dtype_of_its_input():
    """bfloat16 products within 2%, gradients of the float32 parameters in float32."""
    exact, module = layer("linear"), layer("linear")
    module.weight.data, module.bias.data = module.weight.data.bfloat16(), module.bias.data.bfloat16()
    x = random_input(torch.bfloat16)
    output, expected = module(x), exact(x.float())
    assert output.dtype == torch.bfloat16
    assert (output.float() - expected).abs().max() <= 2e-2 * expected.abs().max()
    for mine, theirs in zip(
        torch.autograd.grad(output.float().square().sum(), trained(module)),
        torch.autograd.grad(expected.square().sum(), trained(exact)),
        strict=True,
    ):
        assert mine.dtype == torch.float32
        assert (mine - theirs).abs().max() <= 3e-2 * theirs.abs().max()


def test_starts_exactly_as_the_base():
    linear, x = nn.Linear(IN, OUT), random_input().detach()
    before = F.linear(x, linear.weight, linear.bias)
    factors = torch.randn(RANK, IN), torch.zeros(OUT, RANK)
    magnitude = row_norms(linear.weight, *factors, SCALE)
    module = insert_lora(linear, factors, scale=SCALE, dropout=0.0, magnitude=magnitude)
    torch.testing.assert_close(module(x), before, rtol=0, atol=1e-6)
