"""Methods under `fully_shard`: one process, whose parameters are shards (DTensors) all the same."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ftkit.distributed import whole
from ftkit.methods.base import report
from ftkit.models.architecture import describe
from tests.methods.cases import CASES, SECTIONS, applied, loss, method_of, perturb, trained

every_section = pytest.mark.parametrize("case", SECTIONS)


@pytest.fixture(autouse=True)
def process_group(tmp_path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def shard(model: PreTrainedModel, param_dtype: torch.dtype | None = None) -> PreTrainedModel:
    mesh = init_device_mesh("cpu", (1,))
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in describe(model).blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


@pytest.mark.parametrize(("architecture", "case"), [pair for pair in CASES if pair[0] in ("llama", "gpt2")])
def test_gradients_and_state_equal_the_unsharded_ones(architecture, case):
    plain, sharded = applied(architecture, case), applied(architecture, case)
    for model in (plain, sharded):
        perturb(model)
    shard(sharded)
    assert report(sharded) == report(plain)
    for model in (plain, sharded):
        loss(model).backward()
    gradients = {name: parameter.grad for name, parameter in trained(sharded).items()}
    assert all(isinstance(gradient, DTensor) for gradient in gradients.values())
    for name, parameter in trained(plain).items():
        assert torch.equal(whole(gradients[name]), parameter.grad), name

    state = method_of(case).trained_state(sharded, gather=whole)
    expected = method_of(case).trained_state(plain)
    assert list(state) == list(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())


# OPT reshapes what its blocks return; nothing changes it in place.
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning")
def test_a_parallel_adapter_whose_ends_are_two_modules():
    """OPT's fc1 hands its input to the adapter on fc2."""
    opt = {"model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0}
    plain, sharded = (applied("llama", "adapter-parallel", **opt) for _ in range(2))
    for model in (plain, sharded):
        perturb(model)
    shard(sharded)
    for model in (plain, sharded):
        loss(model).backward()
    for name, parameter in trained(sharded).items():
        assert torch.equal(whole(parameter.grad), trained(plain)[name].grad), name


@every_section
def test_weights_gathered_in_bfloat16(case):
    """Masters stay float32 and get float32 gradients, within 5% of the norm of the float32 model's."""
    plain, model = applied("llama", case), applied("llama", case)
    for each in (plain, model):
        perturb(each)
    shard(model, torch.bfloat16)
    loss(plain).backward()
    loss(model).backward()
    for name, parameter in trained(model).items():
        gradient, expected = whole(parameter.grad), trained(plain)[name].grad
        assert parameter.dtype == gradient.dtype == torch.float32
        assert (gradient - expected).norm() <= 0.05 * expected.norm() + 1e-4, name


def test_a_bfloat16_base_with_float32_lora():
    """Frozen bfloat16 and trained float32 parameters in one group, gathered as they are."""
    model = applied("llama", "lora")
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    perturb(model)
    shard(model)
    loss(model).backward()
    for name, parameter in trained(model).items():
        assert whole(parameter.grad).dtype == torch.float32, name
        assert whole(parameter.grad).count_nonzero() > 0, name
