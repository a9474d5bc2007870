"""`parallama eval`: tasks of lm-evaluation-harness on a sharded model."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError, lines
from . import options

if TYPE_CHECKING:
    from rich.console import Console


def evaluate(
    model: options.Model,
    tasks: Annotated[
        list[str],
        typer.Option(
            "--tasks",
            "-t",
            help="Names of tasks, groups or tags with commas, or a task's YAML file.",
        ),
    ],
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            "--num-fewshot",
            "-f",
            help="Examples before each question.",
            show_default="the task's",
            min=0,
        ),
    ] = None,
    limit: Annotated[
        float | None,
        typer.Option(
            "--limit", "-L", help="Documents of each task, or a share of them if below 1."
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            "-b",
            help="Sequences at once, over all devices.",
            show_default="8",
            min=1,
        ),
    ] = None,
    include_path: Annotated[
        list[Path] | None,
        typer.Option(
            "--include-path",
            help="A folder with tasks of your own, whose code is run; several times.",
        ),
    ] = None,
    apply_chat_template: Annotated[
        bool,
        typer.Option("--apply-chat-template", help="Put requests into the model's chat template."),
    ] = False,
    system_instruction: Annotated[
        str | None, typer.Option("--system-instruction", help="A system message.")
    ] = None,
    fewshot_as_multiturn: Annotated[
        bool | None,
        typer.Option(
            "--fewshot-as-multiturn/--no-fewshot-as-multiturn",
            help="Examples as turns.",
            show_default="with a chat template",
        ),
    ] = None,
    output_path: Annotated[
        Path | None,
        typer.Option(
            "--output-path",
            "-o",
            help="A folder for results_DATE.json and samples, or a .json file's name.",
        ),
    ] = None,
    log_samples: Annotated[
        bool,
        typer.Option(
            "--log-samples", "-s", help="Write every request and answer to the output path."
        ),
    ] = False,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            help="For examples and sampling.",
            show_default="the harness's: 0,1234,1234,1234",
            min=0,
        ),
    ] = None,
    mesh: options.Mesh = None,
    tensor_parallel_size: options.TensorParallel = None,
    devices: options.Devices = None,
    backend: options.BackendName = "cpu",
    backend_option: options.BackendOptions = None,
    plan: options.PlanFile = None,
    dtype: options.Dtype = "auto",
    allow_nonfinite: options.AllowNonfinite = False,
    max_model_len: options.MaxModelLen = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON document on standard output.")
    ] = False,
    quiet: options.Quiet = False,
) -> None:
    """Run tasks of lm-evaluation-harness, which the extra 'eval' brings; options are named as lm_eval names them."""
    if log_samples and output_path is None:
        raise UsageError(
            lines(
                "--log-samples was given without --output-path",
                "expected a folder to write them to",
            )
        )
    from ..evaluate.evaluation import EvalOptions
    from ..evaluate.evaluation import evaluate as run
    from ..evaluate.results import as_json as dumped
    from ..evaluate.results import write
    from ..evaluate.tasks import find_tasks

    chosen = EvalOptions(
        num_fewshot=num_fewshot,
        limit=limit,
        apply_chat_template=apply_chat_template,
        system_instruction=system_instruction,
        fewshot_as_multiturn=fewshot_as_multiturn,
        seed=seed,
        log_samples=log_samples,
    )
    # Tasks first: a misspelt name says so before a model is loaded.
    found = find_tasks(tasks, include_path or [], model=model, quiet=quiet)
    with options.progress(quiet) as progress:
        llm = options.load_model(
            model,
            mesh=mesh,
            tensor_parallel=tensor_parallel_size,
            devices=devices,
            backend=backend,
            backend_options=backend_option,
            plan=plan,
            dtype=dtype,
            max_model_len=max_model_len,
            allow_nonfinite=allow_nonfinite,
            progress=progress,
        )
        document = run(llm, found, chosen, batch=batch_size, quiet=quiet)
    files = write(document, output_path) if output_path is not None else []
    if as_json:
        typer.echo(dumped({key: value for key, value in document.items() if key != "samples"}))
    else:
        from rich.console import Console

        _render(document, Console())
    if not quiet:
        _figures(document, files)


def _render(document: Mapping[str, Any], console: Console) -> None:
    """The harness's table."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False)
    for head in ("task", "n-shot", "metric", "filter", "value", "stderr"):
        table.add_column(
            head,
            justify="right" if head in ("n-shot", "value", "stderr") else "left",
            overflow="fold",
        )
    for task, found in [*document["results"].items(), *document.get("groups", {}).items()]:
        if task in document.get("groups", {}) and found is not document["groups"][task]:
            continue  # a group stands below its tasks
        for key, value in found.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr"):
                continue
            error = found.get(f"{metric}_stderr,{kind}")
            shots = document["n-shot"].get(task, "")
            table.add_row(task, str(shots), metric, kind, _number(value), _number(error))
    console.print(table)


def _figures(document: Mapping[str, Any], files: list[Path]) -> None:
    mesh = f"{document['mesh']['data']}x{document['mesh']['model']}"
    speed = document["tokens"] / document["evaluation_s"]
    options.say(
        f"[{document['model']} on {mesh} {document['backend']}, {document['dtype']}; {document['requests']} requests, {speed:,.0f} tokens/s; "
        f"{document['programs_compiled']} programs, {document['programs_after_warmup']} after warm-up]"
    )
    if document["cut_requests"]:
        options.say(
            f"[{document['cut_requests']} requests were cut at their beginning: longer than {document['max_model_len']} tokens]"
        )
    for file in files:
        options.say(f"[wrote {file}]")
    sys.stderr.flush()


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "-" if value is None else str(value)
