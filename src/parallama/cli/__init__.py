"""The command line: one file a command."""

from __future__ import annotations

import typer

from .audit import audit
from .bench import bench
from .bench_serve import BenchCommand
from .chat import ChatCommand, chat
from .doctor import doctor
from .eval import evaluate
from .export import export
from .generate import generate
from .inspect import inspect
from .model_command import ModelCommand
from .option_groups import expanded
from .plan import plan
from .report import report
from .serve import serve
from .train import TrainCommand, train
from .validate import validate
from .verify import verify

app = typer.Typer(
    name="parallama",
    help="Run Hugging Face Llama models split over XLA devices by tensor parallelism.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        # As vLLM and litgpt do: --max_new_tokens is --max-new-tokens.
        "token_normalize_func": lambda word: word.replace("_", "-"),
    },
)


def _show_version(asked: bool) -> None:
    if not asked:
        return
    from importlib.metadata import version

    from .. import __version__

    beneath = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "torch_xla", "transformers")
    )
    typer.echo(f"parallama {__version__} ({beneath})")
    raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Show versions and exit."
    ),
    debug: bool = typer.Option(
        False, "--debug", help="Show tracebacks (anywhere on the command line)."
    ),
) -> None:
    pass


_CLASSES = {chat: ChatCommand, bench: BenchCommand}
for _command in (generate, chat, serve, audit, bench, export, inspect, plan, validate, verify):
    app.command(cls=_CLASSES.get(_command, ModelCommand))(expanded(_command))
app.command("eval", cls=ModelCommand)(expanded(evaluate))
app.command()(expanded(doctor))
app.command()(expanded(report))
app.command(cls=TrainCommand, context_settings={"ignore_unknown_options": True})(expanded(train))
