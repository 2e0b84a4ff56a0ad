from collections import Counter
from itertools import chain
from typing import Any

import numpy as np
import pytest

from ftkit.data import mixture
from ftkit.data.duplicates import content_key, groups_of
from ftkit.data.mixture import Source, choose_subset, draw_epoch, mixing_rates
from ftkit.data.store import KEY
from ftkit.data.types import Text
from ftkit.errors import UserError
from ftkit.recipe.schema import MixingSection


def keys(*texts: str) -> list[bytes]:
    return [content_key(Text(text)) for text in texts]


def distinct(name: str, size: int) -> list[bytes]:
    return keys(*(f"{name} {number}" for number in range(size)))


def split_validation(rows: list[list[bytes]], names: list[str], **keywords: Any) -> list[list[int]]:
    groups = groups_of([np.frombuffer(b"".join(part), KEY) for part in rows])
    return [places.tolist() for places in mixture.split_validation(groups, names, **keywords)]


# ------------------------------------------------------------------------------------------------------ subset


def test_subset_is_seeded_and_by_name() -> None:
    chosen = choose_subset(1000, 10, seed=1, name="a")
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 10
    assert chosen == choose_subset(1000, 10, seed=1, name="a")
    assert chosen != choose_subset(1000, 10, seed=2, name="a")
    assert chosen != choose_subset(1000, 10, seed=1, name="b")
    assert choose_subset(5, 10, seed=1, name="a") == choose_subset(5, None, seed=1, name="a") == [0, 1, 2, 3, 4]


# ------------------------------------------------------------------------------------------------------- split


@pytest.mark.parametrize("val_size", [0.1, 30])
def test_every_data_set_gives_its_share(val_size: float | int) -> None:
    out = split_validation([distinct("a", 200), distinct("b", 100)], ["a", "b"], val_size=val_size, seed=3)
    assert [len(positions) for positions in out] == [20, 10]
    assert all(positions == sorted(set(positions)) for positions in out)


def test_split_is_seeded_and_not_the_head_of_the_file() -> None:
    rows = [distinct("a", 200)]
    first = split_validation(rows, ["a"], val_size=0.1, seed=3)
    assert first == split_validation(rows, ["a"], val_size=0.1, seed=3)
    assert first != split_validation(rows, ["a"], val_size=0.1, seed=4)
    assert first != [list(range(20))]


@pytest.mark.parametrize("val_size", [0.05, 0.3, 40])
def test_equal_rows_stay_on_one_side(val_size: float | int) -> None:
    one = keys(*(f"Row {number % 40}" for number in range(200)))
    two = keys(*(f"row   {number}" for number in range(20, 80)))
    out = split_validation([one, two], ["one", "two"], val_size=val_size, seed=0)
    held_out = {rows[position] for rows, positions in zip([one, two], out, strict=True) for position in positions}
    trained = {
        rows[position]
        for rows, positions in zip([one, two], out, strict=True)
        for position in set(range(len(rows))) - set(positions)
    }
    assert held_out
    assert not held_out & trained
    assert sum(map(len, out)) <= (val_size if isinstance(val_size, int) else val_size * 260)


def test_at_most_500_rows_and_at_least_one() -> None:
    assert len(split_validation([distinct("a", 20_000)], ["a"], val_size=0.5, seed=0)[0]) == 500
    assert len(split_validation([distinct("a", 2000)], ["a"], val_size=900, seed=0)[0]) == 500
    assert sum(map(len, split_validation([distinct("a", 4), distinct("b", 4)], ["a", "b"], val_size=0.01, seed=0))) == 1
    assert split_validation([distinct("a", 4)], ["a"], val_size=0.0, seed=0) == [[]]
    # Pairs only: one pair is more than the share, but the least there is.
    assert len(split_validation([keys(*"aabbccdd")], ["a"], val_size=0.1, seed=0)[0]) == 2


def test_a_row_stays_to_train_on() -> None:
    assert split_validation([distinct("a", 1)], ["a"], val_size=0.5, seed=0) == [[]]
    assert split_validation([keys("a", "A", " a")], ["a"], val_size=0.5, seed=0) == [[]]
    out = split_validation([distinct("a", 1), distinct("b", 9)], ["a", "b"], val_size=0.9, seed=0)
    assert [len(positions) for positions in out] == [0, 8]
    with pytest.raises(UserError, match="10 validation rows leave none of 10 rows to train on"):
        split_validation([distinct("a", 10)], ["a"], val_size=10, seed=0)
    assert len(split_validation([distinct("a", 10)], ["a"], val_size=9, seed=0)[0]) == 9


# ------------------------------------------------------------------------------------------------------- draws

Rows = list[tuple[int, int]]
"""(data set, place) of each draw."""


def draw(
    sizes: list[int], weights: list[float], epochs: int, seed: int = 0, repeat: Any = None, **mixing: Any
) -> list[Rows]:
    section = MixingSection(**mixing)
    sources = [
        Source(f"set{index}", size, weight, repeat)
        for index, (size, weight) in enumerate(zip(sizes, weights, strict=True))
    ]
    drawn = [0] * len(sizes)
    drawn_epochs: list[Rows] = []
    for epoch in range(epochs):
        draws = draw_epoch(sources, section, epoch=epoch, drawn_before=drawn, seed=seed)
        drawn_epochs.append(list(zip(draws.dataset.tolist(), draws.position.tolist(), strict=True)))
        drawn = [before + sum(dataset == i for dataset, _ in drawn_epochs[-1]) for i, before in enumerate(drawn)]
    return drawn_epochs


