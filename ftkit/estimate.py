"""What a run will take, from its plan and the model's configuration alone: parameters, bytes, operations, tokens.

The model is built on the meta device, where it takes no memory whatever its size, with the method applied as in
training; its step is traced there (`training/traced.py`).
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ftkit.data.batches import Batch, collate
from ftkit.data.store import ExampleStore
from ftkit.methods.base import Report, report
from ftkit.methods.beside import notes_beside, state_beside
from ftkit.methods.table import METHODS
from ftkit.models.architecture import describe
from ftkit.models.attention import NAME, register
from ftkit.models.isolation import Isolation, choose_packing
from ftkit.models.kinds import Kind, kinds
from ftkit.models.load import choose_compute_dtype, stored_quantization
from ftkit.models.multimodal import auto_class
from ftkit.models.objective import Head, verify_head
from ftkit.models.quantization import quantize
from ftkit.models.small_copy import small_copy
from ftkit.models.soft_prompt import prompt_ids
from ftkit.training.budget import Budget, accumulates, first_budget, fullest_batch
from ftkit.training.build import set_for_training
from ftkit.training.cadence import Cadence
from ftkit.training.prepare import Prepared, PreparedModel, apply_method, pad_id
from ftkit.training.traced import TracedStep, lay_on_meta, meta_batch, trace_step

ADAMW_MOMENTS = 2
"""float32 tensors that AdamW keeps of each trained parameter."""
FLOAT32_BYTES = 4
HEAP_BYTES, HEAP_SHARE = 440 * 2**20, 0.08
"""What the C library's heap keeps in pieces on a CPU, beside activations and logits, and grows by with them.

Fitted to benchmarks/plan_vs_measured.py, see docs/fitting.md: no property of the code. What is small keeps less.
"""


@dataclass(frozen=True)
class Place:
    """What a run is to compute on."""

    device: torch.device
    """Of a kind that need not be there."""
    compute_dtype: torch.dtype
    processes: int = 1

    @classmethod
    def here(cls, prepared: PreparedModel, processes: int = 1) -> "Place":
        """This machine, in the precision that a run on it would choose."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return cls(device, choose_compute_dtype(prepared.recipe.model.dtype, device)[0], processes)

    @classmethod
    def gpu(cls, prepared: PreparedModel, processes: int = 1) -> "Place":
        """A GPU of today (sm80 or later), which need not be in this machine."""
        asked = prepared.recipe.model.dtype
        dtype = torch.float32 if asked == "float32" else torch.bfloat16
        return cls(torch.device("cuda"), dtype, processes)


@dataclass(frozen=True)
class Memory:
    """Bytes of one device at the fullest moment of a step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """What the backward pass needs, and what is soon freed; 0 where it could not be traced, like the next two."""
    logits: int
    """Logits of the targets and what the loss makes of them."""
    allocator: int
    """What the memory's management takes on top of the two before."""
    total: int = field(init=False)

    @property
    def state(self) -> int:
        """What is there however a batch is cut."""
        return self.weights + self.gradients + self.optimizer

    def __post_init__(self) -> None:
        object.__setattr__(self, "total", 0)
        object.__setattr__(self, "total", sum(vars(self).values()))


