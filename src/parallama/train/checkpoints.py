"""Training checkpoints that survive a kill at any moment.

A checkpoint is a folder `step-00000010`: a safetensors file for each device, and a manifest. It is
written in this order:

1. a temporary folder: every device's file, written and synced; then the manifest, with the SHA-256
   of each; then the folder itself is synced
2. the temporary folder gets its name, and the parent is synced: now the checkpoint is complete
3. the link `latest` moves to it
4. checkpoints older than the last `keep_last` undamaged ones are renamed away, and removed

So whatever has a checkpoint's name is complete. What a kill leaves behind has no such name, and is
removed when the next run begins.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ..errors import CheckpointError, RunError, cause, lines, shown
from ..files.disk import Disk, remedy, sha256
from ..plan.placement import Blocks
from ..sharded.layout import correspondence
from .manifest import NAME, FileEntry, Manifest, read_manifest
from .snapshot import Snapshot

LATEST = "latest"
_TEMPORARY, _OLD = ".saving-", ".old-"
_DTYPES = {str(each).removeprefix("torch."): each for each in (torch.float32, torch.bfloat16)}


class Verified:
    """The checkpoints that this process has written or verified: each is hashed only once."""

    def __init__(self) -> None:
        self._known: set[Path] = set()

    def add(self, path: Path) -> None:
        """Take a checkpoint for undamaged: this process has just written it."""
        self._known.add(path.resolve())

    def manifest(self, path: Path) -> Manifest:
        """A checkpoint's manifest; see `verify` for what it raises."""
        manifest = read_manifest(path) if path.resolve() in self._known else verify(path)
        self.add(path)
        return manifest

    def __contains__(self, path: Path) -> bool:
        """Whether a checkpoint is undamaged."""
        try:
            self.manifest(path)
        except CheckpointError:
            return False
        return True


def write(
    folder: Path,
    snapshot: Snapshot,
    *,
    keep_last: int,
    disk: Disk | None = None,
    verified: Verified | None = None,
) -> Path:
    """Write a checkpoint into the folder of all of them, and remove those that are too old.

    Args:
        keep_last: how many undamaged ones stay.
        verified: what is known of those that are there.

    Raises:
        RunError: it can't be written. The message names the newest undamaged checkpoint, and says
            what to do.
    """
    disk, verified = disk or Disk(), verified or Verified()
    step = snapshot.manifest.step
    target = folder / name_of(step)
    try:
        if target not in verified:  # otherwise it is the state after so many steps, once more
            _write_new(folder, snapshot, disk)
            verified.add(target)
        link = folder / f"{_TEMPORARY}{LATEST}"
        disk.link(link, target.name)
        disk.rename(link, folder / LATEST)
        disk.sync_folder(folder)
        for old in _too_old(folder, target, keep_last, verified):
            away = folder / f"{_OLD}{old.name}"
            disk.rename(old, away)
            disk.remove(away)
    except OSError as error:
        clean(folder)
        what = error.strerror or cause(error)
        file = f" ({Path(str(error.filename)).name})" if error.filename else ""
        raise RunError(
            lines(
                f"the checkpoint of step {step} cannot be saved in {str(folder)!r}: {what}{file}",
                kept(folder, verified),
                f"{remedy(error)}, then go on with --resume auto",
            )
        ) from None
    return target


def _write_new(folder: Path, snapshot: Snapshot, disk: Disk) -> None:
    """The first two steps of the order; a damaged checkpoint of that step makes room."""
    from safetensors.torch import save

    target = folder / name_of(snapshot.manifest.step)
    temporary, damaged = folder / f"{_TEMPORARY}{target.name}", folder / f"{_OLD}{target.name}"
    if target.exists():
        disk.rename(target, damaged)
    disk.make_folder(temporary)
    files = {}
    for device, held in snapshot.parts.items():
        name, content = f"device-{device}.safetensors", save(held)
        files[name] = FileEntry(bytes=len(content), sha256=disk.write(temporary / name, content))
    manifest = snapshot.manifest.model_copy(update={"files": files})
    disk.write(temporary / NAME, manifest.model_dump_json(indent=1).encode())
    disk.sync_folder(temporary)
    disk.rename(temporary, target)
    disk.sync_folder(folder)
    if damaged.exists():
        disk.remove(damaged)


def _too_old(folder: Path, target: Path, keep_last: int, verified: Verified) -> Iterator[Path]:
    """The complete checkpoints to remove: those behind the last undamaged ones.

    A damaged one never takes the place of a good one.
    """
    good = 1  # the target
    for path in steps_in(folder):
        if path == target:
            continue
        if good >= keep_last:
            if is_whole(path):
                yield path
        elif path in verified:
            good += 1


