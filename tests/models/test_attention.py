"""The attention function against attention written out with one mask over the whole row."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ftkit.data.batches import collate
from ftkit.models.attention import NAME, CallCounter, bounds_kwargs, document_attention, document_kwargs, register
from tests.models.batches import random_examples
from tests.tiny_models import CONFIGS, tiny_model

LENGTHS = [5, 1, 12, 3]
MODULE = nn.Module()


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """[1, H, T, D] and fewer key heads -> [1, T, H, D]."""
    groups, length = q.shape[1] // k.shape[1], q.shape[2]
    scores = q @ k.repeat_interleave(groups, 1).mT * scaling
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    document = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    place = torch.arange(length)
    seen = (document[:, None] == document) & (place[:, None] >= place)
    if window is not None:
        seen &= place[:, None] - place < window
    exponentials = torch.where(seen, scores, -torch.inf).exp()
    total = exponentials.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.view(1, -1, 1, 1).exp()
    return ((exponentials / total) @ v.repeat_interleave(groups, 1)).transpose(1, 2)


def random_qkv(num_key_heads: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads = (4, num_key_heads, num_key_heads)
    # The layout that models hand over: [1, T, heads, D] seen as [1, heads, T, D].
    tensors = [torch.randn(1, sum(LENGTHS), h, 8, generator=generator) for h in heads]
    return [tensor.to(dtype).requires_grad_().transpose(1, 2) for tensor in tensors]


def bounds(lengths: list[int] = LENGTHS) -> dict[str, Any]:
    return bounds_kwargs(torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32))


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window shorter than a document": {"sliding_window": 4},
    "window of a whole document": {"sliding_window": 12},
    "window of one token": {"sliding_window": 1},
    "soft-cap": {"softcap": 0.5},
    "sinks": {"s_aux": torch.tensor([0.3, -1.0, 2.0, 0.0], requires_grad=True)},
    "sinks and window": {"s_aux": torch.tensor([0.3, -1.0, 2.0, 0.0], requires_grad=True), "sliding_window": 3},
    "soft-cap and window": {"softcap": 0.5, "sliding_window": 2},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("num_key_heads", [4, 2, 1])
def test_outputs_and_gradients_are_exact(case: str, num_key_heads: int) -> None:
    keywords = CASES[case]
    q, k, v = random_qkv(num_key_heads)
    ours, weights = document_attention(MODULE, q, k, v, None, scaling=0.3, **keywords, **bounds())
    theirs = reference(q, k, v, 0.3, keywords.get("sliding_window"), keywords.get("softcap"), keywords.get("s_aux"))
    assert weights is None
    assert ours.shape == (1, sum(LENGTHS), 4, 8)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    inputs = [q, k, v, *([keywords["s_aux"]] if "s_aux" in keywords else [])]
    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    for mine, yours in zip(
        torch.autograd.grad(ours, inputs, direction), torch.autograd.grad(theirs, inputs, direction), strict=True
    ):
        torch.testing.assert_close(mine, yours, rtol=0, atol=5e-6)


def test_the_scale_defaults_to_the_root_of_the_width() -> None:
    q, k, v = random_qkv()
    for keywords in ({}, {"softcap": 1e6}):
        ours, _ = document_attention(MODULE, q, k, v, **keywords, **bounds())
        torch.testing.assert_close(ours, reference(q, k, v, 8**-0.5), rtol=0, atol=1e-5)


def test_bfloat16_in_bfloat16_out() -> None:
    q, k, v = random_qkv(dtype=torch.bfloat16)
    expected = reference(q.float(), k.float(), v.float(), 8**-0.5)
    for keywords in ({}, {"softcap": 1e6}, {"sliding_window": 100}):
        ours, _ = document_attention(MODULE, q, k, v, **keywords, **bounds())
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.float(), expected, rtol=0, atol=3e-2)


@pytest.mark.parametrize("keywords", [{}, {"softcap": 100.0}, {"sliding_window": 3}])
def test_dropout_keeps_the_expectation_and_follows_the_seed(keywords: dict[str, Any]) -> None:
    q, k, _ = random_qkv()
    ones = torch.ones_like(k)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return document_attention(MODULE, q, k, ones, dropout=0.5, **keywords, **bounds())[0][..., 0]

    with torch.random.fork_rng():
        many = torch.stack([run(seed).detach() for seed in range(400)])
        assert torch.equal(run(3), many[3])
    assert bool((many.std(0) > 0.1).all())
    # The first token of a document sees itself only: 0 or 2, a standard error of 0.05.
    torch.testing.assert_close(many.mean(0), torch.ones_like(many[0]), rtol=0, atol=0.25)


def test_it_refuses_what_it_cannot_compute() -> None:
    q, k, v = random_qkv()
    with pytest.raises(ValueError, match="no document bounds reached the attention"):
        document_attention(MODULE, q, k, v)
    with pytest.raises(ValueError, match="one packed row without a cache"):
        document_attention(MODULE, q[:, :, -1:], k, v, **bounds())
    with pytest.raises(ValueError, match="one packed row without a cache"):
        document_attention(MODULE, q, k, v, **bounds(LENGTHS[:-1]))
    with pytest.raises(ValueError, match="one packed row without a cache"):
        document_attention(MODULE, *(x.expand(2, -1, -1, -1) for x in (q, k, v)), **bounds())
    for keywords in (
        {"attention_mask": torch.ones(1, 1, 21, 21)},
        {"position_bias": torch.zeros(1, 4, 21, 21)},
        {"is_causal": False},
    ):
        with pytest.raises(ValueError, match="not supported"):
            document_attention(MODULE, q, k, v, **keywords, **bounds())


@pytest.mark.parametrize("architecture", CONFIGS)
def test_models_call_it_in_every_layer_with_the_bounds_of_the_batch(architecture: str) -> None:
    register()
    model = tiny_model(architecture)
    model.set_attn_implementation(NAME)
    batch = collate(random_examples([3, 20, 2]), packed=True, pad_id=0)
    calls = CallCounter()
    keywords = document_kwargs(batch)
    assert keywords["cu_seq_lens_q"].tolist() == [0, 3, 23, 25]
    assert keywords["max_length_k"] == 20
    model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        attention_calls=calls,
        **keywords,
    )
    assert calls.count == 2
    with pytest.raises(ValueError, match="no document bounds"):
        model(input_ids=batch.input_ids, use_cache=False)
