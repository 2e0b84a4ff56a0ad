"""What a smoke run sees of a training from inside: the batches that the model reads, and every gradient."""

import hashlib
import re
from collections import defaultdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ftkit.data.batches import Batch
from ftkit.errors import CheckFailedError
from ftkit.models.token_rows import ROWS
from ftkit.training.build import Built
from ftkit.training.prepare import Prepared

_EXPERT = re.compile(r"(experts?)\.\d+\.")


class Watch:
    """Hangs on a run that is about to start, changes nothing in it, and remembers."""

    prepared: Prepared
    built: Built

    def __init__(self) -> None:
        self.batches: dict[int, list[str]] = defaultdict(list)
        """Step, from 1 -> a digest of every micro-batch that it trained on, in order."""
        self.gradients: dict[int, dict[str, float]] = defaultdict(dict)
        """Step -> name of a trained tensor -> largest magnitude in its gradient; missing where it has none."""
        self.seen: set[int] = set()
        """Ids of the tokens that were trained on."""

    def __call__(self, prepared: Prepared, built: Built) -> None:
        """The `watch` of `train_here`."""
        self.prepared, self.built = prepared, built
        built.loop.objective.register_forward_pre_hook(self._note_batch)
        for name, parameter in built.loop.parameters.items():
            parameter.register_post_accumulate_grad_hook(partial(self._note_gradient, name))

    @property
    def _step(self) -> int:
        return self.built.state.step + 1

    def _note_batch(self, objective: nn.Module, args: tuple[Any, ...]) -> None:
        if not objective.training:
            return
        batch: Batch = args[0]
        digest = hashlib.sha256()
        for tensor in (batch.input_ids, batch.position_ids, batch.target_positions, batch.target_ids):
            digest.update(f"{list(tensor.shape)}".encode() + tensor.numpy(force=True).tobytes())
        self.batches[self._step].append(digest.hexdigest())
        self.seen |= set(batch.input_ids.flatten().tolist())

    def _note_gradient(self, name: str, parameter: Tensor) -> None:
        # Of several micro-batches the last one's call sees the sum.
        assert parameter.grad is not None, "it was just accumulated"
        self.gradients[self._step][name] = float(parameter.grad.detach().abs().max())

    def check_gradients(self) -> str:
        """Check that every trained tensor has had a finite gradient other than zero; returns what there is to know.

        Zero is right in the first step for what is multiplied by something that starts at zero (A of a LoRA, the inner
        half of a bottleneck, a prompt behind a gate), and in both for experts that no token chose, where others of
        their layer's have one, and for rows of new tokens that occur in none of the rows.

        Raises:
            CheckFailedError: one has not; the message has its name.
        """
        names, steps = list(self.built.loop.parameters), sorted(self.gradients)
        largest = {name: [self.gradients[step].get(name, 0.0) for step in steps] for name in names}
        if bad := [name for name, values in largest.items() if not torch.tensor(values).isfinite().all()]:
            raise CheckFailedError(f"the gradient of {_first(bad)} is not finite")
        zero = [name for name, values in largest.items() if not any(values)]
        used = {_EXPERT.sub(r"\1.*.", name) for name, values in largest.items() if any(values)}
        experts = [name for name in zero if _EXPERT.search(name) and _EXPERT.sub(r"\1.*.", name) in used]
        new = [name for name in zero if name.endswith(ROWS) and not self.seen & set(self.prepared.new_token_ids)]
        if missing := [name for name in zero if name not in {*experts, *new}]:
            raise CheckFailedError(
                f"{len(missing)} of {len(names)} trained tensors get no gradient: {_first(missing)}",
                how="train only what the model computes its logits with",
            )
        later = [name for name, values in largest.items() if values[0] == 0.0 and name not in zero]
        parts = [f"{len(names)} tensors"]
        parts += [f"{len(later)} from the second step on, since what they are multiplied by starts at zero"] * bool(
            later
        )
        parts += [f"{len(experts)} experts without tokens"] * bool(experts)
        parts += ["no row has one of the new tokens"] * bool(new)
        return ", ".join(parts)


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
