"""After which steps a run logs, evaluates and saves."""

import pytest

from ftkit.recipe.schema import TrainingSection
from ftkit.training.cadence import Cadence


def steps(cadence: Cadence, what: str) -> list[int]:
    return [step for step in range(cadence.total + 1) if getattr(cadence, what)(step)]


def cadence(total: int, *, validated: bool = True, **section: object) -> Cadence:
    return Cadence.of(TrainingSection.model_validate(section), total, validated=validated)


def test_lines_come_every_few_steps_and_after_the_last():
    assert steps(cadence(12, logging_steps=5), "logs_after") == [5, 10, 12]
    assert cadence(100).log_every == 1
    assert cadence(550).log_every == 5
    assert cadence(5000).log_every == 10


def test_saves_fall_on_evaluations():
    both = cadence(23, eval_steps=4, save_steps=8)
    assert steps(both, "evaluates_after") == [4, 8, 12, 16, 20, 23]
    assert steps(both, "saves_after") == [8, 16, 23]
    # Shares: 10% of 55 steps are 6, and 25% are 14, which is rounded to 12.
    shares = cadence(55, eval_steps=0.1, save_steps=0.25)
    assert set(steps(shares, "saves_after")) <= set(steps(shares, "evaluates_after"))
    assert shares.save_every == 12


def test_without_validation_rows_saves_stand_alone():
    alone = cadence(10, validated=False, eval_steps=4, save_steps=3)
    assert steps(alone, "evaluates_after") == []
    assert steps(alone, "saves_after") == [3, 6, 9, 10]


@pytest.mark.parametrize(("total", "every"), [(10, 4), (12, 4), (3, 5), (7, 1), (10, None)])
def test_evaluations_that_are_left(total, every):
    cadence = Cadence(total, 1, every, total)
    for step in range(total + 1):
        expected = sum(cadence.evaluates_after(later) for later in range(step + 1, total + 1))
        assert cadence.evaluations_left(step) == expected
