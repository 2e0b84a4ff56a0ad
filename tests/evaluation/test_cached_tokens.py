from ftkit.evaluation.generation import CACHE_BYTES, MOST_TOKENS, cached_tokens
from tests.tiny_models import tiny_model


def test_large_models_get_smaller_batches_and_small_ones_no_more_than_the_limit():
    model = tiny_model("llama")
    assert cached_tokens(model) == MOST_TOKENS
    model.config.num_hidden_layers, model.config.num_key_value_heads, model.config.head_dim = 32, 32, 128
    # float32: keys and values of 32 layers, 32 heads of width 128.
    assert cached_tokens(model) == CACHE_BYTES // (2 * 32 * 32 * 128 * 4)
    model.config.num_key_value_heads = 8
    assert cached_tokens(model) == CACHE_BYTES // (2 * 32 * 8 * 128 * 4)
