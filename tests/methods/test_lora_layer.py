import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ftkit.methods.base import seeded_generator
from ftkit.methods.lora_init import INITIALISATIONS
from ftkit.methods.lora_layer import LoraConv1D, LoraLayer, LoraLinear, LowRankLinear, insert_lora, weight_OI
from ftkit.methods.table import METHODS
from ftkit.models.precision import CastLinear, compute_in
from tests.methods.cases import SECTIONS, applied, loss, trained
from tests.tiny_models import tiny_model

IN, OUT, RANK = 6, 10, 3


def lora_of(
    base: nn.Module, *, rank: int, scale: float, dropout: float = 0.0, generator: torch.Generator | None = None, **kept
) -> LoraLayer:
    """`base` as a LoRA layer, A Kaiming-uniform and B zero."""
    factors = INITIALISATIONS["kaiming"](weight_OI(base), rank, scale, generator or torch.Generator())
    return insert_lora(base, factors, scale=scale, dropout=dropout, **kept)


def layer(
    kind: str, *, dropout: float = 0.0, dtype: torch.dtype = torch.float32, bias: bool = True, start: bool = False
) -> LoraLayer:
    """A LoRA layer with random A and B; they are float32 unless `dtype` is float64.

    Args:
        start: whether a random B0 A0 is taken off the weight, as in PiSSA.
    """
    generator = torch.Generator().manual_seed(0)
    base: nn.Module = nn.Linear(IN, OUT, bias=bias) if kind == "linear" else Conv1D(OUT, IN)
    for parameter in base.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype)
    frozen = torch.randn(RANK, IN, generator=generator), torch.randn(OUT, RANK, generator=generator)
    lora = lora_of(base, rank=RANK, scale=2.0, dropout=dropout, generator=generator, start=frozen if start else None)
    lora.lora_B.data = torch.randn(OUT, RANK, generator=generator)
    return lora.double() if dtype == torch.float64 else lora


def reference(lora: LoraLayer, x: Tensor, keep: Tensor | None = None) -> Tensor:
    """The equation, in plain autograd."""
    weight_OI = lora.weight.t() if isinstance(lora, Conv1D) else lora.weight
    if lora.lora_A0 is not None:
        weight_OI = weight_OI - lora.lora_scale * lora.lora_B0 @ lora.lora_A0
    dropped = x if keep is None else x * keep / (1.0 - lora.lora_dropout)
    return F.linear(x, weight_OI, lora.bias) + lora.lora_scale * (dropped @ lora.lora_A.t() @ lora.lora_B.t())


def gradients(output: Tensor, lora: LoraLayer, x: Tensor) -> list[Tensor]:
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(output)
    return list(torch.autograd.grad((output * weights).sum(), [x, lora.lora_A, lora.lora_B]))


def random_input(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(*shape, IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.to(dtype).requires_grad_()


both_kinds = pytest.mark.parametrize("kind", ["linear", "conv1d"])
with_and_without_start = pytest.mark.parametrize("start", [False, True], ids=["lora", "pissa"])


def test_known_answer():
    """W = [[1, 2]], b = 3, A = [[1, -1]], B = [[2]], scale 4, x = (5, 7): 5 + 14 + 3 + 4 * 2 * (5 - 7) = 6."""
    linear = nn.Linear(2, 1)
    linear.weight.data, linear.bias.data = torch.tensor([[1.0, 2.0]]), torch.tensor([3.0])
    lora = lora_of(linear, rank=1, scale=4.0)
    lora.lora_A.data, lora.lora_B.data = torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0]])
    assert lora(torch.tensor([5.0, 7.0])).tolist() == [6.0]


