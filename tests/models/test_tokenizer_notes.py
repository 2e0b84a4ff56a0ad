"""Tokens that the base was never trained on."""

import torch

from ftkit.models.tokenizer import untrained_tokens
from tests.tiny_models import tiny_model, tiny_tokenizer


def test_an_embedding_that_other_tokens_have_too_is_told() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    end, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|pad|>"])
    assert untrained_tokens(model, tokenizer, [end]) == ()
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight[pad] = weight[end]
    (note,) = untrained_tokens(model, tokenizer, [end])
    assert note.startswith("the embedding of <|im_end|> is that of 1 other tokens too")
