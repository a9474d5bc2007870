"""The command line: one file a command."""

from __future__ import annotations

import typer

from .audit import audit
from .bench import bench
from .chat import chat
from .doctor import doctor
from .eval import evaluate
from .export import export
from .generate import generate
from .inspect import inspect
from .options import show_version
from .plan import plan
from .report import report
from .train import train
from .validate import validate
from .verify import verify

app = typer.Typer(
    name="parallama",
    help="Run Hugging Face Llama models split over XLA devices by tensor parallelism.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=show_version, is_eager=True, help="Show versions and exit."
    ),
    debug: bool = typer.Option(
        False, "--debug", help="Show tracebacks (anywhere on the command line)."
    ),
) -> None:
    pass


app.command()(generate)
app.command()(chat)
app.command()(audit)
app.command()(bench)
app.command()(doctor)
app.command("eval")(evaluate)
app.command()(export)
app.command()(inspect)
app.command()(plan)
app.command()(report)
app.command(context_settings={"ignore_unknown_options": True})(train)
app.command()(validate)
app.command()(verify)
