"""A run of the benchmark: engines take turns on the same cases, each in its own process, and the machine's limits are measured in between."""

from __future__ import annotations

import contextlib
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import ParallamaError, RunError
from ..files.config_json import read_config
from ..model.spec import ModelSpec
from ..plan.cost import decode_bytes, prefill_flops
from ..plan.mesh_shape import MeshShape
from ..sharded.loading import DTYPES
from .options import EngineOptions
from .processes import EngineProcess
from .profile import recording
from .rows import PeerResult, Profile, Report, Row, Speed, Start, What

PEERS = ("hf", "hf-compile", "hf-tp", "recipe", "recipe-openxla")
"""Peers by name; see the README for what each is."""
_ONE_PROCESS = ("hf", "hf-compile")
MOST_TOKENS = 16384
"""Cases with more tokens in their prompts together are skipped, and reported so."""
WHATS: tuple[What, ...] = ("prefill", "decode")
_TURN, _WARM_UP = 8, 2  # decode steps; those of the warm-up are not counted
_REPEATED_TOKENS = 4096
Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Options(EngineOptions):
    """What to measure.

    Attributes:
        meshes: the first one also stands as a peer beside the others.
        batches, prompts: every pair is a case.
        steps: decode steps measured in each case.
        repeats: prefills measured in each case (one only, where its prompts have more than 4,096 tokens together).
    """

    PEERS = PEERS

    batches: tuple[int, ...] = (1, 4, 16, 32)
    prompts: tuple[int, ...] = (512, 4096)
    steps: int = 24

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, numbers, least in (
            ("batch", self.batches, 1),
            ("prompt", self.prompts, 1),
            ("steps", (self.steps,), 8),
        ):
            self.check_least(name, min(numbers, default=None), least)


@dataclass
class _Runner:
    """An engine in the run: its process, or why there is none."""

    name: str
    mesh: str
    processes: int
    process: EngineProcess | None = None
    error: str | None = None
    case_error: str | None = None
    tokens: list[list[int]] = field(default_factory=list)
    prefill_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    profiles: dict[What, Profile] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)

    def ask(self, do: str, **arguments: Any) -> dict[str, Any] | None:
        """A command's reply, or None once something of this case has failed."""
        if self.process is None or self.case_error is not None:
            return None
        try:
            self.last = self.last | self.process.ask(do, **arguments)
        except RunError as error:
            self.case_error = first_line(error, self.name)
            return None
        return self.last

    @property
    def started(self) -> dict[str, Any]:
        assert self.process is not None
        return self.process.started

    def begin(self) -> None:
        """Forget the last case."""
        self.case_error, self.tokens, self.prefill_s, self.decode_s, self.profiles, self.last = (
            self.error,
            [],
            [],
            [],
            {},
            {},
        )

    def sample(self, what: What, cores: int, times: int, **arguments: Any) -> None:
        """Ask for `what` so many times, and take a profile of that."""
        if self.process is None or self.case_error is not None:
            return
        with recording(self.process.pid) as taken:
            replies = [self.ask(what, **arguments) for _ in range(times)]
        seconds = [each for reply in replies if reply is not None for each in reply["seconds"]]
        if seconds:
            self.profiles[what] = taken.profile(seconds, cores)


