"""Training checkpoints that survive a kill at any moment.

A checkpoint is a folder `step-00000010` with a safetensors file for each device and a manifest; nothing in it is pickled. It is written in this order:

1. a temporary folder; in it every device's file, written and synced; then the manifest, with the SHA-256 of each; then the folder itself is synced
2. the temporary folder gets its name, and the parent is synced: from here on the checkpoint is there, whole
3. the link `latest` moves to it
4. older ones than the last `keep_last` are renamed away, and removed

Whatever has a checkpoint's name is therefore complete, and what a kill leaves behind has none: it is removed when the next run begins.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch

from ..engine.interface import Engine
from ..errors import CheckpointError, RunError, cause, lines, shown
from ..files.disk import Disk, remedy, sha256
from ..plan.placement import Blocks
from ..sharded.layout import correspondence
from .manifest import NAME, BlockRuns, FileEntry, Manifest, Mesh, TensorEntry, read_manifest

LATEST = "latest"
_TEMPORARY, _OLD = ".saving-", ".old-"
_AXES: dict[str, Literal["data", "model"]] = {"data": "data", "model": "model"}


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A state on the host, ready to be written.

    Attributes:
        manifest: complete but for `files`.
        parts: for each device, by tensor name, what its file holds.
    """

    manifest: Manifest
    parts: dict[int, dict[str, torch.Tensor]]


def take(
    state: Mapping[str, torch.Tensor],
    layout: Callable[[str], tuple[tuple[str | None, ...], Blocks | None]],
    mesh: Engine,
    **about: Any,
) -> Snapshot:
    """Copy a state from the devices; afterwards they may go on.

    Args:
        state: device tensors by name.
        layout: name to the mesh axis of every dim, and how the laid-out dim is made.
        about: the manifest's other fields.
    """
    parts: dict[int, dict[str, torch.Tensor]] = {device: {} for device in range(mesh.shape.devices)}
    entries = {}
    for name, tensor in state.items():
        axes, blocks = layout(name)
        entry = TensorEntry(
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=list(tensor.shape),
            axes=[axis if axis is None else _AXES[axis] for axis in axes],
            blocks=BlockRuns.of(blocks) if blocks is not None else None,
        )
        entries[name] = entry
        shards = mesh.shards(tensor)
        for device in entry.holders(mesh.shape):
            parts[device][name] = shards[device].contiguous()
    manifest = Manifest(
        tensors=entries, files={}, mesh=Mesh(data=mesh.shape.data, model=mesh.shape.model), **about
    )
    return Snapshot(
        manifest=manifest, parts={device: held for device, held in parts.items() if held}
    )


def write(folder: Path, snapshot: Snapshot, *, keep_last: int, disk: Disk | None = None) -> Path:
    """Write a checkpoint into the folder of all of them, and remove those that are too old.

    Raises:
        RunError: it can't be written. The message says which checkpoint is whole, and what to do.
    """
    from safetensors.torch import save

    disk = disk or Disk()
    step = snapshot.manifest.step
    target, temporary = folder / name_of(step), folder / f"{_TEMPORARY}{name_of(step)}"
    try:
        if not _is_undamaged(target):  # otherwise it is the state after so many steps, once more
            if target.exists():
                disk.rename(target, folder / f"{_OLD}{target.name}")
            disk.make_folder(temporary)
            files = {}
            for device, held in snapshot.parts.items():
                name, content = f"device-{device}.safetensors", save(held)
                files[name] = FileEntry(
                    bytes=len(content), sha256=disk.write(temporary / name, content)
                )
            disk.write(
                temporary / NAME,
                snapshot.manifest.model_copy(update={"files": files})
                .model_dump_json(indent=1)
                .encode(),
            )
            disk.sync_folder(temporary)
            disk.rename(temporary, target)
            disk.sync_folder(folder)
        link = folder / f"{_TEMPORARY}{LATEST}"
        disk.link(link, target.name)
        disk.rename(link, folder / LATEST)
        disk.sync_folder(folder)
        for old in [path for path in steps_in(folder) if path != target and is_whole(path)][
            keep_last - 1 :
        ]:
            away = folder / f"{_OLD}{old.name}"
            disk.rename(old, away)
            disk.remove(away)
    except OSError as error:
        clean(folder)
        raise _failed(folder, step, error) from None
    return target


