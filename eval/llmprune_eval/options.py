"""The options of the command line, one type each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="A model folder or Hub name.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Length = Annotated[int | None, typer.Option("--max-seq-length", help="Tokens per window [min(2048, positions)].")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto (the checkpoint's own), float32, float16, bfloat16.")]
Remote = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]

Dataset = Annotated[
    str | None,
    typer.Option("--dataset", help="Perplexity on: FILE (also .npy), wikitext2, c4, owner/name, NAME:FILE."),
]
Against = Annotated[str | None, typer.Option("--against", help="The dense model, for divergence from it.")]
Windows = Annotated[int | None, typer.Option("--num-samples", help="Only the first so many windows.")]
Tasks = Annotated[str | None, typer.Option("--tasks", help="Tasks of lm-eval, separated by commas.")]
SuiteName = Annotated[
    str | None, typer.Option("--suite", help="A named set: wanda (the papers' seven and WikiText-2).")
]
Shots = Annotated[int | None, typer.Option("--num-fewshot", help="Examples before each question [the task's own].")]
Limit = Annotated[
    float | None, typer.Option("--limit", help="Only the first so many documents of a task (< 1: share).")
]
Include = Annotated[
    list[Path] | None, typer.Option("--include-path", help="Folder with task YAMLs of your own; several times.")
]
Generate = Annotated[bool, typer.Option("--generate", help="Continue a few prompts greedily; how much is repeated?")]
Prompts = Annotated[list[str] | None, typer.Option("--prompt", help="A prompt of your own; several times.")]
NewTokens = Annotated[
    int | None, typer.Option("--max-new-tokens", help="Of a continuation, at most [64, or what positions allow].")
]
AutoBatch = Annotated[str, typer.Option("--batch-size", help="Windows or questions per forward pass, or auto.")]
DeviceMap = Annotated[
    str | None, typer.Option("--device-map", help="auto: a model that needs several GPUs is spread over them.")
]
ResultFile = Annotated[
    Path | None,
    typer.Option("--output", help="Result file [evaluation.json in a folder that llmprune wrote, otherwise none]."),
]
