import pytest

from benchmarks.peft_parity import ftkit_losses, peft_losses
from tests.tiny_runs import write_recipe


# peft asks transformers by the old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_twenty_steps_have_the_losses_of_peft(tmp_path, architecture):
    recipe = write_recipe(tmp_path, architecture=architecture, max_steps=20, eval_steps=20, global_batch_size=8)
    mine, theirs = ftkit_losses(recipe, []), peft_losses(recipe, [])
    assert len(mine) == 20
    # float32: sums in another order; both run on the same padded or packed tokens.
    assert mine == pytest.approx(theirs, abs=1e-4)
    assert mine[-1] < mine[0] - 0.5
