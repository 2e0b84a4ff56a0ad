import pytest

from ftkit.recipe.load import dump_recipe, load_recipe, resolve
from ftkit.runs import ENVIRONMENT, RECIPE, STEPS, write_json
from ftkit.training.start import agrees
from tests.tiny_runs import write_recipe


@pytest.mark.parametrize(
    ("begun", "now", "steps", "expected"),
    [
        ([], [], 6, True),
        ([], ["training.logging_steps=2"], 6, True),
        ([], ["output_dir=elsewhere"], 6, True),
        ([], ["seed=1"], 6, False),
        ([], ["training.max_steps=8"], 8, True),
        ([], ["training.max_steps=4"], 4, False),
        # Epochs count where there are no steps; what they come to is known from the plan.
        (["training.max_steps=null"], ["training.max_steps=null", "training.num_train_epochs=9"], 9, True),
        (["training.max_steps=null"], ["training.max_steps=null", "training.num_train_epochs=1"], 3, False),
        ([], ["training.max_steps=null"], 30, True),
        ([], ["training.max_steps=null"], 5, False),
        ([], ["training.num_train_epochs=1"], 6, True),
        # The same recipe agrees although its data have become fewer: the plan's fingerprint will tell.
        ([], [], 5, True),
        ([], ["training.max_steps=8", "training.eval_steps=4"], 8, False),
    ],
)
def test_a_run_goes_on_with_the_same_recipe_or_a_longer_run_of_it(tmp_path, begun, now, steps, expected):
    path, run = write_recipe(tmp_path), tmp_path / "run"
    run.mkdir()
    (run / RECIPE).write_text(dump_recipe(resolve(load_recipe(path, begun))))
    write_json(run / ENVIRONMENT, {STEPS: 6})
    assert agrees(run, resolve(load_recipe(path, now)), steps=steps) is expected


def test_a_run_that_does_not_say_its_length_goes_on_at_that_length_only(tmp_path):
    path, run = write_recipe(tmp_path), tmp_path / "run"
    run.mkdir()
    (run / RECIPE).write_text(dump_recipe(resolve(load_recipe(path))))
    assert agrees(run, resolve(load_recipe(path)), steps=6)
    assert not agrees(run, resolve(load_recipe(path, ["training.max_steps=8"])), steps=8)
    (run / RECIPE).write_text("base_model: [")
    assert not agrees(run, resolve(load_recipe(path)), steps=6)
