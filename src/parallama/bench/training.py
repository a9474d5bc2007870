"""`parallama bench --train`: whole optimizer steps on each mesh, beside a transformers eager loop on the same weights, tokens, dtype and cores.

Both take turns, a step each, in processes of their own; the machine's matrix product is measured before and after. A mesh is done before the next begins: the state of a training run is four
times its weights.
"""

from __future__ import annotations

import contextlib
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import ParallamaError, RunError, UsageError, lines
from ..files.config_json import read_config
from ..model.spec import ModelSpec
from ..plan.cost import train_flops
from ..plan.mesh_shape import MeshShape
from ..train.declared import declaration
from ..train.options import StepOptions
from .options import EngineOptions
from .processes import EngineProcess
from .profile import KINDS, recording
from .rows import About, Profile, Speed
from .run import first_line, reading

TRAIN_PEERS = ("hf",)
SAME_LOSS = 1e-4
"""Relative: first losses nearer than this are the same, rounding apart."""
_LR = 1e-4
_SAMPLED = 2  # steps of a profile


@dataclass(frozen=True, kw_only=True)
class TrainOptions(EngineOptions):
    """What to measure.

    Attributes:
        repeats: steps measured, after one that isn't.
        batch: sequences of a step.
        seq_len: tokens of a sequence.
    """

    PEERS = TRAIN_PEERS

    peers: tuple[str, ...] = TRAIN_PEERS
    batch: int = StepOptions.batch_size
    seq_len: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        declaration(StepOptions, "batch_size").check(self.batch, "batch")
        declaration(StepOptions, "seq_len").check(self.seq_len, "prompt-tokens")
        for mesh in self.meshes:
            if self.batch % mesh.data:
                raise UsageError(
                    lines(
                        f"batch {self.batch} on mesh {mesh}",
                        f"expected a multiple of {mesh.data}, the devices along 'data'",
                    )
                )

    def engine(self, name: str, mesh: MeshShape) -> dict[str, Any]:
        """See `EngineOptions.engine`; one that trains."""
        step = StepOptions(
            batch_size=self.batch,
            seq_len=self.seq_len,
            dtype=self.dtype,  # type: ignore[arg-type]
        )
        return super().engine(name, mesh) | {"train": {"step": step.to_dict(), "lr": _LR}}


@dataclass(frozen=True, kw_only=True)
class TrainPeer:
    """What a peer did; interleaved with ours.

    Attributes:
        ratio: our median over the peer's.
        losses: of each step, from the first.
        same_losses: all are ours, to 1e-4.
        error: why it could not, or None.
    """

    peer: str
    tokens_per_s: Speed | None = None
    ratio: float | None = None
    losses: tuple[float, ...] = ()
    same_losses: bool | None = None
    bytes_per_device: dict[str, list[int]] | None = None
    peak_rss_bytes: int | None = None
    profile: Profile | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class TrainRow:
    """Steps on one mesh.

    Attributes:
        tokens_per_s: tokens of a step's batch over the seconds of the whole step: forward, backward, clipping, update.
        step_s: median.
        mfu: FLOPs of the products of a forward and a backward pass, over what the machine's matrix product does in that time.
        start_s: loading, tracing and compiling.
    """

    what: str = "train"
    mesh: str
    batch: int
    seq_len: int
    tokens_per_s: Speed
    step_s: float
    mfu: float
    losses: tuple[float, ...]
    start_s: float
    bytes_per_device: dict[str, list[int]]
    peak_rss_bytes: int
    peers: tuple[TrainPeer, ...]
    profile: Profile | None = None


