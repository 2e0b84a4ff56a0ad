"""The proof that documents packed into one row do not see each other, which decides how a model's batches are laid out.

Before training, documents are run packed and alone through a small random copy of the model (`small_copy.py`). Packing
is used only if three things hold:

1. every document's hidden states agree with those of the document alone, under the library's own attention;
2. the gradient of one document's hidden states with respect to another's input embeddings is exactly zero;
3. both fail clearly for a row whose bounds are wrong: the proof can tell.

It is computed on the CPU in float32; flash attention, whose kernels know neither, is proven on the GPU in bfloat16.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ftkit.errors import UserError
from ftkit.models.architecture import describe
from ftkit.models.attention import NAME, CallCounter, bounds_kwargs, register
from ftkit.models.quiet import quiet_transformers
from ftkit.models.small_copy import FIRST_TOKEN, VOCAB_SIZE, WINDOW, small_copy

LENGTHS = (3, 2 * WINDOW + 3, 1, 6)
"""Tokens of the documents of the proof; one is longer than any window."""
WRONG_LENGTHS = (5, 2 * WINDOW - 1, 2, 7)
"""Bounds of the control: none but the ends of the row is right."""
assert sum(LENGTHS) == sum(WRONG_LENGTHS)

FLASH = "flash_attention_2"
PACKING_KEY = ("data", "packing")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Arithmetic:
    """What a proof is computed in, and what counts as equal there."""

    device_type: str
    dtype: torch.dtype
    tolerance: float
    """Largest difference from the document alone, as a share of the largest hidden state."""
    clearly: float
    """A control fails clearly if it is off by more than this share."""


ON_CPU = Arithmetic("cpu", torch.float32, tolerance=1e-5, clearly=1e-3)
ON_GPU = Arithmetic("cuda", torch.bfloat16, tolerance=2e-2, clearly=1e-1)
"""For kernels that know neither float32 nor CPUs. Rounding to bfloat16 made differences of up to 6e-3 (the library's
other attentions, twelve architectures), wrong bounds and leaks 0.5 and more; a gradient of exactly zero is zero in any
precision."""


@dataclass(frozen=True)
class Isolation:
    """How documents are kept apart, and why so."""

    rung: Literal["ftkit", "position_ids", "padded"]
    """Document bounds in ftkit's attention; the library's own isolation by restarting position_ids; padded batches."""
    reason: str
    """For the header of a run."""
    attn_implementation: str | None
    """What to load the model with; None is the model's own choice."""
    figures: dict[str, float] = field(default_factory=dict)
    """`difference` from the documents alone and `leak` between documents, both relative, of the last rung tried, and
    the same of its `control`. Empty where no rung could be run."""

    @property
    def packed(self) -> bool:
        """Whether documents lie one after another in a single row."""
        return self.rung != "padded"


def choose_packing(
    config: PreTrainedConfig,
    *,
    packing: Literal["auto", "required", "off"],
    requested: str,
    device: torch.device = CPU,
) -> Isolation:
    """How to lay out batches, by the recipe's `data.packing` and `model.attn_implementation`.

    Args:
        config: of the model that is to be trained; left as it is.
        device: that it is to be trained on.

    Raises:
        UserError: packing is required and cannot be proven.
    """
    if packing == "off":
        own = None if requested in ("auto", NAME) else requested
        return Isolation("padded", "padded, as the recipe says (packing: off)", own)
    isolation = prove_isolation(config, requested=requested, device=device)
    if packing == "required" and not isolation.packed:
        how = "packing: auto" if requested in ("auto", NAME) else "attn_implementation: auto, or packing: auto"
        raise UserError(
            f"packing is required but {isolation.reason.removeprefix('padded: ')}", how=how, key=PACKING_KEY
        )
    return isolation


def prove_isolation(config: PreTrainedConfig, *, requested: str = "auto", device: torch.device = CPU) -> Isolation:
    """The highest rung on which a small copy of the model keeps packed documents apart.

    Args:
        config: of the model that is to be trained; left as it is.
        requested: the recipe's `model.attn_implementation`. `auto` and `ftkit` begin with ftkit's attention, the
            library's own names with restarting position_ids.
        device: that it is to be trained on. Flash attention is proven there, in bfloat16, all else on the CPU.
    """
    quiet_transformers()
    own = None if requested in ("auto", NAME) else requested
    arithmetic, place = (ON_GPU, device) if own == FLASH else (ON_CPU, CPU)
    if place.type != arithmetic.device_type:
        return Isolation("padded", f"padded: the proof of packing cannot run {own} on a {place.type.upper()}", own)
    try:
        # transformers types its own `to` for quantized models only.
        model = small_copy(config)
        nn.Module.to(model, place, arithmetic.dtype)
        if own is not None:
            model.set_attn_implementation(own)
        documents = [document.to(place) for document in _documents()]
        alone = [_run(model, document, {}).hidden_TD.detach() for document in documents]
    # Any model's code may fail in any way on a configuration that was cut.
    except Exception as error:
        return Isolation("padded", f"padded: packing cannot be proven on a small copy ({_in_words(error)})", own)

    tried: list[str] = []
    figures: dict[str, float] = {}
    rungs: tuple[Literal["ftkit", "position_ids"], ...] = ("ftkit", "position_ids")
    for rung in rungs if own is None else rungs[1:]:
        try:
            figures, failure = _try_rung(model, rung, documents, alone, arithmetic)
        except Exception as error:
            failure = _in_words(error)
        if failure is None:
            how = "document bounds in ftkit's attention" if rung == "ftkit" else "restarting position_ids"
            proven = "proven" if arithmetic is ON_CPU else f"proven with {own}"
            reason = f"packed, kept apart by {how} ({proven}: off by {figures['difference']:.0e}, leak 0)"
            return Isolation(rung, "; not by ".join([reason, *tried]), NAME if rung == "ftkit" else own, figures)
        tried.append(f"{'document bounds' if rung == 'ftkit' else 'position_ids'}: {failure}")
    return Isolation("padded", f"padded: packed documents are not kept apart ({'; '.join(tried)})", own, figures)


