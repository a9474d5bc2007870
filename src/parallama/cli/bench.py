"""`parallama bench`: measure speed beside the peers and beside the machine's limits."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..bench.serve_options import OwnServer
from ..engine.devices.plugins import parse_options
from ..errors import UsageError, lines
from ..plan.mesh_shape import MeshShape
from . import bench_serve, options, output
from .unused_options import refuse

_ALWAYS = {"model", "model_option", "as_json", "quiet"}
_MEANT = {
    "make": {"make", *_ALWAYS},
    "load": {"load", "mesh", "dtype", "repeats", "backend", "allow_nonfinite", *_ALWAYS},
    "train": {
        *("train", "mesh", "peers", "batch", "prompt", "repeats", "threads", "dtype"),
        *("backend", "backend_option", "allow_nonfinite", "profile", *_ALWAYS),
    },
    "serve": {
        *("serve", "mesh", "dtype", "backend", "backend_option", "allow_nonfinite", "threads"),
        *("plot", *bench_serve.NAMES, *_ALWAYS),
    },
}
"""The parameters that mean something in each mode."""


def bench(
    *,
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            help="A folder, a .gguf file, a hub id or a shipped name;"
            " with --make the folder to write, with --serve also a server's address."
        ),
    ],
    make: Annotated[
        str | None,
        typer.Option(
            "--make", help="Write a random-weight checkpoint of this shape (l200, ...) and stop."
        ),
    ] = None,
    load: Annotated[
        bool,
        typer.Option(
            "--load", help="Measure only reading the files onto each mesh, beside safetensors."
        ),
    ] = False,
    train: Annotated[
        bool,
        typer.Option(
            "--train",
            help="Measure whole optimizer steps instead, of --batch sequences of --prompt-tokens.",
        ),
    ] = False,
    serve: Annotated[
        bool,
        typer.Option(
            "--serve",
            help="Measure an OpenAI-compatible server: at an address, or started for a model.",
        ),
    ] = False,
    serving: bench_serve.ServeOptions,
    mesh: Annotated[
        str,
        typer.Option(
            "--mesh",
            help="Meshes with commas between them; the first also stands beside the others.",
        ),
    ] = "1x1",
    peers: Annotated[
        str | None,
        typer.Option(
            "--peers",
            help="Of hf, hf-compile, hf-tp, recipe, recipe-openxla, with commas;"
            " 'all' is every one.",
            show_default="hf",
        ),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(
            "--batch", help="Rows, with commas.", show_default="1,4,16,32; 4 with --train"
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt-tokens",
            help="Prompt lengths, with commas.",
            show_default="512,4096; 256 with --train",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", help="Decode steps measured in each case.", show_default="24"),
    ] = None,
    repeats: Annotated[
        int, typer.Option("--repeats", help="Prefills measured in each case; steps with --train.")
    ] = 3,
    threads: Annotated[
        int | None,
        typer.Option("--threads", help="Cores that every engine may use.", show_default="all"),
    ] = None,
    backend: options.BackendName = "cpu",
    backend_option: options.BackendOptions = None,
    dtype: Annotated[str, typer.Option("--dtype", help="float32 or bfloat16.")] = "float32",
    allow_nonfinite: options.AllowNonfinite = False,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile",
            help="Sample each engine afterwards, to show where the time goes (Linux's perf).",
        ),
    ] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw the rows into this PNG file.")
    ] = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure prefill, decode and cold start, interleaved with what a user would pick instead."""
    if make is not None:
        _check_mode(context, "make")
        _make(make, model, as_json)
        return
    if serve:
        _check_mode(context, "serve")
        if len(shapes := _meshes(mesh)) != 1:
            raise UsageError(lines(f"--mesh {mesh} with --serve", "expected one mesh"))
        own = OwnServer(
            mesh=str(shapes[0]),
            dtype=dtype,
            backend=backend,
            backend_option=backend_option or (),
            allow_nonfinite=allow_nonfinite,
            threads=threads,
            more=serving.of_our_server(),
        )
        bench_serve.serve(
            context,
            model,
            serving,
            own,
            command=_command(),
            picture=plot,
            as_json=as_json,
            quiet=quiet,
        )
        return
    refuse(context, bench_serve.NAMES, "was given without --serve", "expected both, or neither")
    if load:
        _check_mode(context, "load")
        if backend != "cpu":
            raise UsageError(lines(f"--backend {backend} with --load", "expected cpu"))
    if train:
        _check_mode(context, "train")
    say: Callable[[str], None] = (lambda _what: None) if quiet else output.say
    shared: dict[str, Any] = {
        "model": model,
        "meshes": _meshes(mesh),
        "dtype": dtype,
        "repeats": repeats,
        "allow_nonfinite": allow_nonfinite,
    }
    if load:
        _load(shared, say, as_json)
        return
    shared |= {
        "threads": threads,
        "backend": backend,
        "backend_options": parse_options(backend_option or []),
        "profile": profile,
    }
    if train:
        cases: dict[str, Any] = {
            "peers": _names(None if peers == "all" else peers),
            **({} if batch is None else {"batch": _number("--batch", batch)}),
            **({} if prompt is None else {"seq_len": _number("--prompt-tokens", prompt)}),
        }
        _train(shared | cases, say, as_json)
        return
    cases = {
        "peers": None if peers == "all" else _names(peers),
        "batches": _numbers("--batch", batch or "1,4,16,32"),
        "prompts": _numbers("--prompt-tokens", prompt or "512,4096"),
        "steps": 24 if steps is None else steps,
    }
    _infer(shared | cases, say, plot, as_json)


