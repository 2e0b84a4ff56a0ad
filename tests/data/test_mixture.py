from collections import Counter
from itertools import chain
from typing import Any

import pytest

from ftkit.data.mixture import Draw, choose_subset, draw_epoch, row_key, split_validation
from ftkit.errors import UserError
from ftkit.recipe.schema import MixingSection


def keys(*texts: str) -> list[bytes]:
    return [row_key({"text": text}, ["text"]) for text in texts]


def distinct(name: str, size: int) -> list[bytes]:
    return keys(*(f"{name} {number}" for number in range(size)))


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


def test_row_key_ignores_case_white_space_and_absence() -> None:
    one = row_key({"q": "What  is\nit?", "turns": [{"value": "A"}], "input": ""}, ["q", "turns", "input"])
    assert one == row_key({"q": " what is IT? ", "turns": [{"value": "a "}]}, ["q", "turns", "input"])
    assert one != row_key({"q": "what is it", "turns": [{"value": "a"}]}, ["q", "turns"])
    assert row_key({"q": "x", "id": 1}, ["q"]) == row_key({"q": "x", "id": 2}, ["q"])


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


def draw(sizes: list[int], weights: list[float], epochs: int, seed: int = 0, **mixing: Any) -> list[list[Draw]]:
    names, drawn = [f"set{index}" for index in range(len(sizes))], [0] * len(sizes)
    drawn_epochs = []
    for epoch in range(epochs):
        section = MixingSection(**mixing)
        draws = draw_epoch(sizes, names, weights, section, epoch=epoch, drawn_before=drawn, seed=seed)
        drawn = [before + sum(one.dataset == index for one in draws) for index, before in enumerate(drawn)]
        drawn_epochs.append(draws)
    return drawn_epochs


def test_concat_gives_every_row_once_an_epoch_in_another_order() -> None:
    first, second = draw([30, 20], [1.0, 5.0], epochs=2)
    everything = [(dataset, position) for dataset, size in enumerate([30, 20]) for position in range(size)]
    assert sorted(first) == sorted(second) == everything
    assert first != second
    assert first == draw([30, 20], [1.0, 5.0], epochs=1)[0]
    assert first != draw([30, 20], [1.0, 5.0], epochs=1, seed=1)[0]
    assert first[:30] != everything[:30]
    assert len({one.dataset for one in first[:15]}) == 2


def test_weights_are_rates() -> None:
    (draws,) = draw([100, 1000], [3.0, 1.0], epochs=1, strategy="weights", epoch_size=40_000)
    counts = Counter(one.dataset for one in draws)
    assert counts[0] / 40_000 == pytest.approx(0.75, abs=0.01)
    # Small sets repeat, and evenly: no row is drawn twice more often than another.
    times = Counter(one.position for one in draws if one.dataset == 0)
    assert max(times.values()) - min(times.values()) <= 1


def test_weights_go_on_where_the_epoch_before_stopped() -> None:
    epochs = draw([100, 100], [1.0, 1.0], epochs=3, strategy="weights", epoch_size=60)
    assert [len(draws) for draws in epochs] == [60, 60, 60]
    for dataset in (0, 1):
        walked = [one.position for one in chain(*epochs) if one.dataset == dataset]
        assert len(set(walked)) == len(walked)


def test_walks_are_shuffled_again() -> None:
    (draws,) = draw([50], [1.0], epochs=1, strategy="weights", epoch_size=100)
    first, second = [one.position for one in draws[:50]], [one.position for one in draws[50:]]
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second


def test_default_epoch_size_and_stopping() -> None:
    assert len(draw([30, 50], [1.0, 1.0], epochs=1, strategy="weights")[0]) == 80
    for stopping, whole in (("first_exhausted", any), ("all_exhausted", all)):
        (draws,) = draw([30, 5000], [1.0, 2.0], epochs=1, strategy="weights", stopping=stopping)
        for end, expected in ((len(draws), True), (len(draws) - 1, False)):
            seen = [len({one.position for one in draws[:end] if one.dataset == dataset}) for dataset in (0, 1)]
            assert whole([seen[0] == 30, seen[1] == 5000]) == expected
