"""The arguments and options that several verbs have, each described once, and some whose description is long."""

import os
from pathlib import Path
from typing import Annotated

import typer


def go_offline(wanted: bool) -> bool:
    """Tell huggingface_hub and datasets, which read it when they are imported: later."""
    if wanted:
        os.environ["HF_HUB_OFFLINE"] = "1"
    return wanted


RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe's YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Keys to set instead, e.g. training.learning_rate=1e-4."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Move what is in the way to NAME.old-1.")]
Target = Annotated[
    str, typer.Argument(metavar="TARGET", help="A run, checkpoint, adapter, model directory, hub id or .gguf file.")
]
Base = Annotated[str | None, typer.Option(metavar="MODEL", help="Base model; default the one that it was trained on.")]
OntoStored = Annotated[
    bool,
    typer.Option("--onto-stored", help="Add to the base as it is stored, not to the quantized weights trained on."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Offline = Annotated[bool, typer.Option("--offline", callback=go_offline, help="Use cached files only, no network.")]
RemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model's repository.")
]
Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="float32|bfloat16|float16",
        help="Precision of the written weights (f32, bf16, f16 too); default as the base stores them. q8_0 for gguf.",
    ),
]
NumProcesses = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Processes on this machine; default one for each visible GPU.")
]
LaunchConfig = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Accelerate's file that says where to run: machines, processes, addresses."),
]
ModelOnly = Annotated[
    bool,
    typer.Option("--model-only", help="Only model and method, from the base's configuration; no data, no weights."),
]
DeviceMemory = Annotated[
    str | None, typer.Option("--memory", metavar="24GB", help="Of one GPU of another machine, which the run is to fit.")
]
Model = Annotated[
    str | None, typer.Option("--model", metavar="ID", help="The base model: hub id, directory or .gguf file.")
]
MethodName = Annotated[str | None, typer.Option("--method", metavar="M", help="How to train; default lora.")]
Source = Annotated[
    str, typer.Argument(metavar="DATA|CONFIG", help="Data, or a configuration of axolotl, LLaMA-Factory or TRL.")
]
Adapters = Annotated[
    list[str],
    typer.Argument(metavar="ADAPTER[:WEIGHT]...", help="Runs or adapters; weight 0.5 adds half, -1 subtracts."),
]
MergeOutput = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="DIR", help="Default RUN/merged, for one adapter.")
]
Proof = Annotated[
    str,
    typer.Option(
        metavar="full|modules|none",
        help="Compare logits of two whole models, outputs of one module after another, or nothing but the files.",
    ),
]
Suite = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Tasks to measure; default the run's validation rows.")
]
Compare = Annotated[list[str] | None, typer.Option(metavar="TARGET", help="Compare with this too; may be repeated.")]
ExportFormat = Annotated[
    str,
    typer.Option(
        metavar="FORMAT",
        help="hf: a directory for transformers and servers; gguf: llama.cpp's file; adapter: peft's files.",
    ),
]
InspectOther = Annotated[
    str | None, typer.Argument(metavar="[OTHER]", help="A second adapter: which directions do they share?")
]
Left = Annotated[
    bool, typer.Option("--left", help="With OTHER: the directions that updates write to (B), not read (A).")
]
Modules = Annotated[list[str] | None, typer.Option(metavar="NAME", help="Only these, e.g. q_proj; may be repeated.")]
Tolerance = Annotated[
    float,
    typer.Option(metavar="X", min=0.0, help="How far losses may be apart; above 0 weights are not compared."),
]
Ignore = Annotated[
    list[str] | None, typer.Option(metavar="PART", help="recipe, data, environment, loss or weights; repeatable.")
]
Smoke = Annotated[
    bool, typer.Option("--smoke", help="Try the recipe in a minute: a tiny random model, 8 rows a data set, 2 steps.")
]
SmokeModel = Annotated[
    Path | None,
    typer.Option("--smoke-model", metavar="DIR", help="With --smoke: a directory with configuration and tokenizer."),
]
FromCheckpoint = Annotated[
    Path | None, typer.Option("--from", metavar="CHECKPOINT", help="Go on from this checkpoint.")
]
Endpoint = Annotated[
    str | None, typer.Option(metavar="URL", help="A llama.cpp or vLLM server, in place of the exported files.")
]
ServedModel = Annotated[
    str | None, typer.Option("--model", metavar="NAME", help="The model's name on the server, where it has several.")
]
Exported = Annotated[
    list[Path] | None,
    typer.Option(metavar="PATH", help="Exported files that lie elsewhere than in the run; may be repeated."),
]
Timeout = Annotated[
    float, typer.Option(metavar="SECONDS", min=0.1, help="How long to wait for each of the server's answers.")
]
