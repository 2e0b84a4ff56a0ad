"""The recipe: one class a section, one a method; typed, frozen, strict. Plain data without torch.

Every field's docstring is its description in `ftkit schema` and says its unit. Only keys that work are here; names of
other tools and of later versions are explained by `recipe/foreign.py`.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator, model_validator

from ftkit.recipe.method_schema import (
    AdapterMethod,
    FullMethod,
    LlamaAdapterMethod,
    LoraMethod,
    PrefixMethod,
    SoftPromptMethod,
)
from ftkit.recipe.section import Auto, ListOf, NonEmpty, Probability, Section, Share, StepsOrShare


class ModelSection(Section):
    """How the base model is loaded."""

    revision: str | None = None
    """Branch, tag or commit of the hub repository; the resolved recipe holds the commit."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute precision; `auto` takes bfloat16 where the hardware is fast at it. Trained weights stay float32."""
    attn_implementation: Literal["auto", "ftkit", "eager", "sdpa", "flash_attention_2"] = "auto"
    """Attention kernel; `auto` takes ftkit's own where packing is proven, the model's default elsewhere."""
    quantization: Literal["nf4", "int8"] | None = None
    """Bits that the frozen linear layers of the decoder blocks are kept in: 4 (nf4, as QLoRA) or 8; not for full."""
    tokenizer: NonEmpty | None = None
    """A directory or hub id whose tokenizer is used in place of the base model's own."""
    add_tokens: ListOf[NonEmpty] = ()
    """Tokens that the tokenizer does not have yet, as text; for lora. Their rows of embedding and head train, from the
    mean of the others."""
    add_special_tokens: ListOf[NonEmpty] = ()
    """Likewise control tokens, such as the ends of turns: text that is decoded leaves them out."""
    chat_template: str | None = None
    """A Jinja file (relative to the recipe) or a built-in name (`chatml`); overrides the tokenizer's own."""


class ColumnsSection(Section):
    """Names of the source's columns, where they differ from the format's own; with `templates`, any column that the
    phrasings name."""

    # What else may be named is known to the library of phrasings; without templates `checks.py` refuses it.
    model_config = ConfigDict(extra="allow")
    instruction: str | None = None
    """alpaca: the instruction."""
    input: str | None = None
    """alpaca: the optional input to the instruction."""
    output: str | None = None
    """alpaca: the answer."""
    system: str | None = None
    """alpaca, prompt_completion: an optional system prompt."""
    conversations: str | None = None
    """sharegpt: the list of turns."""
    messages: str | None = None
    """messages: the list of messages."""
    tools: str | None = None
    """messages, sharegpt: the tools' JSON schemas (a list, or a JSON string)."""
    prompt: str | None = None
    """prompt_completion: the prompt."""
    completion: str | None = None
    """prompt_completion: the completion."""
    text: str | None = None
    """text: the document."""
    inputs: str | None = None
    """task: the mapping of input fields."""
    target: str | None = None
    """task: the answer."""


class DatasetSection(Section):
    """One data set of the mixture or of the evaluation rows."""

    path: NonEmpty
    """A json, jsonl, csv or parquet file, a glob or a directory (relative to the recipe), or a hub id."""
    name: NonEmpty | None = None
    """Label in tables and metrics; default from the path."""
    format: Literal["alpaca", "sharegpt", "messages", "prompt_completion", "text", "task"] | None = None
    """How rows are laid out; detected from the columns when left out."""
    columns: ColumnsSection = ColumnsSection()
    """The source's names for the format's columns."""
    roles: dict[str, Literal["system", "user", "assistant", "tool"]] = {}
    """The source's names for roles, e.g. {bot: assistant}; added to the ones that are known."""
    template: str | None = None
    """task: how a record is phrased, with its fields in braces: "Review: {text}\\nPositive or negative?"."""
    templates: NonEmpty | Annotated[ListOf[NonEmpty], Field(min_length=1)] | None = None
    """Several phrasings, drawn anew in each epoch: a data set of the library, a file of phrasings (FILE.yaml or
    FILE.yaml:NAME), or a list of prompts."""
    labels: dict[str, str] = {}
    """With templates: the source's answers in the phrasings' words, e.g. {"yes": equivalent}."""
    rationale: Literal["never", "always"] | Probability = "never"
    """With templates: share of the draws that ask for the reasoning before the answer, in rows that have one."""
    few_shot: Probability = 0.0
    """With templates: share of the draws that show solved examples, other rows of the data set, before the question."""
    shots: Annotated[int, Field(ge=1, le=8)] = 3
    """Solved examples in such a draw."""
    cluster: NonEmpty | None = None
    """Kind of task, e.g. sentiment; default the library's, or what the row's own `cluster` says."""
    clusters: ListOf[NonEmpty] = ()
    """Only rows of these clusters."""
    exclude_clusters: ListOf[NonEmpty] = ()
    """No rows of these clusters."""
    chat_template_kwargs: dict[str, Any] = {}
    """Keywords for the chat template, over those of `data`; a row's own come over both."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    split: str = "train"
    """Split of a hub data set."""
    revision: str | None = None
    """Revision of a hub data set."""
    weight: PositiveFloat = 1.0
    """Multiplies the data set's rate where `mixing.strategy` has rates."""
    max_samples: PositiveInt | None = None
    """At most so many rows, a seeded random subset."""
    repeat: PositiveInt | None = None
    """Epochs of its own rows that a data set gives at most; then it drops out of the mixture."""


