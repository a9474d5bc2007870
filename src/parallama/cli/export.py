"""`parallama export`: hand a model back as a folder that transformers loads."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..progress_bars import progress_bars
from . import options, output


def export(
    *,
    model: options.Model,
    adapter: options.Adapter = None,
    out: Annotated[Path, typer.Argument(help="The folder to write; a new one, or an empty one.")],
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            help="auto (as stored; float32 where quantized), float32, bfloat16 or float16.",
        ),
    ] = "auto",
    mesh: Annotated[
        str | None,
        typer.Option(
            "--mesh", help="Take the weights over devices and back, as 1x8.", show_default="none"
        ),
    ] = None,
    allow_nonfinite: options.AllowNonfinite = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a model as safetensors with config, tokenizer, chat template and a manifest; an adapter
    is merged.
    """
    from ..files.export import check_free, export_checkpoint, resolve
    from ..files.find import find

    check_free(out)  # now, not after minutes of loading
    if dtype != "auto":
        resolve(dtype)
    with output.only_json(as_json), progress_bars(quiet) as progress:
        if mesh is None:
            report = None if progress is None else partial(progress, "writing")
            exported = export_checkpoint(
                find(model, adapter),
                out,
                dtype=dtype,
                allow_nonfinite=allow_nonfinite,
                progress=report,
            )
        else:
            from ..api import load

            llm = load(
                model,
                adapter=adapter,
                mesh=mesh,
                dtype="float32",  # which holds exactly whatever is stored
                allow_nonfinite=allow_nonfinite,
                progress=progress,
            )
            exported = llm.export(
                out, dtype="stored" if dtype == "auto" else dtype, allow_nonfinite=allow_nonfinite
            )
    if as_json:
        output.print_json({"model": model} | exported.to_dict())
    else:
        typer.echo(
            f"{exported.folder}: {exported.parameters:,} parameters in {exported.dtype},"
            f" {len(exported.files)} files, {exported.bytes:,} bytes"
        )
