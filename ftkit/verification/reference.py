"""The trained model: the prompts that it was trained on, and what it thinks of others' answers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ftkit.data.encode import Encoder
from ftkit.errors import UserError
from ftkit.evaluation.contestants import chat_encoder, tokenizer_of
from ftkit.models.load import load_config
from ftkit.models.soft_prompt import prompt_ids
from ftkit.runs import Target
from ftkit.verification.conversations import Probe, make_probes
from ftkit.verification.sides import Answer

DEFAULT_CONTEXT = 2048
"""Tokens of a model whose configuration does not say."""


@dataclass(frozen=True)
class Parting:
    """A token of another's answer that is not the trained model's own choice after the same tokens."""

    place: int
    """Tokens of the answer before it."""
    taken: int | None
    """The token; None: the answer ended there."""
    favoured: int
    """What the trained model would have written."""
    taken_log_prob: float
    favoured_log_prob: float
    """By the trained model, natural logarithms."""

    @property
    def gap(self) -> float:
        """How much more the trained model thinks of its own choice: 0.7 is twice as probable."""
        return self.favoured_log_prob - self.taken_log_prob


@dataclass(frozen=True)
class Judged:
    """An answer, read by the trained model."""

    answer: Answer
    ids: tuple[int, ...]
    """Of its tokens, with the one that ended it."""
    partings: tuple[Parting, ...]
    runs_on: int | None
    """The place of a token that ends a turn, behind which the answer goes on; None: there is none."""

    @property
    def worst(self) -> Parting | None:
        """The parting with the widest gap."""
        return max(self.partings, key=lambda parting: parting.gap, default=None)


class Reference:
    """Tokenizer, template and options of the training; its model is handed in where it is needed."""

    def __init__(self, target: Target) -> None:
        """Load the tokenizer.

        Raises:
            UserError: there is no chat template, so that no server can know what to feed the model.
        """
        self.target = target
        self.tokenizer = tokenizer_of(target)
        if not self.tokenizer.chat_template:
            what = f"{target.label} has no chat template: there is nothing that a server would render"
            raise UserError(what, how="verify a run, or a model with a chat template")
        self.encoder: Encoder = chat_encoder(self.tokenizer, target.recipe, of_today=True)
        self.template = self.encoder.template
        context = getattr(load_config(target.model).get_text_config(), "max_position_embeddings", None)
        self.context: int = context or DEFAULT_CONTEXT
        eos = self.tokenizer.eos_token_id
        ends = self.template.end_of_turn_ids
        self.turn_ends: tuple[int, ...] = ends or (() if eos is None else (int(eos),))
        """Tokens that training ends a turn with."""
        self.end_ids: tuple[int, ...] = tuple(dict.fromkeys((*ends, *(() if eos is None else (int(eos),)))))
        """Tokens at which an answer is over, those included that only the tokenizer names."""

    def probes(self) -> list[Probe]:
        """The fixed conversations that its template renders."""
        names = (self.tokenizer.eos_token, self.tokenizer.bos_token, *map(self.token, self.turn_ends))
        words = tuple(dict.fromkeys(str(name) for name in names if name))
        return make_probes(
            self.template,
            words,
            system_prompt=self.encoder.system_prompt,
            count=lambda text: len(self.tokenizer(text, add_special_tokens=False).input_ids),
            context=self.context,
        )

    def prompt(self, probe: Probe) -> list[int]:
        """The ids that training has before an answer to this conversation."""
        return self.encoder.encode_prompt(probe.conversation, probe.name)

    def token(self, token_id: int) -> str:
        """A token's text."""
        return str(self.tokenizer.decode([token_id]))

    @torch.no_grad()
    def judge(self, model: PreTrainedModel, prompt: Sequence[int], answer: Answer) -> Judged:
        """Read an answer and note every token that the trained model would not have written in its place.

        So the whole answer is held against the model, and not only what comes before the first difference: the answer's
        own tokens are what the model goes on from.

        Args:
            model: the trained one, in eval mode.
            prompt: ids before the answer.
        """
        ids = self._ids(answer)
        ended = bool(ids) and (ids[-1] in self.end_ids or ids[-1] in self.tokenizer.all_special_ids)
        # None stands for an end that the answer tells in no token.
        written: list[int | None] = [*ids, *([None] if answer.stopped and not ended else [])]
        # A token that the model does not have, as another model's may be, is the last that can be weighed.
        size = model.config.get_text_config().vocab_size
        known = next((place for place, token in enumerate(ids) if token >= size), len(ids))
        row = torch.tensor([[*prompt_ids(model), *prompt, *ids[:known]]], device=model.device)
        logits_TV = model(input_ids=row, logits_to_keep=known + 1).logits[0].float()
        log_probs_TV = logits_TV.log_softmax(-1)
        partings = []
        for place, token in enumerate(written[: known + 1]):
            scores_V = log_probs_TV[place]
            favoured, end = int(scores_V.argmax()), scores_V[list(self.end_ids)].max()
            if token is None or token in self.end_ids:
                taken = end
            else:
                taken = scores_V[token] if token < len(scores_V) else scores_V.new_tensor(float("-inf"))
            if taken < scores_V[favoured]:
                partings.append(Parting(place, token, favoured, float(taken), float(scores_V[favoured])))
        runs_on = next((place for place, token in enumerate(ids[:-1]) if token in self.turn_ends), None)
        if runs_on is None and ids and ids[-1] in self.turn_ends and not answer.stopped:
            runs_on = len(ids) - 1
        return Judged(answer, ids, tuple(partings), runs_on)

    def _ids(self, answer: Answer) -> tuple[int, ...]:
        """The answer's tokens; of one that is known as text only, those that the tokenizer makes of it."""
        if answer.ids is not None:
            return answer.ids
        return tuple(self.tokenizer(answer.text, add_special_tokens=False).input_ids)