def run(options: Options, command: str, progress: Progress) -> Report:
    """Measure everything that `options` name.

    Args:
        command: how this run was asked for; it goes into the report.
        progress: called with one line for what begins.

    Raises:
        CheckpointError: the model cannot be read.
        ParallamaError: parallama itself could not start on a mesh.
    """
    spec = ModelSpec.from_config(read_config(options.model))
    with contextlib.ExitStack() as stack:
        start = _Starter(options, stack, progress)
        machine = start("machine")
        assert machine.process is not None
        readings = [reading(machine.process)]
        ours = [start("parallama", mesh) for mesh in options.meshes]
        shared = {peer: start(peer) for peer in options.peers if peer in _ONE_PROCESS}
        beside: list[dict[str, _Runner]] = []
        for mesh in options.meshes:
            own = {
                peer: _refused(peer, mesh) or start(peer, mesh)
                for peer in options.peers
                if peer not in _ONE_PROCESS
            }
            first = {f"parallama {ours[0].mesh}": ours[0]} if mesh != options.meshes[0] else {}
            beside.append(first | shared | own)
        everyone = list(
            {id(runner): runner for group in beside for runner in (*ours, *group.values())}.values()
        )
        rows: list[Row] = []
        for prompt in options.prompts:
            for batch in options.batches:
                progress(f"batch {batch}, prompt {prompt}")
                reason = _too_long(options, spec, batch, prompt)
                if reason is not None:
                    rows += _skipped(options, batch, prompt, reason)
                    continue
                between = _measure(machine.process, everyone, options, spec, batch, prompt)
                readings += [each for taken in between.values() for each in taken]
                limits = {
                    what: {
                        name: statistics.median(each[name] for each in taken) for name in taken[0]
                    }
                    for what, taken in between.items()
                }
                for runner, peers in zip(ours, beside, strict=True):
                    rows += _rows(runner, peers, options, spec, batch, prompt, limits)
        versions = ours[0].started["versions"]
        starts = tuple(Start(mesh=runner.mesh, **runner.started["start"]) for runner in ours)
    return Report(**options.about(command, readings, versions), starts=starts, rows=tuple(rows))


class _Starter:
    """Starts engines, which end with the run."""

    def __init__(self, options: Options, stack: contextlib.ExitStack, progress: Progress) -> None:
        self._options, self._stack, self._progress = options, stack, progress

    def __call__(self, name: str, mesh: MeshShape | None = None) -> _Runner:
        mesh = mesh or MeshShape()
        processes = mesh.devices if name == "hf-tp" else 1
        runner = _Runner(name=name, mesh=str(mesh), processes=processes)
        self._progress(f"starting {name} {mesh}")
        try:
            runner.process = self._stack.enter_context(
                EngineProcess(self._options.engine(name, mesh), processes=processes)
            )
        except ParallamaError as error:
            if name in ("parallama", "machine"):
                raise
            runner.error = first_line(error, name)
        return runner


def first_line(error: ParallamaError, name: str) -> str:
    """What an engine says that went wrong."""
    return str(error).splitlines()[0].removeprefix(f"{name}: ")


def reading(machine: EngineProcess) -> dict[str, float]:
    """The machine's limits, as it is now."""
    reply = machine.ask("measure")
    return {name: reply[name] for name in ("bandwidth_bytes_per_s", "gemm_flops_per_s")}


def _refused(peer: str, mesh: MeshShape) -> _Runner | None:
    """A peer that has no way to run on a mesh, with the reason."""
    reason = None
    if mesh.data > 1:
        reason = f"{peer} splits over one axis only, not {mesh}"
    elif peer == "hf-tp" and mesh.devices == 1:
        reason = "hf-tp needs two processes; on one it is hf"
    return (
        _Runner(name=peer, mesh=str(mesh), processes=mesh.devices, error=reason) if reason else None
    )


def _too_long(options: Options, spec: ModelSpec, batch: int, prompt: int) -> str | None:
    if batch * prompt > MOST_TOKENS:
        return f"{batch * prompt} prompt tokens, over the limit of {MOST_TOKENS}"
    if prompt + options.steps + _WARM_UP > spec.max_positions:
        return f"longer than the model's {spec.max_positions} positions"
    return None


def _skipped(options: Options, batch: int, prompt: int, reason: str) -> list[Row]:
    return [
        Row(what=what, mesh=str(mesh), batch=batch, prompt=prompt, skipped=reason)
        for mesh in options.meshes
        for what in WHATS
    ]