def clean(folder: Path) -> None:
    """Remove what a save that didn't end has left, as far as that goes."""
    import shutil

    for path in [*folder.glob(f"{_TEMPORARY}*"), *folder.glob(f"{_OLD}*")]:
        try:
            path.unlink() if path.is_symlink() else shutil.rmtree(path)
        except OSError:  # it has no checkpoint's name, and nobody reads it
            continue


def _failed(folder: Path, step: int, error: OSError) -> RunError:
    what = (error.strerror or cause(error)) + (
        f" ({Path(str(error.filename)).name})" if error.filename else ""
    )
    return RunError(
        lines(
            f"the checkpoint of step {step} cannot be saved in {str(folder)!r}: {what}",
            _kept(folder),
            f"{remedy(error)}, then go on with --resume auto",
        )
    )


def _kept(folder: Path) -> str:
    whole = next((path for path in steps_in(folder) if is_whole(path)), None)
    return (
        f"the newest whole checkpoint is {str(whole)!r}"
        if whole is not None
        else "there is no whole checkpoint yet"
    )


def name_of(step: int) -> str:
    """A checkpoint's folder name."""
    return f"step-{step:08d}"


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
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def is_whole(path: Path) -> bool:
    """Whether every file is there with its size."""
    try:
        read_manifest(path)
    except CheckpointError:
        return False
    return True


def _is_undamaged(path: Path) -> bool:
    try:
        verify(path)
    except CheckpointError:
        return False
    return True


def newest(folder: Path, report: Callable[[str], None] | None = None) -> Path | None:
    """The newest checkpoint that is complete by the manifest's hashes, or None; `report` is told of damaged ones that are passed over."""
    for path in steps_in(folder):
        try:
            verify(path)
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
        CheckpointError: a file lacks a tensor, or has another shape or dtype than the manifest says.
    """
    from contextlib import ExitStack

    from safetensors import SafetensorError, safe_open

    mesh = manifest.mesh.shape
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
                whole: torch.Tensor | None = None
                for device in entry.holders(mesh):
                    part = files[f"device-{device}.safetensors"].get_tensor(name)
                    if str(part.dtype) != f"torch.{entry.dtype}":
                        raise CheckpointError(
                            lines(
                                f"checkpoint {str(path)!r}: {name} is {part.dtype}",
                                f"expected {entry.dtype}, by the manifest",
                            )
                        )
                    whole = torch.empty(entry.shape, dtype=part.dtype) if whole is None else whole
                    whole[entry.part(mesh, device)] = part
                assert whole is not None
                yield (
                    name,
                    whole if entry.blocks is None else _taken_off(whole, entry.blocks.blocks),
                )
        except (SafetensorError, OSError, KeyError, RuntimeError) as error:
            raise CheckpointError(
                lines(
                    f"checkpoint {str(path)!r} cannot be read: {shown(cause(error))}",
                    "use an earlier one",
                )
            ) from None


def _taken_off(laid_out: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """The model's own dim again; of equal copies the last."""
    places, sources = correspondence(blocks)
    shape = list(laid_out.shape)
    shape[blocks.dim] = blocks.block * (max(blocks.sources) + 1)
    return laid_out.new_empty(shape).index_copy_(
        blocks.dim, sources, laid_out.index_select(blocks.dim, places)
    )


class Saver:
    """Writes checkpoints, one at a time, beside the training if it is asynchronous. An error comes up at the next call.

    Args:
        folder: of all checkpoints of the run.
    """

    def __init__(
        self, folder: Path, *, keep_last: int, asynchronous: bool, disk: Disk | None = None
    ) -> None:
        self.folder = folder
        self._keep_last = keep_last
        self._asynchronous = asynchronous
        self._disk = disk or Disk()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, snapshot: Snapshot) -> None:
        """Begin to write a checkpoint, when the one before is written."""
        self.wait()
        if not self._asynchronous:
            write(self.folder, snapshot, keep_last=self._keep_last, disk=self._disk)
            return
        self._thread = threading.Thread(target=self._run, args=(snapshot,), name="checkpoint")
        self._thread.start()

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return self.folder / name_of(step)

    def state(self) -> str:
        """Which checkpoint there is to go back to, in words."""
        return _kept(self.folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        """Let what is being written come to its end, and say nothing about it: the run breaks for another reason, or has heard of it in `wait`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def check(self) -> None:
        """Raise what went wrong in the background, if something did."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Return when nothing is being written; raises as `check`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def _run(self, snapshot: Snapshot) -> None:
        try:
            write(self.folder, snapshot, keep_last=self._keep_last, disk=self._disk)
        except BaseException as error:
            self._error = error
