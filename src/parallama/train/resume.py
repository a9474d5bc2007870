"""From which checkpoint a run goes on, and whether it fits. No torch on import."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError, lines, shown
from .logs import NAME as LOG
from .settings import TrainSettings

if TYPE_CHECKING:
    from .manifest import Manifest

_SAME = ("seq_len", "packing", "seed", "optimizer", "lora")
"""Settings that a checkpoint's state or place in the data hang on. All others may be changed."""


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """A checkpoint to go on from, verified."""

    path: Path
    manifest: Manifest


def find(settings: TrainSettings, folder: Path, say: Callable[[str], None]) -> Resumed | None:
    """The checkpoint that `settings.resume` asks for.

    Args:
        folder: of the run's own checkpoints.

    Returns:
        None for a run from the beginning: `no`, or `auto` where there is no checkpoint yet.

    Raises:
        UsageError: going on, or beginning, would lose what the run's folder holds; or the checkpoint is of other settings.
        CheckpointError: the checkpoint is damaged.
    """
    from . import checkpoints

    if settings.resume == "no":
        if checkpoints.steps_in(folder) or (folder.parent / LOG).exists():
            raise UsageError(
                lines(
                    f"{settings.out!r} holds a run already",
                    "expected a new folder, or --resume auto to go on with it",
                )
            )
        return None
    path = (
        checkpoints.newest(folder, say)
        if settings.resume == "auto"
        else Path(settings.resume).expanduser().resolve()
    )
    if path is None:
        return None
    manifest = checkpoints.verify(path)
    newer = [
        other.name
        for other in checkpoints.steps_in(folder)
        if checkpoints.is_whole(other) and other.name > checkpoints.name_of(manifest.step)
    ]
    if settings.resume != "auto" and newer:
        raise UsageError(
            lines(
                f"{settings.out!r} holds {newer[0]}, which is newer than {path.name}",
                "expected another --out, so that nothing is lost, or --resume auto",
            )
        )
    if manifest.step > settings.steps:
        raise UsageError(
            lines(
                f"checkpoint {path.name} is after {manifest.step} steps, and steps is {settings.steps}",
                "expected as many at least",
            )
        )
    now = settings.to_dict()
    # Beside adapters the model's own weights are not in the checkpoint.
    for key in (*_SAME, *(("model",) if now["lora"] is not None else ())):
        if manifest.settings.get(key) != now[key]:
            raise UsageError(
                lines(
                    f"{key} is {shown(now[key])}, but checkpoint {path.name} was made with {shown(manifest.settings.get(key))}",
                    "expected the same",
                )
            )
    return Resumed(path=path, manifest=manifest)


def check_data(resumed: Resumed, fingerprint: str) -> None:
    """Raise `UsageError` unless the data are those that the checkpoint knows its place in."""
    if resumed.manifest.data.fingerprint != fingerprint:
        raise UsageError(
            lines(
                f"the data are not those of checkpoint {resumed.path.name}",
                "expected the same files, tokenizer and too_long, for it says where in them to go on",
                f"to train on other data, begin from its exported model, or from model {resumed.manifest.settings.get('model')!r}",
            )
        )