def clean(folder: Path) -> None:
    """Remove what a save that didn't end has left, as far as that goes."""
    for path in [*folder.glob(f"{_TEMPORARY}*"), *folder.glob(f"{_OLD}*")]:
        try:
            path.unlink() if path.is_symlink() else shutil.rmtree(path)
        except OSError:  # it has no checkpoint's name, and nobody reads it
            continue


def kept(folder: Path, verified: Verified) -> str:
    """Which checkpoint there is to go back to, in words."""
    path = newest(folder, verified=verified)
    if path is None:
        return "there is no whole checkpoint yet"
    return f"the newest whole checkpoint is {str(path)!r}"


def name_of(step: int) -> str:
    """A checkpoint's folder name."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step in a checkpoint's folder name."""
    return int(path.name.removeprefix("step-"))


def steps_in(folder: Path) -> list[Path]:
    """All that has a checkpoint's name, the newest first."""
    try:
        found = [
            path
            for path in folder.iterdir()
            if re.fullmatch(r"step-\d{8,}", path.name) and path.is_dir() and not path.is_symlink()
        ]
    except OSError:
        return []
    return sorted(found, key=step_of, reverse=True)


def is_whole(path: Path) -> bool:
    """Whether every file is there with its size. Its content may still be damaged."""
    try:
        read_manifest(path)
    except CheckpointError:
        return False
    return True


def newest(
    folder: Path,
    report: Callable[[str], None] | None = None,
    verified: Verified | None = None,
) -> Path | None:
    """The newest checkpoint that is complete by the manifest's hashes, or None.

    Args:
        report: is told of damaged ones that are passed over.
        verified: those whose hashes are known to be right.
    """
    verified = verified or Verified()
    for path in steps_in(folder):
        try:
            verified.manifest(path)
        except CheckpointError as error:
            if report is not None:
                report(f"{str(error).splitlines()[0]}; passed over")
            continue
        return path
    return None


def verify(path: Path) -> Manifest:
    """A checkpoint's manifest, after every file's hash has been held against it.

    Raises:
        CheckpointError: it is damaged.
    """
    manifest = read_manifest(path)
    for name, entry in manifest.files.items():
        try:
            found = sha256(path / name)
        except OSError as error:
            raise CheckpointError(
                lines(
                    f"checkpoint {str(path)!r}: file {name!r} cannot be read: {error.strerror}",
                    "use an earlier one",
                )
            ) from None
        if found != entry.sha256:
            raise CheckpointError(
                lines(
                    f"checkpoint {str(path)!r}: file {name!r} is damaged",
                    f"expected SHA-256 {entry.sha256}",
                    "use an earlier one",
                )
            )
    return manifest


def read_tensors(path: Path, manifest: Manifest) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor on the host, whole and in the model's own layout, one at a time.

    Raises:
        CheckpointError: a file lacks a tensor, or has another shape or dtype than the manifest.
    """
    from contextlib import ExitStack

    from safetensors import SafetensorError, safe_open

    mesh = manifest.mesh
    with ExitStack() as opened:
        try:
            files = {
                # Read, not mapped: a mapped file that is cut ends the process.
                name: opened.enter_context(
                    safe_open(str(path / name), framework="pt", backend="pread")
                )
                for name in manifest.files
            }
            for name, entry in manifest.tensors.items():
                whole = torch.empty(entry.shape, dtype=_DTYPES[entry.dtype])
                for device in entry.holders(mesh):
                    part = files[f"device-{device}.safetensors"].get_tensor(name)
                    place = whole[entry.part(mesh, device)]
                    if (part.dtype, part.shape) != (place.dtype, place.shape):
                        raise CheckpointError(
                            lines(
                                f"checkpoint {str(path)!r}: {name} is "
                                f"{part.dtype}{list(part.shape)} on device {device}",
                                f"expected {place.dtype}{list(place.shape)}, by the manifest",
                            )
                        )
                    place.copy_(part)
                blocks = entry.blocks
                yield name, whole if blocks is None else _taken_off(whole, blocks.blocks)
        except (SafetensorError, OSError, KeyError, RuntimeError) as error:
            raise CheckpointError(
                lines(
                    f"checkpoint {str(path)!r} cannot be read: {shown(cause(error))}",
                    "use an earlier one",
                )
            ) from None


def _taken_off(laid_out: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """The model's own dim again. Of equal copies, the last counts."""
    places, sources = correspondence(blocks)
    shape = list(laid_out.shape)
    shape[blocks.dim] = blocks.block * (max(blocks.sources) + 1)
    return laid_out.new_empty(shape).index_copy_(
        blocks.dim, sources, laid_out.index_select(blocks.dim, places)
    )
