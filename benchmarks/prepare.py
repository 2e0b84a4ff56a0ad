"""How fast is data prepared, and does its memory stay flat?

    python benchmarks/prepare.py [--cores N] MODEL [ROWS ...]

MODEL is a directory, hub id or .gguf file, of which only the tokenizer is used; ROWS are numbers of rows (default 10000
100000 1000000), made up on the spot: short conversations of 20 to 200 words. Each number is prepared in a process of
its own with an empty cache, from the loading of the tokenizer to the batches of every step. Printed are rows and tokens
a second, the largest amount of memory that belongs to the processes alone (RssAnon: mapped files can be dropped at any
time) above the import of the libraries, and the speed as a share of what the tokenizer alone reaches, called with
batches of the same rendered texts (the fastest of three passes).

Both sides have the same N cores (default: all that this process may use): the processes are pinned to them, and the
tokenizer has as many threads. In the last column the same share is of processor time instead of time: it does not
change with what else runs on the machine.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

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

    from ftkit.models.load import find_base
    from ftkit.recipe.load import load_recipe
    from ftkit.training.prepare import prepare

    recipe = rows.with_suffix(".yaml")
    recipe.write_text(
        f"base_model: {json.dumps(model)}\nmethod: {{type: lora}}\ntraining: {{num_train_epochs: 1}}\n"
        f"data: {{val_size: 0, train: [{{path: {json.dumps(str(rows))}}}]}}\n"
    )
    loaded = load_recipe(recipe)
    # What a .gguf file is converted to is no data.
    base = loaded.directory(("base_model",))
    find_base(loaded.recipe.base_model, loaded.recipe.model, base=base, offline=False, trust_remote_code=False)
    usage = Usage()
    prepared = prepare(loaded, Console(quiet=True), offline=False, trust_remote_code=False)
    usage.stop()
    plan = prepared.plan
    # The tokenizer alone, on texts of the same rows: a sample of at most 20,000, in batches.
    sample = np.linspace(0, len(plan.examples) - 1, min(len(plan.examples), 20_000)).astype(int)
    ids = [plan.examples[int(index)].example.input_ids for index in sample]
    texts = [str(prepared.tokenizer.decode(part.tolist())) for part in ids]
    passes = [_encode_raw(prepared.tokenizer, texts) for _ in range(3)]
    sampled = sum(map(len, ids)) / plan.num_tokens
    again = Usage()
    prepare(loaded, Console(quiet=True), offline=False, trust_remote_code=False)
    again.stop()
    figures = {"rows": len(plan.examples), "tokens": plan.num_tokens, "seconds": usage.seconds, "memory": usage.memory}
    figures |= {"share": min(wall for wall, _ in passes) / sampled / usage.seconds}
    figures |= {"cpu_share": min(cpu for _, cpu in passes) / sampled / usage.cpu_seconds}
    print(json.dumps(figures | {"seconds_again": again.seconds}))


def _encode_raw(tokenizer: Any, texts: list[str]) -> tuple[float, float]:
    usage = Usage()
    for start in range(0, len(texts), RAW_BATCH):
        tokenizer(texts[start : start + RAW_BATCH], add_special_tokens=False)
    usage.stop()
    return usage.seconds, usage.cpu_seconds


class Usage:
    """Time, processor time and memory from here to `stop`, of this process and all those that come of it."""

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0
        self.memory = 0
        """The largest RssAnon of all together, above what it is at the start."""
        self._clock = time.perf_counter()
        self._cpu_start, self._memory_start = _cpu_seconds("self"), _anonymous_bytes("self")
        self._cpu_of: dict[str, float] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._end.set()
        self._thread.join()
        self._look()
        self.seconds = time.perf_counter() - self._clock
        self.cpu_seconds = _cpu_seconds("self") - self._cpu_start + sum(self._cpu_of.values())

    def _watch(self) -> None:
        while not self._end.wait(0.05):
            self._look()

    def _look(self) -> None:
        others = _descendants(str(os.getpid()))
        # A process's last reading stands when it has ended.
        self._cpu_of |= {pid: _cpu_seconds(pid) for pid in others} | {
            pid: seconds for pid, seconds in self._cpu_of.items() if pid not in others
        }
        together = sum(map(_anonymous_bytes, ["self", *others]))
        self.memory = max(self.memory, together - self._memory_start)


def _descendants(pid: str) -> list[str]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [*children, *(pid for child in children for pid in _descendants(child))]


def _cpu_seconds(pid: str) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _anonymous_bytes(pid: str) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


def main() -> None:
    """Prepare every number of rows in a process of its own and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--here", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("model")
    parser.add_argument("rows", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    args = parser.parse_args()
    if args.here is not None:
        prepare_here(args.model, args.here)
        return
    cores = sorted(os.sched_getaffinity(0))[: args.cores]
    os.sched_setaffinity(0, cores)  # Of the processes started below, too.
    headers = ("rows", "tokens", "seconds", "rows/s", "tokens/s", "share of raw", "memory", "found again in", "of CPU")
    title = f"preparing data on {len(cores)} core{'s' if len(cores) > 1 else ''}"
    table = make_table(title, [(header, "right") for header in headers])
    for count in args.rows:
        with tempfile.TemporaryDirectory() as directory:
            rows = Path(directory) / "rows.jsonl"
            write_rows(rows, count)
            threads = {"RAYON_NUM_THREADS": str(len(cores)), "TOKENIZERS_PARALLELISM": "true"}
            environment = os.environ | threads | {"FTKIT_CACHE": directory}
            command = [sys.executable, __file__, args.model, "--here", str(rows)]
            ended = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        figures = json.loads(ended.stdout.splitlines()[-1])
        table.add_row(
            human_count(figures["rows"]),
            human_count(figures["tokens"]),
            f"{figures['seconds']:.1f}",
            f"{figures['rows'] / figures['seconds']:,.0f}",
            f"{figures['tokens'] / figures['seconds']:,.0f}",
            f"{figures['share']:.2f}",
            human_bytes(figures["memory"]),
            f"{figures['seconds_again']:.1f} s",
            f"{figures['cpu_share']:.2f}",
        )
        Console().line(f"{human_count(count)} rows done", style="dim")
    Console().table(table)


if __name__ == "__main__":
    main()
