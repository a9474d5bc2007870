"""`parallama report`: what a training run came to, and its curves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import output


def report(
    *,
    run: Annotated[
        Path, typer.Argument(help="The folder of a run: the 'out' of `parallama train`.")
    ],
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="A PNG or HTML file.", show_default="RUN/report.html"),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="One JSON document on standard output, and no picture but with --plot."
        ),
    ] = False,
) -> None:
    """Sum up a training run, and draw its loss and speed."""
    from ..train import report as reporting
    from ..train.logs import read_log

    with output.only_json(as_json):
        entries = read_log(run)
        target = plot if plot is not None or as_json else run / "report.html"
        if target is not None:
            reporting.write(run, target)
    if as_json:
        output.print_json(reporting.document(run))
        return
    for name, value in reporting.figures(reporting.summarize(entries)):
        typer.echo(f"{name:<12}{value}")
    typer.echo(f"{'drawn':<12}{target}")
