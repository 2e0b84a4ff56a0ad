"""How fast is data prepared, and does its memory stay flat?

    python benchmarks/prepare.py MODEL [ROWS ...]

MODEL is a directory, hub id or .gguf file, of which only the tokenizer is used; ROWS are numbers of rows (default 10000
100000 1000000), made up on the spot: short conversations of 20 to 200 words. Each number is prepared in a process of
its own with an empty cache. Printed are rows and tokens a second, the largest amount of memory that belongs to the
processes alone (RssAnon: mapped files can be dropped at any time) above the import of the libraries, and the speed as a
share of what the tokenizer alone reaches when it encodes the same rendered texts in batches, on all cores.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from ftkit.console import Console, human_bytes, human_count, make_table

WORDS = [
    "the",
    "a",
    "model",
    "data",
    "set",
    "of",
    "train",
    "answer",
    "question",
    "river",
    "mountain",
    "city",
    "number",
    "table",
    "light",
    "water",
    "green",
    "small",
    "large",
    "quick",
    "write",
    "read",
    "send",
    "order",
    "price",
    "report",
    "letter",
    "market",
    "house",
    "music",
    "paper",
    "window",
    "garden",
    "winter",
    "summer",
]
RAW_BATCH = 1000


def write_rows(path: Path, count: int) -> None:
    """Rows in alpaca's form, no two alike."""
    generator = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            length = generator.randint(10, 100)
            words = generator.choices(WORDS, k=2 * length)
            row = {"instruction": " ".join([*words[:length], str(number)]), "output": " ".join(words[length:])}
            file.write(json.dumps(row) + "\n")


def prepare_here(model: str, rows: Path) -> None:
    """Prepare, and print the figures as JSON; runs in a process of its own."""
    import numpy as np

    from ftkit.recipe.load import load_recipe
    from ftkit.training.prepare import prepare

    recipe = rows.with_suffix(".yaml")
    recipe.write_text(
        f"base_model: {json.dumps(model)}\nmethod: {{type: lora}}\ntraining: {{num_train_epochs: 1}}\n"
        f"data: {{val_size: 0, train: [{{path: {json.dumps(str(rows))}}}]}}\n"
    )
    loaded = load_recipe(recipe)
    watch = MemoryWatch()
    started = time.perf_counter()
    prepared = prepare(loaded, Console(quiet=True), offline=False, trust_remote_code=False)
    seconds = time.perf_counter() - started
    memory = watch.stop()
    plan = prepared.plan
    # The tokenizer alone, on texts of the same rows: a sample of at most 20,000, in batches.
    sample = np.linspace(0, len(plan.examples) - 1, min(len(plan.examples), 20_000)).astype(int)
    ids = [plan.examples[int(index)].example.input_ids for index in sample]
    texts = [str(prepared.tokenizer.decode(part.tolist())) for part in ids]
    started = time.perf_counter()
    for start in range(0, len(texts), RAW_BATCH):
        prepared.tokenizer(texts[start : start + RAW_BATCH], add_special_tokens=False)
    raw = sum(map(len, ids)) / (time.perf_counter() - started)
    again = time.perf_counter()
    prepare(loaded, Console(quiet=True), offline=False, trust_remote_code=False)
    again = time.perf_counter() - again
    figures = {"rows": len(plan.examples), "tokens": plan.num_tokens, "seconds": seconds, "memory": memory}
    print(json.dumps(figures | {"raw_tokens_per_second": raw, "seconds_again": again}))


class MemoryWatch:
    """The largest RssAnon of this process and its children together, above what it is at the start."""

    def __init__(self) -> None:
        self._start = self._peak = _anonymous_bytes()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """Bytes."""
        self._end.set()
        self._thread.join()
        return self._peak - self._start

    def _watch(self) -> None:
        while not self._end.wait(0.05):
            self._peak = max(self._peak, _anonymous_bytes())


def _anonymous_bytes() -> int:
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    pids = ["self", *(children.read_text().split() if children.exists() else [])]
    total = 0
    for pid in pids:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))
    return total


def main() -> None:
    """Prepare every number of rows in a process of its own and print a table."""
    if sys.argv[1] == "--here":
        prepare_here(sys.argv[2], Path(sys.argv[3]))
        return
    counts = [int(text) for text in sys.argv[2:]] or [10_000, 100_000, 1_000_000]
    headers = ("rows", "tokens", "seconds", "rows/s", "tokens/s", "share of raw", "memory", "found again in")
    table = make_table("preparing data", [(header, "right") for header in headers])
    for count in counts:
        with tempfile.TemporaryDirectory() as directory:
            rows = Path(directory) / "rows.jsonl"
            write_rows(rows, count)
            environment = os.environ | {"FTKIT_CACHE": directory}
            command = [sys.executable, __file__, "--here", sys.argv[1], str(rows)]
            ended = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        figures = json.loads(ended.stdout.splitlines()[-1])
        speed = figures["tokens"] / figures["seconds"]
        table.add_row(
            human_count(figures["rows"]),
            human_count(figures["tokens"]),
            f"{figures['seconds']:.1f}",
            f"{figures['rows'] / figures['seconds']:,.0f}",
            f"{speed:,.0f}",
            f"{speed / figures['raw_tokens_per_second']:.2f}",
            human_bytes(figures["memory"]),
            f"{figures['seconds_again']:.1f} s",
        )
        Console().line(f"{human_count(count)} rows done", style="dim")
    Console().table(table)


if __name__ == "__main__":
    main()
