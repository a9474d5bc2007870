"""`parallama verify`: hold a model's files against its config and its manifest, without devices."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import typer

from ..errors import CheckpointError, lines
from ..progress_bars import progress_bars
from . import options, output

if TYPE_CHECKING:
    from ..prove.verification import Verification

_SHOWN = 20


def verify(
    *,
    model: options.Model,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Check a model's files: structure, shapes against the config, dtypes, NaN and infinity,
    tokenizer, manifest. Exit code 0, or 3 if something is wrong.
    """
    from .. import environment

    environment.expect_no_devices()
    from ..prove.verification import verify as run

    with output.only_json(as_json), progress_bars(quiet) as progress:
        report = None if progress is None else partial(progress, "reading")
        found = run(model, report)
    if as_json:
        output.print_json(found.to_dict())
    else:
        _show(found)
    if not found.passed:
        first = found.findings[0].message
        if as_json:
            raise CheckpointError(first)
        raise CheckpointError(
            lines(f"{model} is not sound: {len(found.findings)} finding(s)", "see the lines above")
        )


def _show(found: Verification) -> None:
    typer.echo(f"{found.model}: {'sound' if found.passed else 'NOT SOUND'}")
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in found.dtypes.items())
    if found.tensors:
        typer.echo(
            f"{found.model_type}, {found.tensors} tensors ({dtypes}),"
            f" {found.parameters:,} parameters"
        )
    if found.manifest_files is None:
        typer.echo("no manifest")
    else:
        typer.echo(f"{found.manifest_files} files held against manifest.json")
    for name, reason in list(found.ignored.items())[:_SHOWN]:
        typer.echo(f"not read: {lines(name)} ({reason})")
    for note in found.notes:
        typer.echo(f"note: {note}")
    for finding in found.findings[:_SHOWN]:
        typer.echo(f"- {finding.check}: " + "\n  ".join(finding.message.splitlines()))
    more = len(found.findings) - _SHOWN
    if more > 0:
        typer.echo(f"- and {more} more; --json has all")
