"""Embedding and head with rows of their own for new tokens, against the same model with a larger table."""

import copy

import pytest
import torch
from torch import nn

from ftkit.errors import UserError
from ftkit.models.loss import chunked_cross_entropy
from ftkit.models.token_rows import owners, train_rows, with_rows
from tests.tiny_models import VOCAB_SIZE, tiny_model

IDS = {
    "in reserve": [300, 303, 319],
    "after the last": [VOCAB_SIZE, VOCAB_SIZE + 1, VOCAB_SIZE + 2],
    "both": [318, 319, VOCAB_SIZE],
}
ARCHITECTURES = ("llama", "qwen3", "gemma3", "gpt2")
"""Llama, Gemma 3 and GPT-2 tie embedding and head; Gemma's embedding scales what it looks up."""


def pair(architecture: str, ids: list[int], dtype: torch.dtype = torch.float32):
    """A model with rows as if they had trained, and the same with a table that holds them."""
    model = tiny_model(architecture).eval().requires_grad_(False)
    larger = copy.deepcopy(model)
    train_rows(model, ids)
    generator = torch.Generator().manual_seed(5)
    by_path = dict(owners(model))
    for rows in {owner.token_rows for owner in by_path.values()}:
        rows.data.add_(torch.randn(rows.shape, generator=generator))
    tables: dict[nn.Parameter, nn.Parameter] = {}
    for path, owner in by_path.items():
        module = larger.get_submodule(path)
        old = module.weight
        tables.setdefault(old, nn.Parameter(with_rows(old.data, owner.token_rows.data, owner.token_ids)))
        module.weight = tables[old]
    return model, larger


def tokens(ids: list[int]) -> torch.Tensor:
    """int64 [2, 9]: old ones and every new one."""
    old = torch.randint(0, 256, (2, 9 - len(ids)), generator=torch.Generator().manual_seed(7))
    return torch.cat([old[:, :3], torch.tensor([ids, ids[::-1]]), old[:, 3:]], dim=1)


@pytest.mark.parametrize("kind", IDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_and_gradients_are_those_of_a_larger_table(architecture: str, kind: str) -> None:
    ids = IDS[kind]
    model, larger = pair(architecture, ids)
    losses = []
    for one in (model, larger):
        logits = one(input_ids=tokens(ids)).logits
        assert logits.shape[-1] == max(VOCAB_SIZE, ids[-1] + 1)
        losses.append(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens(ids)[:, 1:].flatten()))
        losses[-1].backward()
    assert abs(losses[0] - losses[1]) <= 1e-6 * losses[1]
    for path, owner in owners(model):
        expected = larger.get_submodule(path).weight.grad[ids]
        assert (owner.token_rows.grad - expected).abs().max() <= 1e-6 * expected.abs().max()
        assert owner.weight.grad is None


@pytest.mark.parametrize("kind", IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [4, 64])
def test_the_loss_in_chunks_is_that_of_a_larger_head(kind: str, dtype: torch.dtype, chunk: int) -> None:
    ids, generator = torch.tensor(IDS[kind]), torch.Generator().manual_seed(1)
    table, rows = torch.randn(VOCAB_SIZE, 16, generator=generator), torch.randn(3, 16, generator=generator)
    hidden = torch.randn(10, 16, generator=generator).to(dtype).requires_grad_()
    targets = torch.tensor([3, *IDS[kind], 7, 7, 9, *IDS[kind]])
    rows.requires_grad_()
    sets = torch.zeros(10, dtype=torch.long)
    loss, _ = chunked_cross_entropy(hidden, table, None, targets, sets, 1, chunk, rows_KD=rows, ids_K=ids)
    ours = torch.autograd.grad(loss, (hidden, rows))
    larger = with_rows(table, rows.detach(), ids).requires_grad_()
    reference, _ = chunked_cross_entropy(hidden, larger, None, targets, sets, 1, chunk)
    in_hidden, in_table = torch.autograd.grad(reference, (hidden, larger))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert abs(loss - reference) <= tolerance * reference
    for one, other in zip(ours, (in_hidden, in_table[ids]), strict=True):
        assert one.dtype == other.dtype
        assert (one - other).abs().max() <= tolerance * other.abs().max()


def test_rows_start_from_the_mean_of_the_rows_of_the_tokens_before_them() -> None:
    """Reserved rows, from the first new token on, were never trained and do not count."""
    model = tiny_model("qwen3").requires_grad_(False)
    ids = IDS["in reserve"]
    train_rows(model, ids)
    assert len({id(owner.token_rows) for _, owner in owners(model)}) == 2
    for _, owner in owners(model):
        assert owner.token_rows.dtype == torch.float32
        assert torch.allclose(owner.token_rows, owner.weight[:300].mean(0).expand(3, -1))


def test_tied_modules_share_their_rows() -> None:
    model = tiny_model("llama").requires_grad_(False)
    train_rows(model, IDS["after the last"])
    assert [path for path, _ in owners(model)] == ["model.embed_tokens", "lm_head"]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["model.embed_tokens.token_rows"]
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_what_cannot_have_new_rows_is_refused() -> None:
    model = tiny_model("llama").requires_grad_(False)
    model.lm_head.bias = nn.Parameter(torch.zeros(VOCAB_SIZE))
    with pytest.raises(UserError, match="this model can get no new tokens: lm_head has a bias"):
        train_rows(model, [VOCAB_SIZE])
    with pytest.raises(UserError, match=r"new tokens \[400\] do not follow the last of 320 rows"):
        train_rows(tiny_model("llama").requires_grad_(False), [400])
    with pytest.raises(UserError, match=r"trains all of model\.embed_tokens, and model.add_tokens only the rows"):
        train_rows(tiny_model("llama"), [VOCAB_SIZE])
