"""Options that several commands share, and how commands load a model and report."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..engine.devices.plugins import parse_options
from ..errors import UsageError, lines
from ..plan.mesh_shape import MeshShape

if TYPE_CHECKING:
    from ..inference.llm import LLM
    from ..inference.sharded_model import Progress

Model = Annotated[
    str, typer.Argument(help="A folder, a .gguf file, a hub id, or a shipped name (smollm2).")
]
Mesh = Annotated[
    str | None,
    typer.Option("--mesh", help="data x model, as 1x8, or data=2,model=4.", show_default="1x1"),
]
TensorParallel = Annotated[
    int | None, typer.Option("--tensor-parallel-size", "-tp", help="The same as --mesh 1xN.", min=1)
]
Devices = Annotated[
    int | None, typer.Option("--devices", help="Device count; follows from the mesh.", min=1)
]
BackendName = Annotated[
    str,
    typer.Option(
        "--backend",
        help="cpu, tpu, tt, the path of a PJRT plugin (.so), or an installed plugin's name.",
    ),
]
BackendOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--backend-option", help="key=value for the client that the plugin makes; several times."
    ),
]
PlanFile = Annotated[
    Path | None,
    typer.Option("--plan", help="YAML or JSON: parameter-name pattern to style or axes."),
]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32 or bfloat16.")]
MaxModelLen = Annotated[
    int | None, typer.Option("--max-model-len", help="Most tokens of prompt and answer together.")
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option("--max-new-tokens", help="Most new tokens a prompt.", show_default="256"),
]
Temperature = Annotated[
    float | None, typer.Option("--temperature", help="0 is greedy.", show_default="the model's")
]
TopK = Annotated[
    int | None, typer.Option("--top-k", help="Sample from the so many best; 0 is all.")
]
TopP = Annotated[
    float | None,
    typer.Option("--top-p", help="Sample from the best with this probability together."),
]
MinP = Annotated[
    float | None,
    typer.Option("--min-p", help="Drop tokens below this share of the best one's probability."),
]
RepetitionPenalty = Annotated[
    float | None, typer.Option("--repetition-penalty", help="Above 1: repeat less.")
]
Seed = Annotated[int, typer.Option("--seed", help="Same seed, same text, on every mesh.")]
AllowNonfinite = Annotated[
    bool, typer.Option("--allow-nonfinite", help="Load weights that hold NaN or infinity, too.")
]
Quiet = Annotated[
    bool, typer.Option("--quiet", help="No progress and no figures on standard error.")
]


# What is counted in bytes, where progress is reported; the rest is counted in pieces.
_IN_BYTES = ("loading", "writing", "moving")


def mesh_shape(mesh: str | None, tensor_parallel: int | None) -> MeshShape:
    """The mesh that `--mesh` and `--tensor-parallel-size` ask for together."""
    if mesh is None:
        return MeshShape(model=tensor_parallel or 1)
    shape = MeshShape.parse(mesh)
    if tensor_parallel is not None and tensor_parallel != shape.model:
        raise UsageError(
            lines(
                f"--mesh {mesh} splits over {shape.model} devices, --tensor-parallel-size over {tensor_parallel}",
                "expected one of the two, or the same",
            )
        )
    return shape


@contextmanager
def progress(quiet: bool) -> Iterator[Progress | None]:
    """A progress bar on standard error, if that is a terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bars

    running: dict[str, tuple[Bars, Any]] = {}

    def report(what: str, done: int, total: int) -> None:
        if what not in running:
            counts = (
                (DownloadColumn(), TransferSpeedColumn())
                if what in _IN_BYTES
                else (MofNCompleteColumn(),)
            )
            columns = (TextColumn("{task.description}"), BarColumn(), *counts, TimeElapsedColumn())
            bars = Bars(*columns, console=Console(stderr=True), transient=True)
            bars.start()
            running[what] = bars, bars.add_task(what, total=total)
        bars, task = running[what]
        bars.update(task, completed=done, total=total)
        if done >= total:
            running.pop(what)[0].stop()

    try:
        yield report
    finally:
        for bars, _ in running.values():
            bars.stop()


def load_model(
    model: str,
    *,
    mesh: str | None,
    tensor_parallel: int | None,
    devices: int | None,
    backend: str,
    backend_options: list[str] | None,
    plan: Path | None,
    dtype: str,
    max_model_len: int | None,
    allow_nonfinite: bool,
    progress: Progress | None,
    keep_hlo: bool = False,
) -> LLM:
    """`parallama.load` with a command's options."""
    shape = mesh_shape(mesh, tensor_parallel)
    given = parse_options(backend_options or [])
    from ..api import load

    return load(
        model,
        mesh=shape,
        backend=backend,
        backend_options=given,
        devices=devices,
        plan=plan,
        dtype=dtype,
        max_model_len=max_model_len,
        allow_nonfinite=allow_nonfinite,
        progress=progress,
        keep_hlo=keep_hlo,
    )


def say(text: str) -> None:
    """Print a line to standard error, where logs and figures go."""
    typer.echo(text, err=True)


def show_version(asked: bool) -> None:
    """Print versions and exit."""
    if not asked:
        return
    from importlib.metadata import version

    from .. import __version__

    typer.echo(
        f"parallama {__version__} (torch {version('torch')}, torch_xla {version('torch_xla')}, transformers {version('transformers')})"
    )
    raise typer.Exit
