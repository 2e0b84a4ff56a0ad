"""Make the quickstart's data: customer messages to be turned into JSON.

    python recipes/quickstart/generate.py                                   # rewrites data/, byte for byte
    python recipes/quickstart/generate.py --shuffle-labels --output DIR     # a control: nothing to learn

A row is a phrasing (`words/phrasings.*.txt`) filled with a name, a city, a product and a quantity. Each list of values
is dealt to the two splits before any row is made, so the test split shares neither phrasings nor values with training.
"""

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

HERE = Path(__file__).parent
SEED = 20
NUM_ROWS = {"train": 1000, "test": 200}
TEST_SHARE = 0.25
"""Share of each list of values that only the test split uses."""
SYSTEM = "Extract name, quantity, product and city as JSON."

Values = dict[str, list[str]]
Message = dict[str, str]
T = TypeVar("T")


def main(argv: Sequence[str] | None = None) -> None:
    """Write train.jsonl and test.jsonl."""
    parser = argparse.ArgumentParser(description="Make the quickstart's data.")
    parser.add_argument("--output", type=Path, help="directory to write to (default: data/ beside this file)")
    parser.add_argument("--shuffle-labels", action="store_true", help="permute the training targets among the rows")
    options = parser.parse_args(argv)
    if options.shuffle_labels and options.output is None:
        parser.error("--shuffle-labels needs --output, or it would replace the shipped data")
    write_splits(options.output or HERE / "data", shuffle_labels=options.shuffle_labels)


def write_splits(directory: Path, *, shuffle_labels: bool = False) -> None:
    """Write both splits to `directory`, which is made where it is missing."""
    directory.mkdir(parents=True, exist_ok=True)
    for split, rows in make_splits(shuffle_labels=shuffle_labels).items():
        lines = (json.dumps({"messages": row}, ensure_ascii=False) + "\n" for row in rows)
        (directory / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")


def make_splits(*, shuffle_labels: bool = False) -> dict[str, list[list[Message]]]:
    """Rows by split; a row is a system message, the customer's message and the JSON object as the answer."""
    rng = random.Random(SEED)
    values = deal_values(rng)
    splits = {split: make_rows(split, values[split], rng) for split in NUM_ROWS}
    if shuffle_labels:
        splits["train"] = rotate_targets(shuffled(splits["train"], rng))
    return splits


def deal_values(rng: random.Random) -> dict[str, Values]:
    """Split every list of values into a part for training and a part for testing."""
    lists = {name: read_lines(name) for name in ("first_names", "surnames", "cities", "adjectives", "products")}
    lists["quantities"] = [str(number) for number in range(2, 100)]
    dealt: dict[str, Values] = {"train": {}, "test": {}}
    for name, entries in lists.items():
        deck = shuffled(entries, rng)
        num_test = round(TEST_SHARE * len(deck))
        dealt["test"][name], dealt["train"][name] = deck[:num_test], deck[num_test:]
    return dealt


def make_rows(split: str, values: Values, rng: random.Random) -> list[list[Message]]:
    """Fill the split's phrasings; every phrasing and every value turns up before one is used again."""
    decks = {name: endless(entries, rng) for name, entries in values.items()}
    phrasings = endless(read_lines(f"phrasings.{split}"), rng)
    rows = []
    for _ in range(NUM_ROWS[split]):
        target = {
            "name": f"{next(decks['first_names'])} {next(decks['surnames'])}",
            "quantity": int(next(decks["quantities"])),
            "product": f"{next(decks['adjectives'])} {next(decks['products'])}",
            "city": next(decks["cities"]),
        }
        turns = {
            "system": SYSTEM,
            "user": next(phrasings).format(**target),
            "assistant": json.dumps(target, ensure_ascii=False),
        }
        rows.append([{"role": role, "content": content} for role, content in turns.items()])
    return rows


def rotate_targets(rows: list[list[Message]]) -> list[list[Message]]:
    """Give each row the answer of the row before it: no row keeps its own."""
    return [[*row[:-1], before[-1]] for before, row in zip([rows[-1], *rows[:-1]], rows, strict=True)]


def endless(entries: Sequence[T], rng: random.Random) -> Iterator[T]:
    """Deal the entries in random order, again and again."""
    while True:
        yield from shuffled(entries, rng)


def shuffled(entries: Sequence[T], rng: random.Random) -> list[T]:
    """The entries in random order.

    Python promises the same numbers for ever only from `random()`, not from `shuffle` or `choice`.
    """
    return sorted(entries, key=lambda _: rng.random())


def read_lines(name: str) -> list[str]:
    """The lines of `words/NAME.txt`."""
    return (HERE / "words" / f"{name}.txt").read_text(encoding="utf-8").splitlines()


if __name__ == "__main__":
    main()
