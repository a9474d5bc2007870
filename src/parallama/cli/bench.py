"""`parallama bench`: measure speed beside the peers and beside the machine's limits."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..engine.devices.plugins import parse_options
from ..errors import UsageError, lines
from ..plan.mesh_shape import MeshShape
from . import options
from .stated import refuse

_ALWAYS = {"model", "as_json", "quiet"}
_MEANT = {
    "make": {"make", *_ALWAYS},
    "load": {"load", "mesh", "dtype", "repeats", "backend", "allow_nonfinite", *_ALWAYS},
    "train": {
        *("train", "mesh", "peers", "batch", "prompt", "repeats", "threads", "dtype"),
        *("backend", "backend_option", "allow_nonfinite", "profile", *_ALWAYS),
    },
}
"""The parameters that mean something in each mode."""


def bench(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            help="A folder, a .gguf file, a hub id or a shipped name; with --make the folder to write."
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
            help="Of hf, hf-compile, hf-tp, recipe, recipe-openxla, with commas; 'all' is every one.",
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
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON document on standard output.")
    ] = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure prefill, decode and cold start, interleaved with what a user would pick instead."""
    if make is not None:
        _check_mode(context, "make")
        from ..bench.shapes import make as write

        count = write(make, Path(model))
        typer.echo(
            json.dumps({"folder": model, "shape": make, "parameters": count})
            if as_json
            else f"{model}: {make}, {count:,} parameters"
        )
        return
    if load:
        _check_mode(context, "load")
        if backend != "cpu":
            raise UsageError(lines(f"--backend {backend} with --load", "expected cpu"))
        _load(model, _meshes(mesh), dtype, repeats, as_json, quiet, allow_nonfinite)
        return
    if train:
        _check_mode(context, "train")
        _train(
            {
                "model": model,
                "meshes": _meshes(mesh),
                "peers": _names(None if peers == "all" else peers),
                **({} if batch is None else {"batch": _number("--batch", batch)}),
                **({} if prompt is None else {"seq_len": _number("--prompt-tokens", prompt)}),
                "repeats": repeats,
                "threads": threads,
                "dtype": dtype,
                "backend": backend,
                "backend_options": parse_options(backend_option or []),
                "allow_nonfinite": allow_nonfinite,
                "profile": profile,
            },
            as_json,
            quiet,
        )
        return
    from ..bench import report as reporting
    from ..bench.run import PEERS, Options, run

    if plot is not None:
        reporting.check_plot(plot)  # now, not after minutes of measuring
    wanted = Options(
        model=model,
        meshes=_meshes(mesh),
        peers=PEERS if peers == "all" else _names(peers),
        batches=_numbers("--batch", batch or "1,4,16,32"),
        prompts=_numbers("--prompt-tokens", prompt or "512,4096"),
        steps=24 if steps is None else steps,
        repeats=repeats,
        threads=threads,
        dtype=dtype,
        backend=backend,
        backend_options=parse_options(backend_option or []),
        allow_nonfinite=allow_nonfinite,
        profile=profile,
    )
    measured = run(wanted, _command(), (lambda _what: None) if quiet else options.say)
    if as_json:
        typer.echo(json.dumps(measured.to_dict()))
    else:
        from rich.console import Console

        reporting.render(measured, Console())
    if plot is not None:
        reporting.plot(measured, plot)


def _check_mode(context: typer.Context, mode: str) -> None:
    """Raise `UsageError` for an option that means nothing in a mode."""
    names = {parameter.name for parameter in context.command.params}
    refuse(context, names - _MEANT[mode], f"was given with --{mode}", "expected one of the two")


def _load(
    model: str,
    meshes: tuple[MeshShape, ...],
    dtype: str,
    repeats: int,
    as_json: bool,
    quiet: bool,
    allow_nonfinite: bool,
) -> None:
    from ..bench.load import run

    report = run(
        model,
        meshes=[str(mesh) for mesh in meshes],
        dtype=dtype,
        repeats=repeats,
        command=_command(),
        progress=(lambda _what: None) if quiet else options.say,
        allow_nonfinite=allow_nonfinite,
    )
    if as_json:
        typer.echo(json.dumps(report.to_dict()))
    else:
        typer.echo(report.text())


def _train(wanted: dict[str, Any], as_json: bool, quiet: bool) -> None:
    from ..bench.training import TrainOptions, run

    report = run(TrainOptions(**wanted), _command(), (lambda _what: None) if quiet else options.say)
    if as_json:
        typer.echo(json.dumps(report.to_dict()))
        return
    gemm = f"{report.machine.gemm_flops_per_s / 1e9:.0f} GFLOP/s"
    typer.echo(
        f"{report.model} in {report.dtype}, {report.threads} threads; a 2048 x 2048 product: {gemm} ({report.machine.cpu})\n\n{report.table()}"
        + (f"\n\n{profiles}" if (profiles := report.profiles()) else "")
    )


def _command() -> str:
    return "parallama " + shlex.join(argument for argument in sys.argv[1:] if argument != "--debug")


def _meshes(text: str) -> tuple[MeshShape, ...]:
    parts = [text] if "=" in text else [part.strip() for part in text.split(",") if part.strip()]
    shapes = tuple(MeshShape.parse(part) for part in parts)
    if len(set(shapes)) != len(shapes):
        raise UsageError(lines(f"--mesh {text} names a mesh twice", "expected each once"))
    return shapes


def _names(peers: str | None) -> tuple[str, ...]:
    return (
        ("hf",)
        if peers is None
        else tuple(name.strip() for name in peers.split(",") if name.strip())
    )


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
