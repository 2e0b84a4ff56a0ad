"""The traced step against real ones: the same bytes at the same moment, and operations counted by hand."""

import pytest
import torch
from torch import Tensor

from ftkit.data.batches import Batch, collate
from ftkit.data.types import IGNORE, EncodedExample, Example
from ftkit.methods.table import METHODS
from ftkit.models.attention import NAME, register
from ftkit.models.live_tensors import LiveTensors
from ftkit.models.multimodal import auto_class
from ftkit.models.objective import Objective, verify_head
from ftkit.recipe.method_schema import AdapterMethod, FullMethod, LoraMethod, PrefixMethod
from ftkit.training.build import set_for_training
from ftkit.training.traced import lay_on_meta, meta_batch, trace_step
from tests.tiny_models import tiny_config

SECTIONS = {
    "full": FullMethod(type="full"),
    "lora": LoraMethod(type="lora", rank=4, alpha=8.0),
    "dora": LoraMethod(type="lora", rank=4, alpha=8.0, dora=True),
    "adapter": AdapterMethod(type="adapter", bottleneck=8),
    "prefix": PrefixMethod(type="prefix", num_virtual_tokens=4),
}


def make(architecture: str, method: str, device: str, *, checkpointing: bool = False, dtype=torch.float32, **config):
    register()
    section = SECTIONS[method]
    stored = torch.float32 if method == "full" else dtype
    with torch.device(device):
        model = auto_class(tiny_config(architecture)).from_config(
            tiny_config(architecture, **config), dtype=stored, attn_implementation=NAME
        )
    METHODS[section.type].apply(model, section, seed=0)
    lay_on_meta(model) if device == "meta" else None
    set_for_training(model, checkpointing=checkpointing, compute_in_dtype=dtype)
    return model


def batch_of(lengths: list[int]) -> Batch:
    examples = []
    for length in lengths:
        ids = torch.arange(length).numpy().astype("int32") % 300
        labels = ids.copy()
        labels[: length // 2] = IGNORE
        examples.append(EncodedExample(Example(ids, labels), dataset=0, row=0))
    return collate(examples, packed=True, pad_id=0)


def real_peak(model, batch: Batch, *, accumulates: bool = True) -> int:
    """Bytes of what the step made, on the CPU, at its fullest moment; gradients are there before, or arise."""
    objective = Objective(model, num_datasets=1, packed_attention=True).train()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if accumulates and parameter.requires_grad else None
    known: list[Tensor] = [*model.parameters(), *model.buffers(), batch.input_ids, batch.position_ids]
    known += [p.grad for p in model.parameters() if p.grad is not None]
    known += [batch.target_positions, batch.target_ids, batch.target_datasets, batch.cu_seq_lens]
    with LiveTensors(known) as live:
        objective(batch).loss.backward()
    return max(live.live_bytes(lambda life: life.operation != ""))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", SECTIONS)
def test_the_bytes_are_those_of_a_real_step(method, checkpointing, dtype):
    batch = batch_of([60, 40, 28])
    measured = real_peak(make("llama", method, "cpu", checkpointing=checkpointing, dtype=dtype), batch)
    model = make("llama", method, "meta", checkpointing=checkpointing, dtype=dtype)
    traced = trace_step(model, batch.to("meta"), head="chunked", packed_attention=True)
    # Bounds and scalars are on the CPU in both; kernels of the CPU keep a few numbers of their own.
    assert traced.activations + traced.logits == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("lengths", [[60, 40, 28], [4]])
def test_gradients_that_arise_in_the_step(method, checkpointing, lengths):
    """With one micro-batch a step they are not there while activations are at their most."""
    batch = batch_of(lengths)
    real = make("llama", method, "cpu", checkpointing=checkpointing)
    measured = real_peak(real, batch, accumulates=False)
    gradients = sum(p.nbytes for p in real.parameters() if p.requires_grad)
    meta = make("llama", method, "meta", checkpointing=checkpointing)
    traced, beside = (
        trace_step(meta, batch.to("meta"), head="chunked", packed_attention=True, accumulates=accumulates)
        for accumulates in (False, True)
    )
    assert gradients + traced.activations + traced.logits == pytest.approx(max(measured, gradients), rel=0.02)
    assert traced.activations + traced.logits < beside.activations + beside.logits


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3", "mistral", "gpt2"])
def test_so_they_are_on_other_architectures(architecture):
    batch = batch_of([60, 40, 28])
    # Dropout, which gpt2 has, is another operation on a CPU.
    sizes = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0) if architecture == "gpt2" else {}
    real, meta = (make(architecture, "lora", device, **sizes) for device in ("cpu", "meta"))
    head, _ = verify_head(real, packed_attention=True)
    traced = trace_step(meta, batch.to("meta"), head=head, packed_attention=True)
    assert traced.activations + traced.logits == pytest.approx(real_peak(real, batch), rel=0.03)


def test_recomputed_activations_take_less():
    sizes = {"num_hidden_layers": 8, "vocab_size": 320}
    batch = batch_of([120, 100]).to("meta")
    kept, recomputed = (
        trace_step(
            make("llama", "lora", "meta", checkpointing=checkpointing, **sizes),
            batch,
            head="chunked",
            packed_attention=True,
        )
        for checkpointing in (False, True)
    )
    assert recomputed.activations < kept.activations / 2
    assert recomputed.flops_per_token > 1.3 * kept.flops_per_token


def test_operations_are_counted():
    """Full fine-tuning: two operations a weight and token forward, four backward; but for the first input's."""
    model = make("llama", "full", "meta")
    traced = trace_step(model, meta_batch(2, 64, packed=True), head="chunked", packed_attention=True)
    linear = sum(p.numel() for name, p in model.named_parameters() if "proj" in name)
    # Embeddings train, so the first layer's input has a gradient too.
    assert traced.flops_per_token == 6 * linear
    config = model.config
    # The head is not run again in the backward pass: its gradients are formed in the forward pass.
    assert traced.flops_per_target == 6 * config.hidden_size * config.vocab_size
    # Two products forward and five backward over the causal half, two operations each, in every layer.
    assert traced.flops_per_pair == 14 * config.hidden_size * config.num_hidden_layers
    of_pairs = 2 * 64**2 / 2 * config.hidden_size * config.num_hidden_layers
    head = config.hidden_size * config.vocab_size * 2 * 63
    forward, everything = 2 * linear * 128 + 2 * head + 4 * of_pairs, 6 * linear * 128 + 6 * head + 14 * of_pairs
    assert traced.forward_share == pytest.approx(forward / everything)


def test_the_model_is_left_as_it_was():
    model = make("llama", "lora", "meta")
    trace_step(model, meta_batch(1, 32, packed=True), head="chunked", packed_attention=True)
    assert all(parameter.grad is None for parameter in model.parameters())