def _check_mode(context: typer.Context, mode: str) -> None:
    """Raise `UsageError` for an option that means nothing in a mode."""
    names = {parameter.name for parameter in context.command.params}
    refuse(context, names - _MEANT[mode], f"was given with --{mode}", "expected one of the two")


def _make(shape: str, folder: str, as_json: bool) -> None:
    from ..bench.shapes import make

    count = make(shape, Path(folder))
    if as_json:
        output.print_json({"folder": folder, "shape": shape, "parameters": count})
    else:
        typer.echo(f"{folder}: {shape}, {count:,} parameters")


def _load(asked: dict[str, Any], say: Callable[[str], None], as_json: bool) -> None:
    from ..bench.load import run

    report = run(**asked, command=_command(), progress=say)
    if as_json:
        output.print_json(report.to_dict())
    else:
        typer.echo(report.text())


def _train(asked: dict[str, Any], say: Callable[[str], None], as_json: bool) -> None:
    from ..bench.training import TrainOptions, run

    report = run(TrainOptions(**asked), _command(), say)
    if as_json:
        output.print_json(report.to_dict())
    else:
        typer.echo(report.text())


def _infer(
    asked: dict[str, Any], say: Callable[[str], None], picture: Path | None, as_json: bool
) -> None:
    from ..bench import plot, report_view
    from ..bench.run import PEERS, Options, run

    if picture is not None:
        plot.check_target(picture)  # now, not after minutes of measuring
    peers = PEERS if asked["peers"] is None else asked["peers"]
    measured = run(Options(**asked | {"peers": peers}), _command(), say)
    if as_json:
        output.print_json(measured.to_dict())
    else:
        from rich.console import Console

        report_view.render(measured, Console())
    if picture is not None:
        plot.plot(measured, picture)


def _command() -> str:
    """This command line, for the report."""
    return "parallama " + shlex.join(argument for argument in sys.argv[1:] if argument != "--debug")


def _meshes(text: str) -> tuple[MeshShape, ...]:
    parts = [text] if "=" in text else [part.strip() for part in text.split(",") if part.strip()]
    shapes = tuple(MeshShape.parse(part) for part in parts)
    if len(set(shapes)) != len(shapes):
        raise UsageError(lines(f"--mesh {text} names a mesh twice", "expected each once"))
    return shapes


def _names(peers: str | None) -> tuple[str, ...]:
    if peers is None:
        return ("hf",)
    return tuple(name.strip() for name in peers.split(",") if name.strip())


def _number(option: str, text: str) -> int:
    numbers = _numbers(option, text)
    if len(numbers) != 1:
        raise UsageError(lines(f"{option} {text} with --train", "expected one number"))
    return numbers[0]


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            lines(
                f"{option} {text!r} cannot be read", "expected whole numbers with commas, as 1,4,16"
            )
        ) from None
    if len(set(numbers)) != len(numbers):
        raise UsageError(lines(f"{option} {text} names a number twice", "expected each once"))
    return numbers