@dataclass(frozen=True)
class ModelEstimate:
    """What a model and a method come to, whatever the data."""

    parameters: int
    """Of the model, inserted ones included."""
    trainable_parameters: int
    kinds: tuple[Kind, ...]
    """The same by kind of block."""
    places: tuple[str, ...]
    """Where the method inserted modules, in words."""
    memory_bytes: Memory
    micro_batch: Budget
    micro_batch_tokens: int
    """Of the fullest one, which the memory is that of."""
    virtual_tokens: int
    """That come before every document."""
    result_bytes: int
    """On disk, of what is handed over."""
    notes: tuple[str, ...]
    """What the method wants to be known."""
    traced: TracedStep | None
    """None where the model's code asks for numbers that only a real step has."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        values = asdict(self)
        del values["traced"], values["virtual_tokens"]
        return values


@dataclass(frozen=True)
class Estimate(ModelEstimate):
    """What `ftkit plan` prints."""

    optimizer_steps: int
    tokens: int
    """That run through the model in training, over all epochs."""
    target_tokens: int
    """Of them, trained on."""
    flops: int | None
    """Floating-point operations of training and evaluation, all devices together; None where the step is not traced."""
    disk_bytes: int
    """Of the result and the checkpoints that are kept."""


@dataclass
class Estimator:
    """Estimates one recipe's model under several budgets; what does not depend on them is found once.

    Raises:
        UserError: the method finds no place in the model.
    """

    prepared: PreparedModel
    place: Place
    isolation: Isolation | None = None
    """How documents share a row; found on a small copy of the model where it is not given."""
    head: Head | None = None
    """How the loss makes logits; likewise."""
    _known: dict[Budget, ModelEstimate] = field(init=False, default_factory=dict)

    def estimate(self, budget: Budget | None = None) -> ModelEstimate:
        """Parameters and memory, of a plan's fullest micro-batch or, without one, of documents of `max_length`."""
        budget = first_budget(self.prepared.recipe, self.place.device) if budget is None else budget
        if budget not in self._known:
            self._known[budget] = self._estimate(budget)
        return self._known[budget]

    def _estimate(self, budget: Budget) -> ModelEstimate:
        prepared, recipe = self.prepared, self.prepared.recipe
        if self.isolation is None:
            self.isolation = choose_packing(
                prepared.config, packing=recipe.data.packing, requested=recipe.model.attn_implementation
            )
        model = model_on_meta(prepared, self.place.compute_dtype, self.isolation.attn_implementation)
        method = METHODS[recipe.method.type]
        counts = report(model, method, beside=state_beside(model, recipe.method))
        notes = (*method.notes(model), *notes_beside(recipe.method))
        found = kinds(model)
        batch, adds = self._batch(model, budget)
        traced, why_not = self._trace(model, batch, budget, adds)
        if why_not is not None:
            notes = (*notes, f"activations are not in the memory: {why_not}")
        return ModelEstimate(
            parameters=counts.total_parameters,
            trainable_parameters=counts.trainable_parameters,
            kinds=found,
            places=counts.places,
            memory_bytes=self._memory(model, counts, traced),
            micro_batch=budget,
            micro_batch_tokens=batch.input_ids.numel(),
            virtual_tokens=len(prompt_ids(model)),
            result_bytes=counts.saved_bytes,
            notes=notes,
            traced=traced,
        )

    def _batch(self, model: PreTrainedModel, budget: Budget) -> tuple[Batch, bool]:
        """The fullest micro-batch, and whether gradients of others of its step are there."""
        assert self.isolation is not None
        packed, prompt, prepared = self.isolation.packed, prompt_ids(model), self.prepared
        if not isinstance(prepared, Prepared):
            length = prepared.recipe.data.max_length
            documents = max(1, budget.max_tokens // length)
            return meta_batch(documents, length, packed=packed), True
        dealt: dict[str, Any] = {"world_size": self.place.processes, "max_tokens": budget.max_tokens}
        dealt |= {"packed": packed, "before_each": len(prompt)}
        examples = fullest_batch(prepared.plan, **dealt)
        batch = collate(examples, packed=packed, pad_id=pad_id(prepared.tokenizer), prompt_ids=prompt)
        # Several processes add their gradients up in buckets that stay.
        return batch.to("meta"), self.place.processes > 1 or accumulates(prepared.plan, **dealt)

    def _trace(
        self, model: PreTrainedModel, batch: Batch, budget: Budget, adds: bool
    ) -> tuple[TracedStep | None, str | None]:
        """The step, or why it cannot be traced."""
        assert self.isolation is not None
        prepared = self.prepared
        # Under FSDP weights of a full fine-tuning are gathered in the compute dtype; the casts are as large.
        set_for_training(model, checkpointing=budget.checkpointing, compute_in_dtype=self.place.compute_dtype)
        ours = self.isolation.attn_implementation == NAME
        try:
            if self.head is None:
                self.head, _ = verify_head(small_copy(prepared.config))
            return trace_step(model, batch, head=self.head, packed_attention=ours, accumulates=adds), None
        # Any model's code may ask for a number that a meta tensor has not, in any way.
        except Exception as error:
            return (
                None,
                f"the step of {prepared.config.model_type} cannot be traced ({str(error).splitlines()[0][:80]})",
            )

    def _memory(self, model: PreTrainedModel, counts: Report, traced: TracedStep | None) -> Memory:
        weights = sum(part.bytes for part in counts.precision)
        state = counts.trainable_parameters * FLOAT32_BYTES
        processes = self.place.processes
        gathered = 0
        if processes > 1 and self.prepared.recipe.training.parallel == "fsdp":
            # Each device keeps its share, and the blocks at work, this one and the next, whole.
            gathered = 2 * max(_bytes(block.parameters()) for block in describe(model).blocks)
            weights, state = weights // processes, state // processes
        activations, logits = (traced.activations, traced.logits) if traced is not None else (0, 0)
        held = activations + logits
        on_cpu = self.place.device.type == "cpu"
        allocator = int(min(HEAP_BYTES, 3 * held) + HEAP_SHARE * held) if on_cpu else 0
        return Memory(weights + gathered, state, state * ADAMW_MOMENTS, activations, logits, allocator)


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() * parameter.itemsize for parameter in parameters)