def counts(rows: Rows, num_datasets: int) -> list[int]:
    found = Counter(dataset for dataset, _ in rows)
    return [found[dataset] for dataset in range(num_datasets)]


def test_concat_gives_every_row_once_an_epoch_in_another_order() -> None:
    first, second = draw([30, 20], [1.0, 5.0], epochs=2)
    everything = [(dataset, position) for dataset, size in enumerate([30, 20]) for position in range(size)]
    assert sorted(first) == sorted(second) == everything
    assert first != second
    assert first == draw([30, 20], [1.0, 5.0], epochs=1)[0]
    assert first != draw([30, 20], [1.0, 5.0], epochs=1, seed=1)[0]
    assert first[:30] != everything[:30]
    assert len({dataset for dataset, _ in first[:15]}) == 2


def test_proportional_is_by_size_up_to_the_cap() -> None:
    first, second = draw([10_000, 500, 80], [1.0, 1.0, 1.0], epochs=2, strategy="proportional", maximum=1000)
    assert counts(first, 3) == counts(second, 3) == [1000, 500, 80]
    # Other rows of the large one each epoch, all rows of the small ones.
    large = [{position for dataset, position in epoch if dataset == 0} for epoch in (first, second)]
    assert len(large[0]) == len(large[1]) == 1000
    assert not large[0] & large[1]
    assert {position for dataset, position in second if dataset == 2} == set(range(80))
    # FLAN's cap is the default.
    assert counts(draw([9000, 500], [1.0, 1.0], epochs=1, strategy="proportional")[0], 2) == [3000, 500]
    # weight multiplies the rate, epoch_size sets the sum.
    (weighted,) = draw([10_000, 500], [0.5, 2.0], epochs=1, strategy="proportional", maximum=1000)
    assert counts(weighted, 2) == [500, 1000]
    (sized,) = draw([10_000, 500], [1.0, 1.0], epochs=1, strategy="proportional", maximum=1000, epoch_size=300)
    assert counts(sized, 2) == [200, 100]


def test_temperature_evens_out_the_sizes() -> None:
    sources = [Source("large", 10_000), Source("small", 100)]

    def ratio(**mixing: Any) -> float:
        large, small = mixing_rates(sources, MixingSection(strategy="temperature", **mixing))
        assert large + small == pytest.approx(10_100)
        return float(large / small)

    assert ratio(temperature=1.0) == pytest.approx(100)
    assert ratio(temperature=2.0) == ratio() == pytest.approx(10)
    assert ratio(temperature=4.0) == pytest.approx(100**0.25)
    assert ratio(temperature=1.0, maximum=1000) == pytest.approx(10)


def test_fractions_of_a_row_are_right_on_average_and_keep_the_size() -> None:
    epochs = draw([1000, 1000, 1000], [1.0, 1.0, 0.05], epochs=200, strategy="weights", epoch_size=10)
    assert {len(epoch) for epoch in epochs} == {10}
    total = counts(list(chain(*epochs)), 3)
    assert [count / 2000 for count in total] == pytest.approx([1 / 2.05, 1 / 2.05, 0.05 / 2.05], abs=0.01)
    assert total[2] > 0


def test_repeat_limits_how_often_rows_are_used() -> None:
    epochs = draw([50, 400], [1.0, 1.0], epochs=4, strategy="weights", epoch_size=200, repeat=3)
    used = Counter(row for epoch in epochs for row in epoch if row[0] == 0)
    assert set(used.values()) == {3}
    assert [counts(epoch, 2) for epoch in epochs] == [[100, 100], [50, 100], [0, 100], [0, 100]]


def test_weights_are_rates() -> None:
    (draws,) = draw([100, 1000], [3.0, 1.0], epochs=1, strategy="weights", epoch_size=40_000)
    assert counts(draws, 2) == [30_000, 10_000]
    # Small sets repeat, and evenly: no row is drawn twice more often than another.
    times = Counter(position for dataset, position in draws if dataset == 0)
    assert max(times.values()) - min(times.values()) <= 1


def test_draws_go_on_where_the_epoch_before_stopped() -> None:
    epochs = draw([100, 100], [1.0, 1.0], epochs=3, strategy="weights", epoch_size=60)
    assert [len(draws) for draws in epochs] == [60, 60, 60]
    for dataset in (0, 1):
        walked = [position for number, position in chain(*epochs) if number == dataset]
        assert len(set(walked)) == len(walked)


def test_walks_are_shuffled_again() -> None:
    (draws,) = draw([50], [1.0], epochs=1, strategy="weights", epoch_size=100)
    first, second = [position for _, position in draws[:50]], [position for _, position in draws[50:]]
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second


def test_default_epoch_size_and_stopping() -> None:
    assert len(draw([30, 50], [1.0, 1.0], epochs=1, strategy="weights")[0]) == 80
    for stopping, whole in (("first_exhausted", any), ("all_exhausted", all)):
        (draws,) = draw([30, 5000], [1.0, 2.0], epochs=1, strategy="weights", stopping=stopping)
        for end, expected in ((len(draws), True), (len(draws) - 1, False)):
            seen = [len({position for number, position in draws[:end] if number == dataset}) for dataset in (0, 1)]
            assert whole([seen[0] == 30, seen[1] == 5000]) == expected
