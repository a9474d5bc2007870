"""`parallama bench --load`: reading safetensors onto the devices, beside safetensors' own reading.

Every reading is a new process, in turns, so that none finds memory that another made ready. The
files are in the page cache for all: the first turn brings them there and is not counted.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import isolated_process
from ..errors import ParallamaError, RunError, UsageError, from_reply, lines, shown, to_reply
from ..host import peak_rss_bytes, rss_bytes
from ..plan.mesh_shape import MeshShape
from .markdown_table import markdown_table

READERS = ("parallama", "safetensors", "safetensors-pread")
"""Ours onto the devices; safetensors' mapped file, each tensor copied into memory of its own;
safetensors' own reading with `backend="pread"`.
"""
_LIMIT_S = 900.0


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One way to read the files.

    Attributes:
        seconds: median; of the first byte to the last.
        bytes_per_s: of the files.
        growth_bytes: how much the process's memory grew at most.
        ratio: our speed over this one's.
    """

    reader: str
    seconds: float
    bytes_per_s: float
    growth_bytes: int
    ratio: float | None

    def cells(self) -> list[str]:
        """A line of the table."""
        return [
            self.reader,
            f"{self.bytes_per_s / 1e9:.2f}",
            f"{self.seconds:.2f}",
            f"{self.growth_bytes / 1e9:.2f} GB",
            "-" if self.ratio is None else f"{self.ratio:.2f}x",
        ]