@dataclass(frozen=True, kw_only=True)
class TrainReport(About):
    """What was measured. The keys of `--json`."""

    rows: tuple[TrainRow, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> str:
        """The rows as GitHub markdown."""
        peers = list(dict.fromkeys(peer.peer for row in self.rows for peer in row.peers))
        heads = [
            "what",
            "mesh",
            "batch",
            "tokens/s (min-max)",
            "step, s",
            "MFU",
            "bytes a device",
            "peak RSS",
            *peers,
        ]
        table = [heads, ["---" if index < 2 else "---:" for index in range(len(heads))]]
        for row in self.rows:
            speed = row.tokens_per_s
            held = sum(max(sizes) for sizes in row.bytes_per_device.values())
            cells = [
                row.what,
                row.mesh,
                f"{row.batch}x{row.seq_len}",
                f"{speed.median:.1f} ({speed.min:.1f}-{speed.max:.1f})",
            ]
            cells += [
                f"{row.step_s:.2f}",
                f"{row.mfu:.1%}",
                f"{held / 1e9:.2f} GB",
                f"{row.peak_rss_bytes / 1e9:.2f} GB",
            ]
            table.append([*cells, *(_peer_cell(row, peer) for peer in peers)])
        return "\n".join("| " + " | ".join(cells) + " |" for cells in table)

    def profiles(self) -> str:
        """Where a step's time goes, in core-milliseconds, as GitHub markdown; empty if nothing was sampled."""
        heads = ["what", "mesh", "engine", "ms a step", *KINDS, "idle"]
        table = [heads, ["---" if index < 3 else "---:" for index in range(len(heads))]]
        for row in self.rows:
            for name, taken in (
                ("parallama", row.profile),
                *((peer.peer, peer.profile) for peer in row.peers),
            ):
                if taken is not None:
                    spent = [f"{taken.core_ms_per_pass[kind]:,.0f}" for kind in (*KINDS, "idle")]
                    table.append([row.what, row.mesh, name, f"{taken.ms_per_pass:,.0f}", *spent])
        return (
            "\n".join("| " + " | ".join(cells) + " |" for cells in table) if len(table) > 2 else ""
        )


def run(options: TrainOptions, command: str, progress: Callable[[str], None]) -> TrainReport:
    """Measure every mesh.

    Raises:
        CheckpointError: the model cannot be read.
        ParallamaError: parallama itself could not start on a mesh, or take a step.
    """
    spec = ModelSpec.from_config(read_config(options.model))
    if options.seq_len > spec.max_positions:
        raise UsageError(
            lines(
                f"prompt-tokens is {options.seq_len}",
                f"expected at most {spec.max_positions}, the model's positions",
            )
        )
    rows, readings = [], []
    versions: dict[str, str] = {}
    with EngineProcess(options.engine("machine", MeshShape())) as machine:
        for mesh in options.meshes:
            with contextlib.ExitStack() as stack:
                progress(f"starting parallama {mesh}")
                ours = stack.enter_context(EngineProcess(options.engine("parallama", mesh)))
                peers: dict[str, EngineProcess | str] = {}
                for name in options.peers:
                    progress(f"starting {name}")
                    try:
                        peers[name] = stack.enter_context(
                            EngineProcess(options.engine(name, MeshShape()))
                        )
                    except ParallamaError as error:
                        peers[name] = first_line(error, name)
                progress(f"{options.repeats} steps of {options.batch} x {options.seq_len} tokens")
                before = reading(machine)
                taken = _take(options, spec, ours, peers)
                readings += [before, reading(machine)]
                versions = ours.started["versions"]
                peak = max(each["gemm_flops_per_s"] for each in readings[-2:])
                rows.append(_row(options, spec, str(mesh), ours, peers, taken, peak))
    return TrainReport(**options.about(command, readings, versions), rows=tuple(rows))


@dataclass
class _Taken:
    """An engine's steps: of the first only the loss counts."""

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)
    profile: Profile | None = None


def _take(
    options: TrainOptions,
    spec: ModelSpec,
    ours: EngineProcess,
    peers: dict[str, EngineProcess | str],
) -> dict[str, _Taken]:
    """Every engine's steps, taken in turns. A peer that fails becomes its reason."""
    draw = random.Random(0)
    taken = {name: _Taken() for name in ("parallama", *peers)}
    for step in range(options.repeats + 1):
        rows = [
            [draw.randrange(spec.vocab) for _ in range(options.seq_len)]
            for _ in range(options.batch)
        ]
        for name, engine in {"parallama": ours, **peers}.items():
            if isinstance(engine, str):
                continue
            try:
                reply = engine.ask("step", rows=rows)
                taken[name].losses.append(reply["loss"])
                if step:
                    taken[name].seconds.append(reply["seconds"])
                if step == options.repeats:
                    taken[name].last = engine.ask("held")
                    if options.profile:
                        taken[name].profile = _sampled(options, engine, rows)
            except RunError as error:
                if name == "parallama":
                    raise
                peers[name] = first_line(error, name)
    return taken


def _sampled(options: TrainOptions, engine: EngineProcess, rows: list[list[int]]) -> Profile:
    with recording(engine.pid) as taken:
        seconds = [engine.ask("step", rows=rows)["seconds"] for _ in range(_SAMPLED)]
    return taken.profile(seconds, options.cores)


def _row(
    options: TrainOptions,
    spec: ModelSpec,
    mesh: str,
    ours: EngineProcess,
    peers: Mapping[str, EngineProcess | str],
    taken: Mapping[str, _Taken],
    gemm_flops_per_s: float,
) -> TrainRow:
    tokens, mine = options.batch * options.seq_len, taken["parallama"]
    speed, step_s = Speed.of(tokens, mine.seconds), statistics.median(mine.seconds)
    beside = []
    for name, engine in peers.items():
        if isinstance(engine, str):
            beside.append(TrainPeer(peer=name, error=engine))
            continue
        theirs = Speed.of(tokens, taken[name].seconds)
        beside.append(
            TrainPeer(
                peer=name,
                tokens_per_s=theirs,
                ratio=speed.median / theirs.median,
                losses=tuple(taken[name].losses),
                same_losses=_same(mine.losses, taken[name].losses),
                bytes_per_device=taken[name].last["bytes_per_device"],
                peak_rss_bytes=taken[name].last["peak_rss_bytes"],
                profile=taken[name].profile,
            )
        )
    return TrainRow(
        mesh=mesh,
        batch=options.batch,
        seq_len=options.seq_len,
        tokens_per_s=speed,
        step_s=step_s,
        mfu=train_flops(spec, options.batch, options.seq_len) / step_s / gemm_flops_per_s,
        losses=tuple(mine.losses),
        start_s=ours.started["start_s"],
        bytes_per_device=mine.last["bytes_per_device"],
        peak_rss_bytes=mine.last["peak_rss_bytes"],
        peers=tuple(beside),
        profile=mine.profile,
    )


def _same(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    return all(abs(a - b) <= SAME_LOSS * abs(b) for a, b in zip(ours, theirs, strict=True))


def _peer_cell(row: TrainRow, name: str) -> str:
    for peer in row.peers:
        if peer.peer != name:
            continue
        if peer.tokens_per_s is None:
            return f"n/a: {peer.error}"
        return f"{peer.ratio:.2f}x {peer.tokens_per_s.median:.1f}" + (
            "" if peer.same_losses else ", losses differ"
        )
    return "-"