DEFAULT_MAXIMUM, DEFAULT_TEMPERATURE = 3000, 2.0
"""FLAN's cap (Wei et al. 2021, section 2.1), and a temperature between proportions and equal shares."""


class MixingSection(Section):
    """How data sets are mixed."""

    strategy: Literal["concat", "proportional", "temperature", "weights"] = "concat"
    """concat: every row once an epoch. proportional: rates by size, up to `maximum` (FLAN). temperature: rates by
    size ** (1 / temperature). weights: rates as the data sets' `weight`, which elsewhere multiplies the rate."""
    maximum: PositiveInt | None = None
    """proportional, temperature: size that a data set counts with at most; proportional: 3000 when left out."""
    temperature: Annotated[float, Field(ge=1.0)] | None = None
    """temperature: 1 keeps the proportions of the sizes, larger values even them out; 2 when left out."""
    epoch_size: PositiveInt | None = None
    """Rows an epoch, except for concat; default the sum of all rows, for proportional of the capped sizes."""
    stopping: Literal["first_exhausted", "all_exhausted"] | None = None
    """An epoch ends when the first (or the last) data set has been seen once; excludes `epoch_size`; not for concat."""

    @property
    def cap(self) -> int | None:
        """Size that a data set counts with at most."""
        return DEFAULT_MAXIMUM if self.maximum is None and self.strategy == "proportional" else self.maximum


class DataSection(Section):
    """What is trained on, and on which rows it is measured."""

    train: Annotated[ListOf[DatasetSection], Field(min_length=1)]
    """The data sets of the mixture."""
    eval: ListOf[DatasetSection] = ()
    """Validation data sets; where there are none, `val_size` splits them off the training rows."""
    max_length: Annotated[int, Field(ge=8)] = 2048
    """Tokens an example may have; longer ones lose their oldest turns, then text of the first user message."""
    packing: Literal["auto", "required", "off"] = "auto"
    """Documents one after another in a row without padding, where the proof of their isolation holds."""
    mixing: MixingSection = MixingSection()
    """Which rows an epoch draws from which data set."""
    val_size: Share | PositiveInt = 0.05
    """Share or number of rows split off for validation, at most 500; 0 turns it off."""
    turns: Literal["auto", "whole", "each"] = "auto"
    """One example a conversation, or one an assistant turn; `auto` asks the chat template."""
    train_on: Literal["assistant", "last_assistant", "all"] = "assistant"
    """Which tokens are targets: all assistant turns, the last one, or every token."""
    train_on_reasoning: bool = True
    """Whether the thoughts of a trained turn (`reasoning_content`, <think>) are targets too."""
    truncation: Literal["oldest_turns", "left", "drop", "error"] = "oldest_turns"
    """What happens to conversations over max_length: their oldest exchanges go, then text of the first user message;
    or tokens from the left, never of the last answer; or the row is dropped; or that is an error."""
    system_prompt: NonEmpty | None = None
    """System message of conversations that have none."""
    clusters: ListOf[NonEmpty] = ()
    """Only training rows of these clusters of tasks."""
    exclude_clusters: ListOf[NonEmpty] = ()
    """No training rows of these clusters: tasks held out, to measure transfer to them."""
    deduplicate: bool = False
    """Drop training rows that say the same as an earlier one or as a validation row, up to case and white space."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What a row that cannot be read does: end the run before it starts, with all such rows named, or drop out."""
    chat_template_kwargs: dict[str, Any] = {}
    """Keywords for the chat template, e.g. {enable_thinking: false}; kept with the run."""


Method = Annotated[
    FullMethod | LoraMethod | AdapterMethod | SoftPromptMethod | PrefixMethod | LlamaAdapterMethod,
    Field(discriminator="type"),
]
METHOD_SECTIONS: dict[str, type[Section]] = {
    "full": FullMethod,
    "lora": LoraMethod,
    "adapter": AdapterMethod,
    "soft_prompt": SoftPromptMethod,
    "prefix": PrefixMethod,
    "llama_adapter": LlamaAdapterMethod,
}
"""`method.type` -> its section."""


Tracker = Literal[
    "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"
]  # fmt: skip
"""accelerate's names."""