@both_kinds
@with_and_without_start
@pytest.mark.parametrize("shape", [(), (4,), (2, 4), (2, 2, 2)])
def test_equals_autograd_in_float64(kind, shape, start):
    lora, x = layer(kind, dtype=torch.float64, start=start), random_input(*shape, dtype=torch.float64)
    ours, plain = lora(x), reference(lora, x)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(gradients(ours, lora, x), gradients(plain, lora, x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@both_kinds
@with_and_without_start
def test_gradient_by_finite_differences(kind, start):
    lora, x = layer(kind, dtype=torch.float64, dropout=0.5, start=start), random_input(4, dtype=torch.float64)
    keep = torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    base = lora.weight, lora.bias

    def forward(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return LowRankLinear.apply(x, *base, a, b, lora.lora_A0, lora.lora_B0, keep, 2.0, 0.5, kind == "conv1d", None)

    assert torch.autograd.gradcheck(forward, (x, lora.lora_A, lora.lora_B))


@both_kinds
@with_and_without_start
def test_dropout_scales_and_masks_the_update_only(kind, start):
    lora, x = layer(kind, dtype=torch.float64, dropout=0.3, start=start), random_input(50, dtype=torch.float64)
    torch.manual_seed(4)
    ours = lora(x)
    torch.manual_seed(4)
    keep = torch.empty(x.shape, dtype=torch.bool).bernoulli_(0.7)
    plain = reference(lora, x, keep)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(gradients(ours, lora, x), gradients(plain, lora, x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    assert torch.equal(lora.eval()(x), layer(kind, dtype=torch.float64, start=start).eval()(x))


def test_dropout_keeps_the_mean():
    """20,000 draws: the mean of the dropped-out update lies within 5 standard errors of the update."""
    lora, x = layer("linear", dropout=0.4).train(), random_input().detach()
    torch.manual_seed(0)
    samples = torch.stack([lora(row) for row in x.expand(200, 100, IN)]).flatten(0, 1).detach()
    error = samples.std(0) / samples.shape[0] ** 0.5
    assert ((samples.mean(0) - lora.eval()(x)).abs() <= 5 * error).all()


@both_kinds
def test_starts_as_its_base(kind):
    base = nn.Linear(IN, OUT) if kind == "linear" else Conv1D(OUT, IN)
    x, bound = random_input(4).detach(), IN**-0.5
    before = base(x)
    lora = lora_of(base, rank=RANK, scale=2.0, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(lora(x), before, rtol=0, atol=1e-6)
    assert lora.lora_B.count_nonzero() == 0
    # Kaiming-uniform with a = sqrt(5): bounded by 1 / sqrt(input width).
    assert 0.5 * bound < lora.lora_A.abs().max() <= bound


@both_kinds
def test_two_zero_factors_get_no_gradient_and_one_is_enough(kind):
    """dL/dA goes through B and dL/dB through A: whichever is not zero lets the other one move."""
    x = random_input(4).detach()
    for zero_A, zero_B in ((True, True), (True, False), (False, True)):
        lora = layer(kind)
        lora.lora_A.data *= 0.0 if zero_A else 1.0
        lora.lora_B.data *= 0.0 if zero_B else 1.0
        optimizer, start = torch.optim.SGD([lora.lora_A, lora.lora_B], lr=1e-4), lora(x).square().sum().item()
        lora(x).square().sum().backward()
        assert (lora.lora_A.grad.count_nonzero() == 0) == zero_B
        assert (lora.lora_B.grad.count_nonzero() == 0) == zero_A
        optimizer.step()
        assert (lora(x).square().sum().item() < start) == (not (zero_A and zero_B))


def test_the_module_keeps_its_identity_and_names():
    linear = nn.Linear(IN, OUT)
    weight, hooks = linear.weight, []
    linear.register_forward_hook(lambda *_: hooks.append(True))
    lora = lora_of(linear, rank=RANK, scale=0.5)
    assert lora is linear
    assert lora.weight is weight
    assert list(lora.state_dict()) == ["weight", "bias", "lora_A", "lora_B"]
    assert [name for name, parameter in lora.named_parameters() if parameter.requires_grad] == ["lora_A", "lora_B"]
    lora(torch.zeros(IN))
    assert hooks == [True]
    assert type(lora) is LoraLinear
    assert isinstance(layer("conv1d"), LoraConv1D)
    assert not torch.equal(copy.deepcopy(lora)(torch.ones(IN)), torch.zeros(OUT))


@both_kinds
@with_and_without_start
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_nothing_is_saved_twice(kind, dropout, start):
    """For the backward pass: x and the parameters by reference, tokens x rank numbers, a mask of bytes."""
    lora, x = layer(kind, dropout=dropout, start=start), random_input(50)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = lora(x)
    factors = [factor for factor in (lora.lora_A, lora.lora_B, lora.lora_A0, lora.lora_B0) if factor is not None]
    by_reference = {tensor.data_ptr() for tensor in (x, lora.weight, *factors)}
    new = [tensor for tensor in saved if tensor.data_ptr() not in by_reference]
    expected = [(50, RANK, torch.float32)] + ([(50, IN, torch.bool)] if dropout else [])
    assert sorted((*tensor.shape, tensor.dtype) for tensor in new) == sorted(expected)
    assert len(saved) == 2 + len(factors) + len(expected)
    output.sum().backward()


def test_no_cast_of_a_weight_is_saved():
    """A and B are float32 beside a bfloat16 base: what is saved are the parameters, not their casts."""
    lora, x = layer("linear", dtype=torch.bfloat16), random_input(50, dtype=torch.bfloat16)
    lora.lora_A.data, lora.lora_B.data = lora.lora_A.float(), lora.lora_B.float()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora(x)
    pointers = {tensor.data_ptr() for tensor in saved}
    assert {tensor.data_ptr() for tensor in (x, lora.weight, lora.lora_A, lora.lora_B)} <= pointers
    assert len(pointers) == 5


class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
    """Collects the shapes of everything that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view:
            self.shapes.append(tuple(result.shape))
        return result


@both_kinds
@with_and_without_start
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_no_product_of_the_weights_size(kind, dropout, start):
    """The update B A is never formed, forward or backward, nor a gradient of the base weight, nor W - B0 A0."""
    lora, x = layer(kind, dropout=dropout, start=start), random_input(50)
    with Sizes() as seen:
        lora(x).sum().backward()
    assert (OUT, IN) not in seen.shapes
    assert (IN, OUT) not in seen.shapes
    assert (RANK, IN) in seen.shapes, "the observer saw no gradient of A"


def test_no_gradient_to_an_input_that_needs_none():
    lora, x = layer("linear"), random_input(50).detach()
    with Sizes() as seen:
        lora(x).sum().backward()
    assert (50, IN) not in seen.shapes
    assert lora.lora_A.grad is not None


@both_kinds
def test_input_that_is_not_contiguous(kind):
    lora = layer(kind, dtype=torch.float64)
    x = torch.randn(IN, 4, 3, dtype=torch.float64).permute(2, 1, 0).requires_grad_()
    ours, plain = lora(x), reference(lora, x)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(gradients(ours, lora, x), gradients(plain, lora, x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("base_dtype", [torch.bfloat16, torch.float32])
def test_computes_in_the_dtype_of_its_input(base_dtype):
    """bfloat16 products have a relative error of 2^-8; gradients of float32 A and B arrive in float32."""
    lora, x = layer("linear"), random_input(50, dtype=torch.bfloat16)
    lora.weight.data, lora.bias.data = lora.weight.data.to(base_dtype), lora.bias.data.to(base_dtype)
    output = lora(x)
    assert output.dtype == torch.bfloat16
    exact = layer("linear")
    wide = x.detach().float().requires_grad_()
    for mine, theirs in zip(gradients(output, lora, x), gradients(exact(wide), exact, wide), strict=True):
        assert (mine.float() - theirs).abs().max() <= 2e-2 * theirs.abs().max()
    assert [gradient.dtype for gradient in gradients(lora(x), lora, x)] == [
        torch.bfloat16,
        torch.float32,
        torch.float32,
    ]


def test_on_a_class_that_casts_its_weight():
    linear = nn.Linear(IN, OUT)
    linear.__class__ = CastLinear
    x = random_input(4, dtype=torch.bfloat16).detach()
    before = linear(x)
    lora = lora_of(linear, rank=RANK, scale=0.5)
    assert torch.equal(lora(x), before)


def test_casting_trained_weights_leaves_the_layer_alone():
    model = applied("llama", "lora")
    before = {name: type(module) for name, module in model.named_modules()}
    compute_in(model, torch.bfloat16)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_quantized_weights_are_not_taken_for_plain_ones():
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(torch.zeros(8, 1))
    with pytest.raises(AssertionError, match="packed"):
        lora_of(linear, rank=1, scale=1.0)


def test_dropout_survives_checkpointing():
    """The recomputed forward draws the same masks: gradients are equal to the last bit."""
    section, gradients = SECTIONS["lora"].model_copy(update={"dropout": 0.3}), []
    for checkpointing in (False, True):
        model = tiny_model("llama").train()
        METHODS["lora"].apply(model, section, seed=0)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        loss(model).backward()
        gradients.append([parameter.grad for parameter in trained(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.slow
# Dynamo itself trips over three of torch's own deprecations.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["lora", "adapter"])
def test_compiled_equals_eager(case):
    """In one graph without breaks: loss within 1e-6, gradients within 1e-5 of their maximum."""
    results = []
    for compiled in (False, True):
        model = applied("llama", case)
        for block in model.model.layers if compiled else ():
            block.compile(fullgraph=True, backend="aot_eager")
        value = loss(model)
        value.backward()
        results.append((value.detach(), [parameter.grad for parameter in trained(model).values()]))
    (eager, eager_grads), (fast, fast_grads) = results
    torch.testing.assert_close(eager, fast, rtol=1e-6, atol=0)
    for a, b in zip(eager_grads, fast_grads, strict=True):
        assert (a - b).abs().max() <= 1e-5 * a.abs().max() + 1e-9


def test_seeds_are_read_whole():
    first = torch.rand(1, generator=seeded_generator(0, "a"))
    assert first != torch.rand(1, generator=seeded_generator(0, "b"))
    assert first != torch.rand(1, generator=seeded_generator(2**32 - 1, "a"))
