"""`parallama inspect`: a sharded model as it really lies on the devices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UsageError, lines
from ..plan.collectives import Phase
from ..plan.mesh_shape import MeshShape
from ..plan.picture import check_target, draw, write
from . import options

if TYPE_CHECKING:
    from ..prove.shard_contents import ShardContent

_PHASES: tuple[Phase, ...] = ("prefill", "decode")
_DEFAULT_LENGTH = 256


def inspect(
    model: options.Model,
    tensor: Annotated[
        str | None,
        typer.Option(
            "--tensor",
            help="Read this tensor on the devices; a name, with * for any one dotted part of it.",
        ),
    ] = None,
    device: Annotated[
        int | None,
        typer.Option(
            "--device", help="With --tensor: only this device. [default: every one]", min=0
        ),
    ] = None,
    batch: Annotated[
        int,
        typer.Option(
            "--batch", help="Rows of the KV cache over all devices. [default: one on each]"
        ),
    ] = 0,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            "--max-model-len",
            help=f"Positions of the KV cache, rounded up to 256s. [default: {_DEFAULT_LENGTH}]",
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw who holds what into this SVG or PNG file.")
    ] = None,
    hlo: Annotated[
        Path | None,
        typer.Option("--hlo", help="Save a step's optimized HLO in this new or empty folder."),
    ] = None,
    phase: Annotated[
        str | None, typer.Option("--phase", help="With --hlo: prefill or decode. [default: decode]")
    ] = None,
    mesh: options.Mesh = None,
    tensor_parallel_size: options.TensorParallel = None,
    devices: options.Devices = None,
    backend: options.BackendName = "cpu",
    backend_option: options.BackendOptions = None,
    plan: options.PlanFile = None,
    dtype: options.Dtype = "auto",
    allow_nonfinite: options.AllowNonfinite = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON document on standard output.")
    ] = False,
    quiet: options.Quiet = False,
) -> None:
    """Show what every device holds of a model and its KV cache, as measured; exit code 1 if something lies otherwise than planned."""
    shape = options.mesh_shape(mesh, tensor_parallel_size)
    batch = batch or shape.data
    step = _check(shape, batch, tensor, device, hlo, phase)
    if plot is not None:
        check_target(plot)
    from ..prove.inspector import Inspector, check_folder

    if hlo is not None:
        check_folder(hlo)
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
            keep_hlo=hlo is not None,
        )
        length = min(_DEFAULT_LENGTH, llm.max_model_len) if max_model_len is None else max_model_len
        inspector = Inspector(llm, batch=batch, max_model_len=length)
        found = inspector.inspect()
        contents: list[ShardContent] = []
        findings = list(found.findings)
        for name in inspector.select(tensor) if tensor is not None else ():
            parts, faults = inspector.read(name)
            contents += [part for part in parts if device in (None, part.device)]
            findings += faults
        saved = None if hlo is None else inspector.save_hlo(hlo, step)
    if plot is not None:
        from ..prove.inspection_view import panels

        write(draw(f"{model} on mesh {shape}, measured", shape, list(panels(found))), plot)
    if as_json:
        details = {} if tensor is None else {"details": [part.to_dict() for part in contents]}
        document = (
            found.to_dict()
            | details
            | {"findings": findings, "hlo": None if saved is None else str(saved)}
        )
        typer.echo(json.dumps(document))
    else:
        from rich.console import Console

        from ..prove.inspection_view import render

        console = Console()
        if not console.is_terminal:
            console.width = max(console.width, 100)
        shown = contents if tensor is not None else None
        render(found, console, heads=llm.plan.head_layout.reason, contents=shown, findings=findings)
        if saved is not None:
            typer.echo(f"\n{step} step: {saved}")
    if findings:
        raise typer.Exit(1)


def _check(
    shape: MeshShape,
    batch: int,
    tensor: str | None,
    device: int | None,
    hlo: Path | None,
    phase: str | None,
) -> Phase:
    """Refuse what cannot be meant, and return the phase."""
    if batch < 1 or batch % shape.data:
        raise UsageError(
            lines(
                f"--batch is {batch}",
                f"expected a multiple of {shape.data}, the devices along 'data'",
            )
        )
    if device is not None and tensor is None:
        raise UsageError(lines("--device was given without --tensor", "expected both, or neither"))
    if device is not None and device >= shape.devices:
        raise UsageError(
            lines(f"--device {device} is not on mesh {shape}", f"expected 0 to {shape.devices - 1}")
        )
    if phase is not None and hlo is None:
        raise UsageError(lines("--phase was given without --hlo", "expected both, or neither"))
    known = next((each for each in _PHASES if each == (phase or "decode")), None)
    if known is None:
        raise UsageError(
            lines(f"--phase {phase!r} is unknown", f"expected one of {', '.join(_PHASES)}")
        )
    return known
