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
    from .checkpoints import Verified
    from .manifest import Manifest

_SAME = ("seq_len", "packing", "seed", "optimizer", "lora")
"""Settings on which a checkpoint's state or its place in the data depend. Others may change."""


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """A checkpoint to go on from.

    Attributes:
        verified: it, and what else was verified on the way.
    """

    path: Path
    manifest: Manifest
    verified: Verified


def find(settings: TrainSettings, folder: Path, say: Callable[[str], None]) -> Resumed | None:
    """The checkpoint that `settings.resume` asks for.

    Args:
        folder: of the run's own checkpoints.
        say: is told of damaged checkpoints that are passed over.

    Returns:
        None for a run from the beginning: `no`, or `auto` where there is no checkpoint yet.

    Raises:
        UsageError: the run would lose what its folder holds, or the checkpoint is of other
            settings.
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
    verified = checkpoints.Verified()
    if settings.resume == "auto":
        path = checkpoints.newest(folder, say, verified)
    else:
        path = Path(settings.resume).expanduser().resolve()
    if path is None:
        return None
    manifest = verified.manifest(path)
    if settings.resume != "auto":
        newer = checkpoints.newest(folder, say, verified)
        if newer is not None and checkpoints.step_of(newer) > manifest.step:
            raise UsageError(
                lines(
                    f"{settings.out!r} holds {newer.name}, which is newer than {path.name}",
                    "expected another --out, so that nothing is lost, or --resume auto",
                )
            )
    _check_settings(settings, path, manifest)
    return Resumed(path=path, manifest=manifest, verified=verified)


def _check_settings(settings: TrainSettings, path: Path, manifest: Manifest) -> None:
    """Raise `UsageError` unless a run of these settings can go on from the checkpoint."""
    if manifest.step > settings.steps:
        raise UsageError(
            lines(
                f"checkpoint {path.name} is after {manifest.step} steps, "
                f"and steps is {settings.steps}",
                "expected as many at least",
            )
        )
    now = settings.to_dict()
    # Beside adapters the model's own weights are not in the checkpoint.
    for key in (*_SAME, *(("model",) if now["lora"] is not None else ())):
        then = manifest.settings.get(key)
        if then != now[key]:
            raise UsageError(
                lines(
                    f"{key} is {shown(now[key])}, "
                    f"but checkpoint {path.name} was made with {shown(then)}",
                    "expected the same",
                )
            )


def check_data(resumed: Resumed, fingerprint: str) -> None:
    """Raise `UsageError` unless the checkpoint's place in the data is one in these data."""
    if resumed.manifest.data.fingerprint != fingerprint:
        model = resumed.manifest.settings.get("model")
        raise UsageError(
            lines(
                f"the data are not those of checkpoint {resumed.path.name}",
                "expected the same files, tokenizer and too_long, "
                "for it says where in them to go on",
                f"to train on other data, begin from its exported model, or from model {model!r}",
            )
        )
