"""`parallama eval`: tasks of lm-evaluation-harness on a sharded model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError, lines
from ..plan.mesh_shape import MeshShape
from ..progress_bars import progress_bars
from . import options, output

if TYPE_CHECKING:
    from rich.console import Console

_MOST_DOCUMENTS = 1_000_000_000


def evaluate(
    *,
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
            "--limit",
            "-L",
            help="Documents of each task, or a share of them if below 1.",
            callback=options.within(0, _MOST_DOCUMENTS),
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
    chosen: options.ModelOptions,
    max_model_len: options.MaxModelLen = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Run tasks of lm-evaluation-harness, which the extra 'eval' brings; options are named as
    lm_eval names them.
    """
    if log_samples and output_path is None:
        raise UsageError(
            lines(
                "--log-samples was given without --output-path",
                "expected a folder to write them to",
            )
        )
    if batch_size is not None:
        options.rows(batch_size, chosen.shape, option="--batch-size")
    chosen.check_lengths(max_model_len)
    from ..evaluate.evaluation import EvalOptions
    from ..evaluate.evaluation import evaluate as run
    from ..evaluate.results import as_json as dumped
    from ..evaluate.results import write
    from ..evaluate.tasks import find_tasks

    how = EvalOptions(
        num_fewshot=num_fewshot,
        limit=limit,
        apply_chat_template=apply_chat_template,
        system_instruction=system_instruction,
        fewshot_as_multiturn=fewshot_as_multiturn,
        seed=seed,
        log_samples=log_samples,
    )
    with output.only_json(as_json):
        # Tasks first: a misspelt name says so before a model is loaded.
        found = find_tasks(tasks, include_path or [], model=chosen.model, quiet=quiet)
        with progress_bars(quiet) as progress:
            llm = chosen.load(progress=progress, max_model_len=max_model_len)
            document = run(llm, found, how, batch=batch_size, quiet=quiet)
        files = write(document, output_path) if output_path is not None else []
    if as_json:
        shown = {key: value for key, value in document.items() if key != "samples"}
        # Through the harness's own form, for it has values that JSON does not know.
        output.print_json(json.loads(dumped(shown)), readable=True)
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
        numeric = head in ("n-shot", "value", "stderr")
        table.add_column(head, justify="right" if numeric else "left", overflow="fold")
    groups = document.get("groups", {})
    for task, found in [*document["results"].items(), *groups.items()]:
        if task in groups and found is not groups[task]:
            continue  # a group stands below its tasks
        shots = str(document["n-shot"].get(task, ""))
        for key, value in found.items():
            metric, _, kind = key.partition(",")
            if kind and not metric.endswith("_stderr"):
                error = found.get(f"{metric}_stderr,{kind}")
                table.add_row(task, shots, metric, kind, _number(value), _number(error))
    console.print(table)


def _figures(document: Mapping[str, Any], files: list[Path]) -> None:
    mesh = MeshShape(document["mesh"])
    speed = document["tokens"] / document["evaluation_s"]
    output.say(
        f"[{document['model']} on {mesh} {document['backend']}, {document['dtype']};"
        f" {document['requests']} requests, {speed:,.0f} tokens/s;"
        f" {document['programs_compiled']} programs,"
        f" {document['programs_after_warmup']} after warm-up]"
    )
    if document["cut_requests"]:
        output.say(
            f"[{document['cut_requests']} requests were cut at their beginning:"
            f" longer than {document['max_model_len']} tokens]"
        )
    for file in files:
        output.say(f"[wrote {file}]")


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
