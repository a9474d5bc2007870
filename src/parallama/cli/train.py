"""`parallama train`: fine-tune a model split over devices."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from typer.core import TyperCommand

from ..errors import UsageError, lines
from . import options, output

if TYPE_CHECKING:
    from ..train.declared import Declaration
    from ..train.watch import Watch

PLAIN_LINES = 20
"""Without a terminal, so many steps of a run get a line, and every validation."""


def train(
    *,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG.yaml | MODEL] [--key value ...]",
            help="A YAML file of keys, or a model; and keys that win over the file.",
            show_default=False,
        ),
    ] = None,
    dump_config: Annotated[
        bool,
        typer.Option("--dump-config", help="Print all keys with their values as YAML, and stop."),
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="One JSON document on standard output: how the run ended."),
    ] = False,
    quiet: options.Quiet = False,
) -> int:
    """Fine-tune a model on chats, prompts with completions, or text, split over a mesh.

    Keys that must be given: model, data, out, and steps or epochs. An unknown key
    is an error. --dump-config prints every key with its value, as a file to begin
    from.

    On SIGTERM or Ctrl-C the run saves a checkpoint at the next step and ends;
    --resume auto goes on from there.
    """
    from ..train import settings as settings_of

    config, given = _first(list(arguments or []))
    if config is None and not given and not dump_config:
        raise UsageError(
            lines(
                "there is no config",
                "expected a YAML file, or keys such as"
                " --model smollm2 --data shipped:chat --out run --steps 20",
            )
        )
    settings = settings_of.read(config, given)
    if dump_config:
        if as_json:
            output.print_json(settings.to_dict())
        else:
            typer.echo(settings_of.dump(settings), nl=False)
        return 0
    from ..train.loop import train as run

    with output.only_json(as_json), _watch(quiet) as watch:
        outcome = run(settings, watch=watch)
    model = None if outcome.model is None else str(outcome.model)
    if as_json:
        where = {"checkpoint": str(outcome.checkpoint), "model": model}
        output.print_json(asdict(outcome) | where)
    elif not quiet:
        output.say(
            f"[{outcome.steps} steps; checkpoint {outcome.checkpoint}"
            + ("" if model is None else f"; model {model}")
            + f"; {outcome.programs_after_warmup} programs after warm-up]"
        )
    return 0 if outcome.signal is None else 128 + outcome.signal


def _first(given: list[str]) -> tuple[Path | None, list[str]]:
    """What stands first without a key: a config file, or else the model."""
    if not given or given[0].startswith("--"):
        return None, given
    first, *rest = given
    is_config = Path(first).suffix in (".yaml", ".yml") or (
        Path(first).is_file() and Path(first).suffix != ".gguf"
    )
    return (Path(first), rest) if is_config else (None, ["--model", first, *rest])


class TrainCommand(TyperCommand):
    """Its help ends with every key: name, default and meaning."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write typer's own help, and then the keys."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        from ..train.settings import explain

        super().format_help(ctx, formatter)
        table = Table(box=None, header_style="bold")
        table.add_column("key", no_wrap=True)
        table.add_column("default", max_width=13, overflow="fold")
        table.add_column("meaning")
        for name, key in explain():
            default = "must be given" if key.required else _shown(key.default)
            table.add_row(f"--{name}", Text(default), Text(_meaning(key)))
        Console().print(table)


def _shown(default: Any) -> str:
    """A default as it would be given."""
    if default in (None, ()):
        return ""
    if isinstance(default, bool):
        return str(default).lower()
    return ",".join(default) if isinstance(default, tuple) else str(default)


def _meaning(key: Declaration) -> str:
    """What a key means, and its words where the help doesn't name them."""
    words = [word for word in get_args(key.kind) if isinstance(word, str)]
    unnamed = [word for word in words if word not in key.help]
    return f"{key.help} ({', '.join(words)})" if unnamed else key.help


@contextmanager
def _watch(quiet: bool) -> Iterator[Watch]:
    """Progress on standard error: a bar on a terminal, lines elsewhere."""
    from ..train.watch import Watch

    if quiet:
        yield Watch()
    elif sys.stderr.isatty():
        with _bars() as watch:
            yield watch
    else:
        yield Watch(say=output.say, step=_lines())


def _lines() -> Callable[[dict[str, Any], int], None]:
    """A line for the first and the last step, for some between, and for what stands out."""

    def tell(entry: dict[str, Any], steps: int) -> None:
        step, every = entry["step"], max(steps // PLAIN_LINES, 1)
        regular = step % every == 0 or step in (1, steps)
        if regular or "eval_loss" in entry or entry.get("skipped"):
            output.say(_line(entry, steps))

    return tell


@contextmanager
def _bars() -> Iterator[Watch]:
    """Bars on a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from ..train.watch import Watch

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    bars = Progress(*columns, console=Console(stderr=True))
    tasks: dict[str, Any] = {}

    def say(line: str) -> None:
        bars.console.print(line, highlight=False, markup=False)

    def advance(what: str, done: int, total: int, figures: str = "") -> None:
        if what not in tasks:
            tasks[what] = bars.add_task(what, total=total, figures="")
        bars.update(tasks[what], completed=done, total=total, figures=figures)

    def show(entry: dict[str, Any], steps: int) -> None:
        advance("training", entry["step"], steps, _figures(entry))
        if "eval_loss" in entry:
            say(_line(entry, steps))

    with bars:
        yield Watch(say=say, progress=advance, step=show)


def _line(entry: dict[str, Any], steps: int) -> str:
    return f"step {entry['step']}/{steps}: {_figures(entry)}"


def _figures(entry: dict[str, Any]) -> str:
    parts = [
        f"loss {entry['loss']:.4f}",
        f"lr {entry['lr']:.2e}",
        f"grad {entry['grad_norm']:.3f}",
        f"{entry['tokens_per_s']:,.0f} tokens/s",
    ]
    if entry.get("mfu") is not None:
        parts.append(f"MFU {entry['mfu']:.0%}")
    if "eval_loss" in entry:
        parts.append(f"validation loss {entry['eval_loss']:.4f}")
        parts.append(f"perplexity {entry['eval_perplexity']:.2f}")
    if entry.get("skipped"):
        parts.append("skipped")
    return ", ".join(parts)