class TrainingSection(Section):
    """The loop. The defaults here are LoRA's; `METHOD_DEFAULTS` has the others."""

    num_train_epochs: PositiveInt = 3
    """Passes over the mixture."""
    max_steps: PositiveInt | None = None
    """Optimizer steps; where set, it decides instead of `num_train_epochs`."""
    global_batch_size: PositiveInt = 16
    """Examples an optimizer step, over all devices."""
    max_tokens_per_device: Annotated[int, Field(ge=8)] | Auto = "auto"
    """Tokens a micro-batch may hold; changes memory and speed, never the gradient. auto: the largest of the longest
    document, 8192 on a GPU and 2048 on a CPU, halved until a step fits into the memory that is free."""
    learning_rate: PositiveFloat = 2e-4
    """Peak learning rate."""
    lr_scheduler_type: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Schedule after the warm-up; wsd is constant, then falls linearly over the last fifth of the run."""
    min_lr_ratio: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Learning rate at the end, as a share of the peak (cosine, linear, wsd)."""
    warmup_steps: Annotated[int, Field(ge=0)] | Share | None = None
    """Steps, or below 1 a share of the run; left out: 3%, at least 5 steps but at most a tenth of the run."""
    optim: Literal["adamw"] = "adamw"
    """Optimizer."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay, on matrices only."""
    adam_beta1: Share = 0.9
    """Decay of AdamW's first moment."""
    adam_beta2: Share = 0.999
    """Decay of AdamW's second moment."""
    adam_epsilon: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Gradients are scaled down to this global 2-norm; null turns clipping off."""
    gradient_checkpointing: bool | Auto = "auto"
    """Recompute each block's activations in the backward pass: less memory, more time. auto: only where no other
    budget fits."""
    logging_steps: StepsOrShare | Auto = "auto"
    """Optimizer steps between lines of metrics.jsonl; auto: a hundredth of the run, at least 1, at most 10."""
    eval_steps: StepsOrShare = 0.1
    """Optimizer steps (or a share of the run) between evaluations."""
    save_steps: StepsOrShare | None = None
    """Steps between checkpoints, a multiple of `eval_steps`; left out: as `eval_steps`."""
    eval_on_start: bool = True
    """Evaluate before the first step."""
    save_total_limit: PositiveInt = 2
    """Checkpoints kept besides the best one."""
    metric_for_best_model: str = "eval_loss"
    """`eval_loss`, or `eval_loss_NAME` for one validation data set; lower is better."""
    early_stopping_patience: PositiveInt | None = None
    """Stop after so many evaluations without a better metric."""
    final: Literal["best", "last"] = "best"
    """Whether the run's adapter/ or model/ holds the best or the last weights."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """How several processes share the work: replicas (ddp) or shards (fsdp); auto is ddp."""
    report_to: ListOf[Tracker] = ()
    """Trackers that get the numbers of metrics.jsonl too: tensorboard, wandb, or another one that accelerate knows."""
    run_name: NonEmpty | None = None
    """What trackers call the run; default the name of its directory."""
    project: NonEmpty | None = None
    """Project that trackers put the run into; default ftkit."""

    @field_validator("metric_for_best_model")
    @classmethod
    def _metric_exists(cls, value: str) -> str:
        if not re.fullmatch("eval_loss(_.+)?", value):
            raise ValueError(f"expected eval_loss or eval_loss_NAME of a validation data set, got {value!r}")
        return value


class Recipe(Section):
    """A run from the base model to the trained weights."""

    base_model: NonEmpty
    """Hub id, directory, or .gguf file; a path that exists wins, `hf://org/name` forces the hub."""
    model: ModelSection = ModelSection()
    """Precision, attention, revision and chat template of the base model."""
    data: DataSection
    """What is trained on."""
    method: Method
    """What trains, `type`: full, lora, adapter, soft_prompt, prefix or llama_adapter, and that method's keys."""
    training: TrainingSection = TrainingSection()
    """The loop."""
    output_dir: NonEmpty = "runs/{name}-{n}"
    """Where the run is kept (relative to the working directory); {name} is the recipe file's name, {n} the next free
    number, {method} and {time} what they say."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of every random choice: subset, split, order, initialisation, dropout."""

    @model_validator(mode="before")
    @classmethod
    def _fill_method_defaults(cls, raw: Any) -> Any:
        """Fill the training defaults of the method that was chosen, where the recipe leaves them out."""
        if not isinstance(raw, dict) or not isinstance(raw.get("method"), dict):
            return raw
        name = raw["method"].get("type")
        defaults = METHOD_DEFAULTS.get(name, {}) if isinstance(name, str) else {}
        training = raw.get("training", {})
        return raw | {"training": defaults | training} if isinstance(training, dict) else raw


METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    "full": {"learning_rate": 2e-5, "global_batch_size": 32, "num_train_epochs": 2},
    "lora": {"learning_rate": 2e-4, "global_batch_size": 16, "num_train_epochs": 3},
    "adapter": {"learning_rate": 3e-4, "global_batch_size": 16, "num_train_epochs": 3},
    "soft_prompt": {"learning_rate": 3e-2, "global_batch_size": 16, "num_train_epochs": 3},
    "prefix": {"learning_rate": 1.5e-2, "global_batch_size": 16, "num_train_epochs": 3},
    "llama_adapter": {"learning_rate": 9e-3, "global_batch_size": 16, "num_train_epochs": 3},
}
"""Training defaults by method. LoRA wants about ten times the learning rate of full tuning, and small batches."""