def model_on_meta(prepared: PreparedModel, compute_dtype: torch.dtype, attention: str | None = None) -> PreTrainedModel:
    """The model without numbers, with the method applied as in training.

    Raises:
        UserError: the method finds no place in the model.
    """
    register()
    method = METHODS[prepared.recipe.method.type]
    with torch.device("meta"):
        model = auto_class(prepared.config).from_config(
            prepared.config,
            dtype=torch.float32 if method.name == "full" else compute_dtype,
            trust_remote_code=prepared.base.trust_remote_code,
            **({} if attention is None else {"attn_implementation": attention}),
        )
    if (quantization := prepared.base.quantization or stored_quantization(prepared.config)) is not None:
        quantize(model, quantization)
    apply_method(model, _with_its_start(prepared))
    lay_on_meta(model)
    return model


def _with_its_start(prepared: PreparedModel) -> PreparedModel:
    """A run that has begun needs the adapter that it began with no more, and it may be gone."""
    recipe = prepared.recipe
    if recipe.method.type == "full" or prepared.init_from is not None:
        return prepared
    method = recipe.method.model_copy(update={"init_from": None})
    return replace(prepared, recipe=recipe.model_copy(update={"method": method}))


def count_parameters(prepared: PreparedModel) -> Report:
    """Count them alone, which takes no trace.

    Raises:
        UserError: the method finds no place in the model.
    """
    model = model_on_meta(prepared, torch.float32)
    section = prepared.recipe.method
    return report(model, METHODS[section.type], beside=state_beside(model, section))


def estimate_model(prepared: PreparedModel, place: Place | None = None) -> ModelEstimate:
    """Count a model's parameters and its bytes in training.

    Raises:
        UserError: the method finds no place in the model.
    """
    return Estimator(prepared, place or Place.here(prepared)).estimate()


def estimate(prepared: Prepared, model: ModelEstimate) -> Estimate:
    """What the whole run comes to, with what was found about its model."""
    plan, training = prepared.plan, prepared.recipe.training
    checkpoint = model.trainable_parameters * FLOAT32_BYTES * (1 + ADAMW_MOMENTS)
    return Estimate(
        **vars(model),
        optimizer_steps=len(plan.steps),
        tokens=plan.num_tokens,
        target_tokens=sum(plan.targets_per_step),
        flops=None if model.traced is None else _flops(prepared, model.traced, model.virtual_tokens),
        # The checkpoints of `save_total_limit`, the best one, and the result.
        disk_bytes=checkpoint * (training.save_total_limit + 1) + model.result_bytes,
    )


def _flops(prepared: Prepared, step: TracedStep, prompt: int) -> int:
    """Of every training step, and of the evaluations, which run forward only."""
    plan, section = prepared.plan, prepared.recipe.training
    counts = np.bincount(plan.steps.order, minlength=len(plan.examples))
    training = _flops_of(plan.examples, counts, step, prompt)
    validated = bool(plan.validation)
    cadence = Cadence.of(section, len(plan.steps), validated=validated)
    times = sum(map(cadence.evaluates_after, range(1, len(plan.steps) + 1))) + (validated and section.eval_on_start)
    views = plan.validation.values()
    measured = sum(_flops_of(v.store, np.bincount(v.indices, minlength=len(v.store)), step, prompt) for v in views)
    return round(training + times * measured * step.forward_share)


def _flops_of(examples: ExampleStore, counts: np.ndarray, step: TracedStep, prompt: int) -> float:
    """Of forward and backward pass of examples, each so many times."""
    tokens = examples.num_tokens.astype(np.float64) + prompt
    each = step.flops_per_token * tokens + step.flops_per_pair * tokens**2 / 2
    each += step.flops_per_target * examples.num_targets
    return float((counts * each).sum())