@dataclass(frozen=True, kw_only=True)
class MeshLoad:
    """What was measured with one mesh: ours onto it, and the others in turns with it.

    Attributes:
        bytes: of the files.
        device_bytes: on all devices together.
    """

    mesh: str
    bytes: int
    device_bytes: int
    readings: tuple[Reading, ...]

    def table(self) -> str:
        """Markdown for people."""
        heads = ("reader", "GB/s", "seconds", "memory grew by", "parallama is")
        return markdown_table(heads, [reading.cells() for reading in self.readings], left=1)


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What was measured. The keys of `--json`."""

    command: str
    model: str
    dtype: str
    repeats: int
    meshes: tuple[MeshLoad, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        """For people."""
        parts = []
        for found in self.meshes:
            files, held = f"{found.bytes / 1e9:.2f} GB", f"{found.device_bytes / 1e9:.2f} GB"
            parts.append(f"{files} of files, {held} on {found.mesh} in {self.dtype}")
            parts.append(found.table())
        return "\n\n".join(parts)


def run(
    model: str,
    *,
    meshes: Sequence[MeshShape],
    dtype: str,
    repeats: int,
    command: str,
    progress: Callable[[str], None],
    allow_nonfinite: bool = False,
) -> LoadReport:
    """Measure a folder, with one mesh after another.

    Raises:
        UsageError: the model is no folder of safetensors, there is no mesh, or no repeat.
        RunError: a reading failed.
    """
    if not meshes:
        raise UsageError(lines("there is no mesh", "expected at least one, as 1x1,1x2"))
    if repeats < 1:
        raise UsageError(lines(f"repeats is {repeats}", "expected at least 1"))
    if not Path(model).is_dir():
        raise UsageError(
            lines(
                f"model {model!r} is no folder",
                "expected safetensors: that is what is read side by side",
            )
        )
    asked = {"model": model, "dtype": dtype, "allow_nonfinite": allow_nonfinite}
    measured = tuple(_measure(asked | {"mesh": str(mesh)}, repeats, progress) for mesh in meshes)
    return LoadReport(command=command, model=model, dtype=dtype, repeats=repeats, meshes=measured)


def _measure(asked: Mapping[str, Any], repeats: int, progress: Callable[[str], None]) -> MeshLoad:
    """Measure one mesh; `asked` is what `read` is told besides the reader."""
    taken: dict[str, list[dict[str, Any]]] = {reader: [] for reader in READERS}
    for turn in range(repeats + 1):
        for reader in READERS:
            when = f"{turn} of {repeats}" if turn else "warming up"
            progress(f"{asked['mesh']}: {reader}, {when}")
            answer = _read_apart({"reader": reader, **asked})
            if turn:
                taken[reader].append(answer)
    medians = {
        reader: statistics.median(answer["seconds"] for answer in answers)
        for reader, answers in taken.items()
    }
    ours = taken["parallama"][0]
    return MeshLoad(
        mesh=asked["mesh"],
        bytes=ours["bytes"],
        device_bytes=ours["device_bytes"],
        readings=tuple(
            Reading(
                reader=reader,
                seconds=medians[reader],
                bytes_per_s=ours["bytes"] / medians[reader],
                growth_bytes=max(answer["growth_bytes"] for answer in taken[reader]),
                ratio=None if reader == "parallama" else medians[reader] / medians["parallama"],
            )
            for reader in READERS
        ),
    )


def _read_apart(asked: Mapping[str, Any]) -> dict[str, Any]:
    """`read` in a process of its own.

    Raises:
        ParallamaError: what it refused with, or that a figure is missing.
    """
    reader = asked["reader"]
    ended = isolated_process.run_module("parallama.bench.load", json.dumps(asked), limit_s=_LIMIT_S)
    answer = ended.reply(reader)
    if "refused" in answer:
        raise from_reply(answer)
    names = ["seconds", "bytes", "growth_bytes"]
    if reader == "parallama":
        names.append("device_bytes")
    if any(type(answer.get(name)) not in (int, float) for name in names):
        raise RunError(
            lines(f"{reader} measured {shown(answer, 160)}", f"expected {', '.join(names)}")
        )
    return answer


def read(reader: str, model: str, mesh: str, dtype: str, allow_nonfinite: bool) -> dict[str, Any]:
    """One reading, in this process."""
    if reader == "parallama":
        return _ours(model, mesh, dtype, allow_nonfinite)
    return _theirs(reader, model)


def _ours(model: str, mesh: str, dtype: str, allow_nonfinite: bool) -> dict[str, Any]:
    import torch

    from ..engine.interface import start
    from ..files.find import find
    from ..model.spec import ModelSpec
    from ..plan.make_plan import make_plan
    from ..sharded import stream
    from ..sharded.loading import resolve_dtype

    devices = start(mesh)
    devices.put(torch.zeros(1), (None,))  # what the first transfer makes is not the reading's
    checkpoint = find(model)
    spec = ModelSpec.from_config(checkpoint.config)
    sources = checkpoint.sources(spec)
    plan = make_plan(spec, devices.shape)
    to = resolve_dtype(dtype, checkpoint.config, "cpu")
    weights, stats = stream.put(sources, plan, devices, to, allow_nonfinite=allow_nonfinite)
    return {
        "seconds": stats.seconds,
        "bytes": sum(source.nbytes for source in sources),
        "device_bytes": sum(weights.bytes_per_device()),
        "growth_bytes": stats.peak_rss_bytes - stats.baseline_rss_bytes,
    }


def _theirs(reader: str, model: str) -> dict[str, Any]:
    import torch  # noqa: F401 - its time is not the reading's
    from safetensors import safe_open

    pread = reader == "safetensors-pread"
    how = {"backend": "pread"} if pread else {}
    held: list[Any] = []
    baseline = rss_bytes()
    began = time.perf_counter()
    for file in sorted(Path(model).glob("*.safetensors")):
        with safe_open(file, framework="pt", **how) as handle:
            for name in handle.keys():  # noqa: SIM118 - it has no iterator
                tensor = handle.get_tensor(name)
                held.append(tensor if pread else tensor.clone())
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "bytes": sum(tensor.nbytes for tensor in held),
        "growth_bytes": peak_rss_bytes() - baseline,
    }


if __name__ == "__main__":  # one reading, for `_read_apart`
    if len(sys.argv) != 2:
        raise RunError(
            lines(
                "this is started by `parallama bench --load`",
                "expected one argument, a JSON object",
            )
        )
    try:
        answer = read(**json.loads(sys.argv[1]))
    except ParallamaError as error:
        answer = to_reply(error)
    sys.stdout.write(json.dumps(answer) + "\n")
