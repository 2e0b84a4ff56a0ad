"""What is allowed but seldom meant: warnings of a plan, each with what to change."""

import math
from collections.abc import Sequence

from ftkit.data.chat import ChatTemplate
from ftkit.data.corpus import EncodedCorpus, Part, lengths_uncut
from ftkit.data.encode import Encoder
from ftkit.recipe.schema import DataSection, TrainingSection

FEW_STEPS, GOOD_STEPS = 50, 100
"""Optimizer steps below which a run hardly learns, and what the warning aims at."""

MAX_SHARE_CUT = 0.01
"""Share of rows that may be too long without a warning."""


def warn_cut(encoded: Sequence[EncodedCorpus], encoder: Encoder) -> list[str]:
    """More than 1% of the rows are longer than `max_length`."""
    whole = [length for corpus in encoded for length in corpus.whole]
    incomplete = [document for corpus in encoded for document in corpus.incomplete]
    # Encoding them again without a limit is worth it only if there are enough of them.
    if len(incomplete) <= MAX_SHARE_CUT * (len(whole) + len(incomplete)):
        return []
    lengths = sorted(whole + lengths_uncut(incomplete, encoder))
    too_long = sum(length > encoder.max_length for length in lengths)
    if too_long <= MAX_SHARE_CUT * len(lengths):
        return []
    enough = lengths[math.ceil((1 - MAX_SHARE_CUT) * len(lengths)) - 1]
    share = f"{too_long} of {len(lengths)} rows ({too_long / len(lengths):.0%})"
    return [f"{share} are longer than data.max_length {encoder.max_length}; {enough} keeps 99% whole"]


def warn_thinking(template: ChatTemplate, saw_reasoning: bool) -> list[str]:
    """A model that thinks is about to learn not to.

    Args:
        template: of the run.
        saw_reasoning: whether any row that is trained on has thoughts (`EncodeResult.has_thoughts`).
    """
    if saw_reasoning or not template.expects_thoughts:
        return []
    how = "train on rows with thoughts (reasoning_content, or <think>...</think> before the answer)"
    if template.knows_enable_thinking:
        how = f"set data.chat_template_kwargs: {{enable_thinking: false}}, or {how}"
    return [f"the chat template is a thinking model's, and no trained turn has thoughts: it would unlearn them; {how}"]


def warn_few_steps(steps: Sequence[Sequence[int]], training: TrainingSection) -> list[str]:
    """Few optimizer steps, though `max_steps` did not ask for them."""
    if len(steps) >= FEW_STEPS or training.max_steps is not None:
        return []
    num_examples = sum(len(step) for step in steps)
    if num_examples >= GOOD_STEPS:
        how = f"training.global_batch_size: {num_examples // GOOD_STEPS}"
    else:
        how = f"training.num_train_epochs: {math.ceil(GOOD_STEPS * training.num_train_epochs / len(steps))}"
    return [f"{len(steps)} optimizer steps are few; {how} gives at least {GOOD_STEPS}"]


def warn_weights(data: DataSection) -> list[str]:
    """Weights where the strategy has no rates."""
    weighted = [dataset.path for dataset in data.train if dataset.weight != 1.0]
    if data.mixing.strategy != "concat" or not weighted:
        return []
    return [f"weight of {', '.join(weighted)} has no effect; set data.mixing: {{strategy: weights}}"]


def warn_validation(trained: Sequence[Part], measured: Sequence[Part], data: DataSection) -> list[str]:
    """Rows that are measured and trained on, or a split that found no rows."""
    if not measured:
        return [] if data.val_size == 0 else ["too few different rows to split any off; there is no validation"]
    seen = {part.corpus.row_keys[position] for part in trained for position in part.positions}
    warnings = []
    for part in measured:
        shared = sum(part.corpus.row_keys[position] in seen for position in part.positions)
        if shared:
            warnings.append(
                f"{shared} of {len(part.positions)} rows of {part.corpus.name} (data.eval) are trained on too"
            )
    return warnings
