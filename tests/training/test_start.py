import pytest

from ftkit.recipe.load import dump_recipe, load_recipe, resolve
from ftkit.recipe.schema import TrainingSection
from ftkit.runs import ENVIRONMENT, RECIPE, STEPS, write_json
from ftkit.training.optim import learning_rate
from ftkit.training.start import agrees, lengthened
from tests.tiny_runs import write_recipe


@pytest.mark.parametrize(
    ("begun", "now", "steps", "expected"),
    [
        ([], [], 6, True),
        ([], ["training.logging_steps=2"], 6, True),
        ([], ["output_dir=elsewhere"], 6, True),
        ([], ["training.report_to=[wandb]", "training.project=mine", "training.run_name=first"], 6, True),
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


def test_what_a_longer_run_does_with_the_schedule():
    section = TrainingSection(learning_rate=1e-3, warmup_steps=0, eval_steps=0.25)
    after, before, last = (learning_rate(*at, section) for at in ((40, 60), (39, 40), (59, 60)))
    assert lengthened(section, 40, 40, 60) == [
        f"the run has 60 steps in place of 40, and its schedule is stretched: step 41 learns at {after:.2e}, step 40"
        f" did at {before:.2e}; step 60 will at {last:.2e}",
        "training.eval_steps: 0.25 of the run is every 15 steps now, it was every 10",
    ]
    # The middle of a cosine, worked out by hand: 1e-3 * (1 + cos(pi * 2 / 4)) / 2.
    (halfway,) = lengthened(section, 2, 3, 4)
    assert "step 3 learns at 5.00e-04, in the run of 3 steps it does at 2.50e-04; step 4 will at 1.46e-04" in halfway


def test_a_constant_rate_stays_once_it_is_warm():
    section = TrainingSection(learning_rate=1e-3, lr_scheduler_type="constant", warmup_steps=0.1, eval_steps=5)
    assert lengthened(section, 40, 40, 60) == ["the run has 60 steps in place of 40: its learning rate stays 1.00e-03"]
    (cold,) = lengthened(section, 4, 40, 80)
    assert "step 5 learns at 6.25e-04, in the run of 40 steps it does at 1.00e-03; step 80 will at 1.00e-03" in cold
