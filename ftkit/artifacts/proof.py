"""The proof that a merged model computes what base and adapter compute, and what its precision costs.

Shape suffixes: T tokens, V vocabulary.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ftkit.artifacts.weights import same_bits
from ftkit.data.chat import ChatTemplate
from ftkit.data.types import Message
from ftkit.errors import CheckFailedError, UserError
from ftkit.methods.base import ComputeDelta, merged_weight

MAX_RELATIVE_DIFFERENCE = 1e-5
"""Of the largest absolute logit. In float32 a LoRA of 2% of the weights' norm differs by 3e-6 on SmolLM2-135M."""
ROUNDINGS, MOST_BY_ROUNDING = 2.0, 1e-3
"""Models with recurrent layers (Qwen 3.5) make more of a rounding: they may differ by so many times what one step of
float32 in every adapted weight does to their logits, and by so much of the largest logit at most."""

MAX_PROMPTS = 16
MAX_PROMPT_TOKENS = 512

TEXTS = (
    "Write a short, friendly reply to a customer whose parcel arrived three days late.",
    "What is 17 * 23? Show the steps.",
    'Turn this into JSON with the keys "name" and "city": Ana moved from Łódź to São Paulo in 2019.',
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Explain in two sentences why the sky is blue, then translate them into German.",
)
"""Prompts that ship with ftkit: prose, numbers, names beyond ASCII, code."""

Prompt = Sequence[int]
"""Token ids."""


@dataclass(frozen=True)
class Comparison:
    """How far two models' logits are apart, over all positions of all prompts."""

    max_abs_logit_difference: float
    max_abs_logit: float
    """Of the first model."""
    top1_agreement: float
    """Share of positions at which both find the same token most probable."""

    @property
    def relative(self) -> float:
        """Largest difference as a share of the largest logit."""
        return self.max_abs_logit_difference / self.max_abs_logit if self.max_abs_logit > 0 else 0.0


@torch.no_grad()
def compute_logits(model: PreTrainedModel, prompts: Sequence[Prompt]) -> list[Tensor]:
    """float32 [T, V] for each prompt, each run alone: padding alone changes logits by more than a merge may."""
    model.eval()
    return [model(input_ids=torch.tensor([list(ids)], device=model.device)).logits[0].float() for ids in prompts]


def compare(reference: Sequence[Tensor], other: Sequence[Tensor]) -> Comparison:
    """Compare the logits of two models on the same prompts."""
    pairs = list(zip(reference, other, strict=True))
    positions = sum(len(one_TV) for one_TV, _ in pairs)
    agreeing = sum(int((one_TV.argmax(-1) == two_TV.argmax(-1)).sum()) for one_TV, two_TV in pairs)
    return Comparison(
        max_abs_logit_difference=_largest(one_TV - two_TV for one_TV, two_TV in pairs),
        max_abs_logit=_largest(reference),
        top1_agreement=agreeing / positions,
    )


@torch.no_grad()
def fold(model: PreTrainedModel, deltas: Mapping[str, ComputeDelta]) -> None:
    """Add the deltas to the weights of a model in memory; a float32 one is the merged model before any rounding.

    Sums are float32, rounded once to the precision of the weight.
    """
    for name, delta in deltas.items():
        weight = model.get_parameter(name)
        # Not copied into the old one: rows of new tokens may follow it.
        weight.data = merged_weight(weight.float(), delta).to(weight)


@torch.no_grad()
def nudge(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Move every value of the float32 weights `names` to one of its two neighbours, up or down at random."""
    generator = torch.Generator().manual_seed(0)
    for name in names:
        weight = model.get_parameter(name)
        up = torch.rand(weight.shape, generator=generator) < 0.5
        infinite = torch.where(up, torch.inf, -torch.inf)
        weight.copy_(torch.nextafter(weight, infinite.to(weight)))


def check_logits(comparison: Comparison, rounding: Comparison | None = None) -> None:
    """Check adapted against merged logits, both float32.

    Args:
        rounding: merged model against itself with `nudge`d weights, where it is known.

    Raises:
        CheckFailedError: they differ by more than `MAX_RELATIVE_DIFFERENCE` and more than rounding explains, or are not
            finite.
    """
    allowed = MAX_RELATIVE_DIFFERENCE
    if rounding is not None:
        allowed = max(allowed, min(ROUNDINGS * rounding.relative, MOST_BY_ROUNDING))
    # "not <=" so that NaN fails too.
    if not comparison.relative <= allowed:
        raise CheckFailedError(
            f"the merged model's logits differ from the adapted model's by {comparison.max_abs_logit_difference:.3g} "
            f"where the largest is {comparison.max_abs_logit:.3g}; allowed are {allowed:.1g} of it",
            how="use the adapter without merging, and report this",
        )


def check_loaded(folded: PreTrainedModel, loaded: PreTrainedModel) -> None:
    """Check that the written directory, as transformers loads it, has the folded weights, cast.

    This closes the proof: names and layout in the files are those that the model takes them for.

    Raises:
        CheckFailedError: a parameter differs.
    """
    weights = dict(folded.named_parameters())
    for name, parameter in loaded.named_parameters():
        if not same_bits(parameter.detach(), weights[name].detach().to(parameter.dtype)):
            raise CheckFailedError(f"{name}, loaded from the merged directory, is not the merged weight")


def proof_prompts(
    tokenizer: PreTrainedTokenizerBase | None, chat_template_kwargs: Mapping[str, Any], extra: Sequence[Prompt]
) -> list[Prompt]:
    """The prompts that ship with ftkit, through the chat template where there is one, and some of the caller's."""
    prompts: list[Prompt] = [ids[:MAX_PROMPT_TOKENS] for ids in extra if len(ids) > 0][: MAX_PROMPTS - len(TEXTS)]
    if tokenizer is not None:
        texts: Sequence[str] = TEXTS
        special = True
        if tokenizer.chat_template:
            template = ChatTemplate(tokenizer, tokenizer.chat_template, chat_template_kwargs)
            texts = [template.generation_prompt([Message("user", text)]) for text in TEXTS]
            special = False
        prompts += [tokenizer(text, add_special_tokens=special).input_ids for text in texts]
    if not prompts:
        raise UserError("there is no tokenizer to make prompts for the proof", how="put one beside the adapter")
    return prompts


def _largest(tensors: Sequence[Tensor] | Iterator[Tensor]) -> float:
    return max(float(tensor.abs().max()) for tensor in tensors)
