"""The batches that this process runs through the model."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from ftkit.data.batches import Batch, collate
from ftkit.data.plan import Plan
from ftkit.data.types import EncodedExample
from ftkit.distributed import World


@dataclass(frozen=True)
class Feed:
    """Cuts the plan into this process's micro-batches, and counts what it handed out."""

    plan: Plan
    world: World
    max_tokens: int
    """Tokens of a micro-batch on one device."""
    packed: bool
    pad_id: int
    prompt_ids: tuple[int, ...] = ()
    """Of the soft prompt that comes before every document."""
    tokens_run: Counter[str] = field(default_factory=Counter)
    """Tokens handed out in this process, padding included: `training` and `evaluation`."""

    def training(self, step: int) -> Iterator[tuple[Batch, bool]]:
        """The micro-batches of step `step`, counted from 0, each with whether it is the last; as many on every rank."""
        parts = self.plan.micro_batches(
            step,
            rank=self.world.rank,
            world_size=self.world.size,
            max_tokens=self.max_tokens,
            packed=self.packed,
            before_each=len(self.prompt_ids),
        )
        for index, examples in enumerate(parts):
            yield self._batch(examples, "training"), index == len(parts) - 1

    def validation(self, name: str) -> Iterator[Batch]:
        """The batches of a validation set; as many on every rank."""
        parts = self.plan.validation_batches(
            name,
            rank=self.world.rank,
            world_size=self.world.size,
            max_tokens=self.max_tokens,
            packed=self.packed,
            before_each=len(self.prompt_ids),
        )
        for examples in parts:
            yield self._batch(examples, "evaluation")

    def total_tokens_run(self) -> dict[str, int]:
        """`tokens_run` of all processes together. A collective."""
        parts = self.world.gather(dict(self.tokens_run))
        return {kind: sum(part.get(kind, 0) for part in parts) for kind in ("training", "evaluation")}

    def _batch(self, examples: list[EncodedExample], kind: str) -> Batch:
        batch = collate(examples, packed=self.packed, pad_id=self.pad_id, prompt_ids=self.prompt_ids)
        batch = batch.to(self.world.device)
        self.tokens_run[kind] += batch.input_ids.numel()
        return batch