class _Run(NamedTuple):
    hidden_TD: Tensor
    embedded_BTD: Tensor
    """The output of the token embedding [1, T, D], which gradients are taken with respect to."""


def _documents() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(FIRST_TOKEN, VOCAB_SIZE, (length,), generator=generator) for length in LENGTHS]


def _run(model: PreTrainedModel, ids_T: Tensor, kwargs: dict[str, Any]) -> _Run:
    """Run the backbone on one row. Its input ids stay in use: some models look them up in a second table."""
    architecture = describe(model)
    embedded: list[Tensor] = []

    def cut_here(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    hook = architecture.embeddings.register_forward_hook(cut_here)
    try:
        hidden_BTD = architecture.backbone(input_ids=ids_T[None], use_cache=False, **kwargs).last_hidden_state
    finally:
        hook.remove()
    assert len(embedded) == 1, "the token embedding is used once"
    return _Run(hidden_BTD[0], embedded[0])


def _try_rung(
    model: PreTrainedModel, rung: str, documents: list[Tensor], alone: list[Tensor], arithmetic: Arithmetic
) -> tuple[dict[str, float], str | None]:
    """The figures of one rung, and why it does not hold, or None."""
    before, calls = model.config._attn_implementation, CallCounter()
    if rung == "ftkit":
        register()
        model.set_attn_implementation(NAME)
    try:
        row = torch.cat(documents)
        difference, leak = _compare(_run(model, row, _packed_kwargs(rung, LENGTHS, calls, row.device)), alone)
        wrong = _run(model, row, _packed_kwargs(rung, WRONG_LENGTHS, calls, row.device))
        control_difference, control_leak = _compare(wrong, alone)
    finally:
        model.set_attn_implementation(before)
    figures = {"difference": difference, "leak": leak}
    figures |= {"control_difference": control_difference, "control_leak": control_leak}
    if rung == "ftkit" and calls.count == 0:
        return figures, "the model does not call its attention through the library's interface"
    # Written so that NaN fails.
    if leak != 0.0:
        return figures, f"a document's gradient reaches another one ({leak:.1e})"
    if not difference <= arithmetic.tolerance:
        return figures, f"hidden states differ from the document alone ({difference:.1e})"
    if not (control_difference > arithmetic.clearly and control_leak > arithmetic.clearly):
        return figures, "wrong bounds go unnoticed"
    return figures, None


def _packed_kwargs(rung: str, lengths: tuple[int, ...], calls: CallCounter, device: torch.device) -> dict[str, Any]:
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None].to(device)
    if rung == "position_ids":
        return {"position_ids": position_ids}
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return {"position_ids": position_ids, "attention_calls": calls, **bounds_kwargs(bounds)}


def _compare(packed: _Run, alone: list[Tensor]) -> tuple[float, float]:
    """Largest difference from the documents alone, and largest gradient between documents, both relative."""
    ends = torch.tensor(LENGTHS).cumsum(0).tolist()
    expected_TD = torch.cat(alone).float()
    difference = float((packed.hidden_TD.detach().float() - expected_TD).abs().max() / expected_TD.abs().max())
    leak = 0.0
    generator = torch.Generator().manual_seed(2)
    for length, end in zip(LENGTHS, ends, strict=True):
        own = packed.hidden_TD[end - length : end]
        direction = torch.randn(own.shape, generator=generator).to(own)
        (gradient_BTD,) = torch.autograd.grad(own, packed.embedded_BTD, direction, retain_graph=True)
        gradient_T = gradient_BTD[0].abs().amax(1).float()
        inside = gradient_T[end - length : end].max()
        outside = torch.cat([gradient_T[: end - length], gradient_T[end:]]).max()
        leak = max(leak, float(outside / inside)) if bool(gradient_T.isfinite().all()) else float("nan")
    return difference, leak


def _in_words(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