def _measure(
    machine: EngineProcess,
    runners: Sequence[_Runner],
    options: Options,
    spec: ModelSpec,
    batch: int,
    prompt: int,
) -> dict[What, list[dict[str, float]]]:
    """One case on every engine, turn by turn; the machine's limits, which drift with its other guests, have their turn, too: those of each round are returned."""
    between: dict[What, list[dict[str, float]]] = {"prefill": [], "decode": []}
    draw = random.Random(batch * 1_000_003 + prompt)
    prompts = [[draw.randrange(spec.vocab) for _ in range(prompt)] for _ in range(batch)]
    repeats = options.repeats if batch * prompt <= _REPEATED_TOKENS else 1
    for runner in runners:
        runner.begin()
        runner.ask("prepare", batch=batch, prompt=prompt, steps=options.steps + _WARM_UP)
        runner.ask("prefill", prompts=prompts)
    for _ in range(repeats):
        between["prefill"].append(reading(machine))
        for runner in runners:
            if (reply := runner.ask("prefill", prompts=prompts)) is not None:
                runner.prefill_s += reply["seconds"]
                runner.tokens = reply["tokens"]
    done = 0
    while done < options.steps + _WARM_UP:
        between["decode"].append(reading(machine))
        # The first turn's first steps warm up: compiling that a peer puts off, and caches.
        steps = min(_TURN + (_WARM_UP if done == 0 else 0), options.steps + _WARM_UP - done)
        for runner in runners:
            if (reply := runner.ask("decode", steps=steps)) is not None:
                runner.decode_s += reply["seconds"][_WARM_UP if done == 0 else 0 :]
                runner.tokens = runner.tokens + reply["tokens"]
        done += steps
    if options.profile:
        for runner in runners:
            runner.sample("prefill", options.cores, repeats, prompts=prompts)
            runner.sample("decode", options.cores, 1, steps=options.steps)
    return between


def _rows(
    ours: _Runner,
    peers: Mapping[str, _Runner],
    options: Options,
    spec: ModelSpec,
    batch: int,
    prompt: int,
    limits: Mapping[What, Mapping[str, float]],
) -> list[Row]:
    """Our rows of a case on one mesh, with the peers beside them; `limits` are the machine's while each was measured."""
    shared: dict[str, Any] = {"mesh": ours.mesh, "batch": batch, "prompt": prompt}
    if ours.case_error is not None:
        return [Row(what=what, **shared, skipped=f"failed: {ours.case_error}") for what in WHATS]
    itemsize = DTYPES[options.dtype].itemsize
    peak = ours.last["peak_rss_bytes"]
    prefill, decode = Speed.of(batch * prompt, ours.prefill_s), Speed.of(batch, ours.decode_s)
    flops = prefill_flops(spec, batch, prompt) / (batch * prompt)
    # The cache grows by a position a step: count its middle.
    moved = decode_bytes(spec, batch, prompt + options.steps // 2, itemsize) / batch
    return [
        Row(
            what="prefill",
            **shared,
            tokens_per_s=prefill,
            mfu=flops * prefill.median / limits["prefill"]["gemm_flops_per_s"],
            peak_rss_bytes=peak,
            profile=ours.profiles.get("prefill"),
            peers=_beside("prefill", prefill, ours, peers, batch * prompt),
        ),
        Row(
            what="decode",
            **shared,
            tokens_per_s=decode,
            mbu=moved * decode.median / limits["decode"]["bandwidth_bytes_per_s"],
            host_ms_per_step=ours.last["host_ms_per_step"],
            peak_rss_bytes=peak,
            profile=ours.profiles.get("decode"),
            peers=_beside("decode", decode, ours, peers, batch),
        ),
    ]


def _beside(
    what: What, speed: Speed, ours: _Runner, peers: Mapping[str, _Runner], tokens: int
) -> tuple[PeerResult, ...]:
    results = []
    for name, peer in peers.items():
        if peer.case_error is not None:
            results.append(PeerResult(peer=name, processes=peer.processes, error=peer.case_error))
            continue
        theirs = Speed.of(tokens, peer.prefill_s if what == "prefill" else peer.decode_s)
        same = (
            peer.tokens[:1] == ours.tokens[:1] if what == "prefill" else peer.tokens == ours.tokens
        )
        results.append(
            PeerResult(
                peer=name,
                processes=peer.processes,
                tokens_per_s=theirs,
                ratio=speed.median / theirs.median,
                same_tokens=same,
                peak_rss_bytes=peer.last["peak_rss_bytes"],
                profile=peer.profiles.get(what),
            )
        )
    return tuple(results)
