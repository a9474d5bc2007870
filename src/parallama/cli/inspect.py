"""`parallama inspect`: where a sharded model really is on the devices."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UsageError, lines
from ..plan.collectives import Phase
from ..plan.mesh_shape import MeshShape
from ..plan.picture import draw
from ..plan.picture_files import check_target, write
from ..progress_bars import progress_bars
from . import options, output

if TYPE_CHECKING:
    from ..prove.shard_contents import ShardContent

_PHASES: tuple[Phase, ...] = ("prefill", "decode")
_DEFAULT_LENGTH = 256


def inspect(
    *,
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
            "--device",
            help="With --tensor: only this device.",
            show_default="every one",
            min=0,
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            "--batch",
            help="Rows of the KV cache over all devices.",
            show_default="one on each",
        ),
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            "--max-model-len",
            help="Positions of the KV cache, rounded up to 256s.",
            show_default=str(_DEFAULT_LENGTH),
            callback=options.within(1),
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
        str | None,
        typer.Option("--phase", help="With --hlo: prefill or decode.", show_default="decode"),
    ] = None,
    chosen: options.ModelOptions,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Show what every device holds of a model and its KV cache, as measured; exit code 1 if
    something is placed otherwise than planned.
    """
    shape = chosen.shape
    batch = options.rows(batch, shape)
    step = _check(shape, tensor, device, hlo, phase)
    if plot is not None:
        check_target(plot)
    chosen.check_lengths(max_model_len)
    from ..prove.inspector import Inspector, check_folder

    if hlo is not None:
        check_folder(hlo)
    with output.only_json(as_json), progress_bars(quiet) as progress:
        llm = chosen.load(progress=progress, max_model_len=max_model_len, keep_hlo=hlo is not None)
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

        title = f"{chosen.model} on mesh {shape}, measured"
        write(draw(title, shape, list(panels(found))), plot)
    if as_json:
        document = found.to_dict()
        if tensor is not None:
            document["details"] = [part.to_dict() for part in contents]
        document |= {"findings": findings, "hlo": None if saved is None else str(saved)}
        output.print_json(document)
    else:
        from ..prove.inspection_view import render

        shown = contents if tensor is not None else None
        heads = llm.plan.head_layout.reason
        render(found, output.wide_console(), heads=heads, contents=shown, findings=findings)
        if saved is not None:
            typer.echo(f"\n{step} step: {saved}")
    if findings:
        raise typer.Exit(1)


def _check(
    shape: MeshShape,
    tensor: str | None,
    device: int | None,
    hlo: Path | None,
    phase: str | None,
) -> Phase:
    """Refuse what cannot be meant, and return the phase."""
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
