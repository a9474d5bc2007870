"""`parallama bench --train`: whole optimizer steps on each mesh, beside transformers' eager loop.

Both have the same weights, tokens, dtype and cores, and take turns, a step each, in processes of
their own. A mesh ends before the next begins: training state is four times the weights.
"""

from __future__ import annotations

import contextlib
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
from .profile import recording
from .rows import Profile, Speed
from .runners import first_line, reading
from .train_rows import TrainPeer, TrainReport, TrainRow

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
    rows: list[TrainRow] = []
    readings: list[dict[str, float]] = []
    versions: dict[str, str] = {}
    with EngineProcess(options.engine("machine", MeshShape())) as machine:
        for mesh in options.meshes:
            with contextlib.ExitStack() as stack:
                progress(f"starting parallama {mesh}")
                ours = stack.enter_context(EngineProcess(options.engine("parallama", mesh)))
                peers: dict[str, EngineProcess | str] = {}
                for name in options.peers:
                    progress(f"starting {name}")
                    peers[name] = _started(options, name, stack)
                progress(f"{options.repeats} steps of {options.batch} x {options.seq_len} tokens")
                readings.append(reading(machine))
                taken = _take(options, spec, ours, peers)
                readings.append(reading(machine))
                versions = ours.started["versions"]
                peak = max(each["gemm_flops_per_s"] for each in readings[-2:])
                rows.append(_row(options, spec, str(mesh), ours, peers, taken, peak))
    return TrainReport(**options.about(command, readings, versions), rows=tuple(rows))


def _started(options: TrainOptions, name: str, stack: contextlib.ExitStack) -> EngineProcess | str:
    """A peer, or why it does not start."""
    try:
        return stack.enter_context(EngineProcess(options.engine(name, MeshShape())))
    except ParallamaError as error:
        return first_line(error, name)


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
    mine, tokens = taken["parallama"], options.batch * options.seq_len
    step_s = statistics.median(mine.seconds)
    beside = [
        TrainPeer(peer=name, error=engine)
        if isinstance(engine, str)
        else _peer(name, mine, taken[name], tokens)
        for name, engine in peers.items()
    ]
    return TrainRow(
        mesh=mesh,
        batch=options.batch,
        seq_len=options.seq_len,
        tokens_per_s=Speed.of(tokens, mine.seconds),
        step_s=step_s,
        mfu=train_flops(spec, options.batch, options.seq_len) / step_s / gemm_flops_per_s,
        losses=tuple(mine.losses),
        start_s=ours.started["start_s"],
        bytes_per_device=mine.last["bytes_per_device"],
        peak_rss_bytes=mine.last["peak_rss_bytes"],
        peers=tuple(beside),
        profile=mine.profile,
    )


def _peer(name: str, ours: _Taken, theirs: _Taken, tokens: int) -> TrainPeer:
    speed = Speed.of(tokens, theirs.seconds)
    return TrainPeer(
        peer=name,
        tokens_per_s=speed,
        ratio=Speed.of(tokens, ours.seconds).median / speed.median,
        losses=tuple(theirs.losses),
        same_losses=_same(ours.losses, theirs.losses),
        bytes_per_device=theirs.last["bytes_per_device"],
        peak_rss_bytes=theirs.last["peak_rss_bytes"],
        profile=theirs.profile,
    )


def _same(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    return all(abs(a - b) <= SAME_LOSS * abs(b) for a, b in zip(ours, theirs, strict=True))
