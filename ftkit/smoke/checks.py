"""What a smoke run checks of a finished training: that it can go on, be merged, and be loaded again."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ftkit.artifacts.adapters import WeightedAdapter
from ftkit.artifacts.merge import merge
from ftkit.errors import CheckFailedError, UserError
from ftkit.evaluation.contestants import load_contestants
from ftkit.methods.beside import prompt_length
from ftkit.models.attention import attend_to_prompts
from ftkit.models.files import hash_files, stored_dtype
from ftkit.models.load import choose_compute_dtype, load_weights
from ftkit.models.precision import compute_in
from ftkit.models.soft_prompt import prompt_ids
from ftkit.runs import CHECKPOINTS, MERGED, METRICS, find_target, result_of
from ftkit.smoke.watch import Watch
from ftkit.training.checkpoint import find_damage, list_checkpoints

CPU = torch.device("cpu")
MAX_TOKENS = 64
"""Of the row that logits are compared on."""
KEY = ("method", "type")


@dataclass(frozen=True)
class Finished:
    """What a training left behind."""

    steps: list[dict[str, Any]]
    """Lines of metrics.jsonl, one a step, without `timing`."""
    evaluations: list[dict[str, Any]]
    """Likewise, one an evaluation."""
    weights: str
    """SHA-256 of the result."""


def read_finished(run: Path) -> Finished:
    """What the run says of itself, and the hash of what it hands over."""
    lines = [json.loads(line) for line in (run / METRICS).read_text(encoding="utf-8").splitlines()]
    lines = [{name: value for name, value in line.items() if name != "timing"} for line in lines]
    weights = hash_files(sorted(result_of(run).glob("*.safetensors")))
    return Finished(
        [line for line in lines if "loss" in line], [line for line in lines if "eval_loss" in line], weights
    )


def check_saved(run: Path, steps: int) -> str:
    """Check that every step's checkpoint is whole.

    Raises:
        CheckFailedError: one is missing or damaged.
    """
    found = list_checkpoints(run / CHECKPOINTS)
    if len(found) != steps:
        raise CheckFailedError(f"{len(found)} checkpoints are there, {steps} were to be written")
    for path in found:
        if (damage := find_damage(path)) is not None:
            raise CheckFailedError(f"the checkpoint {path.name} is damaged: {damage}")
    return f"{steps} checkpoints, all files as their manifests say"


def check_resumed(before: Finished, whole: Watch, after: Finished, resumed: Watch, *, since: int) -> str:
    """Check that a run which went on after step `since` is, bit for bit, the one that was never interrupted.

    Raises:
        CheckFailedError: it trained on other data, or came to other losses or weights.
    """
    for step in range(since + 1, len(before.steps) + 1):
        if whole.batches[step] != resumed.batches[step]:
            what = f"after the resume step {step} trained on other data than in the run without interruption"
            raise CheckFailedError(what, how="the order of the rows must follow from the recipe and its seed alone")
    for name, one, other in (
        ("step", before.steps, after.steps),
        ("evaluation", before.evaluations, after.evaluations),
    ):
        if len(one) != len(other):
            raise CheckFailedError(f"the resumed run recorded {len(other)} {name}s, the other one {len(one)}")
        for left, right in zip(one, other, strict=True):
            if left != right:
                differing = next(key for key in left if left[key] != right.get(key))
                what = f"after the resume {differing} of the {name} after step {left['step']} is {right.get(differing)}"
                raise CheckFailedError(f"{what}, and {left[differing]} without interruption")
    if before.weights != after.weights:
        raise CheckFailedError("the resumed run ends in other weights than the one without interruption")
    return f"from step {since} on: the same data, losses and weights, bit for bit"


def check_merge(run: Path, watch: Watch, *, stored_quantization: str | None) -> tuple[str, str]:
    """Merge the run, or see that it is refused where its method cannot be merged; returns outcome and words.

    Args:
        stored_quantization: what the real base is stored in; into numbers of few bits nothing can be merged.

    Raises:
        FtkitError: the merge or its proof failed.
        CheckFailedError: a merge that cannot be was not refused.
    """
    if stored_quantization is not None:
        return "refused", f"the base is stored in {stored_quantization}, into which nothing can be merged"
    adapter = WeightedAdapter(find_target(str(run), offline=True), 1.0)
    section = watch.prepared.recipe.method
    unmergeable = watch.built.method.merge_refusal is not None or prompt_length(section) is not None
    try:
        report = merge([adapter], run / MERGED)
    except UserError as error:
        if not unmergeable:
            raise
        return "refused", error.problems[0].what
    if unmergeable:
        raise CheckFailedError(f"a merge of {section.type} was not refused", key=KEY)
    return "passed", f"{report.tensors_changed} weights; logits differ by {report.max_abs_logit_difference or 0.0:.1e}"


@torch.no_grad()
def check_reload(run: Path, watch: Watch) -> str:
    """Load the result anew, an adapter as `ftkit eval` does, and compare its logits with the trained model's.

    Raises:
        CheckFailedError: they differ.
    """
    prepared, trained = watch.prepared, watch.built.model
    dtype, _ = choose_compute_dtype(prepared.recipe.model.dtype, CPU)
    target = find_target(str(run), offline=True, trust_remote_code=prepared.base.trust_remote_code)
    if watch.built.method.name == "full":
        # What trained in float32 is handed over in the base's precision; computing is then what training did.
        stored = stored_dtype(result_of(run))
        for parameter in trained.parameters():
            parameter.data = parameter.data.to(stored).to(parameter.dtype)
        loaded = load_weights(target.model, dtype=torch.float32)
        compute_in(loaded, dtype)
    else:
        (contestant,) = load_contestants([target], mode="raw", dtype=dtype, device=CPU)
        loaded = contestant.model
    example = prepared.plan.examples[prepared.plan.steps[0][0]].example
    ids = torch.from_numpy(example.input_ids[:MAX_TOKENS].astype("int64"))[None]
    expected, got = _logits(trained, ids), _logits(loaded, ids)
    difference = float((expected - got).abs().max())
    if not difference <= 0.0:
        what = f"the result, loaded again, gives other logits than the trained model (off by {difference:.1e})"
        raise CheckFailedError(what)
    return f"equal logits over {ids.shape[1]} tokens"


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """float32 [1, T, V], in one and the same attention."""
    # That of packed rows wants the bounds of documents.
    model.set_attn_implementation("eager")
    attend_to_prompts(model)
    before = torch.tensor([prompt_ids(model)], dtype=ids.dtype)
    logits: Tensor = model.eval()(input_ids=torch.cat([before, ids], dim=1), use_cache=False).logits
    return logits.float()
