"""A run of the benchmark: engines take turns on the same cases, each in a process of its own.

The machine's limits are measured in between.
"""

from __future__ import annotations

import contextlib
import random
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..files.config_json import read_config
from ..model.spec import ModelSpec
from ..plan.cost import decode_bytes, prefill_flops
from ..plan.mesh_shape import MeshShape
from ..sharded.loading import DTYPES
from .options import EngineOptions
from .processes import EngineProcess
from .rows import PeerResult, Report, Row, Speed, Start, What
from .runners import Runner, Starter, reading

PEERS = ("hf", "hf-compile", "hf-tp", "recipe", "recipe-openxla")
"""Peers by name; see the README for what each is."""
_ONE_PROCESS = ("hf", "hf-compile")
MOST_TOKENS = 16384
"""Cases with more tokens in their prompts together are skipped, and reported so."""
WHATS: tuple[What, ...] = ("prefill", "decode")
_TURN, _WARM_UP = 8, 2  # decode steps; those of the warm-up are not counted
_REPEATED_TOKENS = 4096

Limits = Mapping[What, Mapping[str, float]]
"""The machine's, while each of `WHATS` was measured."""


@dataclass(frozen=True, kw_only=True)
class Options(EngineOptions):
    """What to measure.

    Attributes:
        meshes: the first one also stands as a peer beside the others.
        batches, prompts: every pair is a case.
        steps: decode steps measured in each case.
        repeats: prefills measured in each case; one only, where its prompts have more than 4,096
            tokens together.
    """

    PEERS = PEERS

    batches: tuple[int, ...] = (1, 4, 16, 32)
    prompts: tuple[int, ...] = (512, 4096)
    steps: int = 24

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_least("batch", min(self.batches, default=None), 1)
        self.check_least("prompt", min(self.prompts, default=None), 1)
        self.check_least("steps", self.steps, 8)


@dataclass(frozen=True, kw_only=True)
class _Case:
    """Prompts of one length, as many as rows."""

    options: Options
    spec: ModelSpec
    batch: int
    prompt: int

    @property
    def too_long(self) -> str | None:
        """Why it is not run."""
        tokens, positions = self.batch * self.prompt, self.spec.max_positions
        if tokens > MOST_TOKENS:
            return f"{tokens} prompt tokens, over the limit of {MOST_TOKENS}"
        if self.prompt + self.options.steps + _WARM_UP > positions:
            return f"longer than the model's {positions} positions"
        return None

    @property
    def repeats(self) -> int:
        return self.options.repeats if self.batch * self.prompt <= _REPEATED_TOKENS else 1

    def prompts(self) -> list[list[int]]:
        """Token ids, the same in every run."""
        draw = random.Random(self.batch * 1_000_003 + self.prompt)
        return [
            [draw.randrange(self.spec.vocab) for _ in range(self.prompt)] for _ in range(self.batch)
        ]


def run(options: Options, command: str, progress: Callable[[str], None]) -> Report:
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
        start = Starter(options, stack, progress)
        machine = start.process("machine", MeshShape())
        readings = [reading(machine)]
        ours = [start.ours(mesh) for mesh in options.meshes]
        beside = _peers(options, start, ours[0])
        groups = ((*ours, *peers.values()) for peers in beside)
        everyone = _distinct(runner for group in groups for runner in group)
        rows: list[Row] = []
        for prompt in options.prompts:
            for batch in options.batches:
                progress(f"batch {batch}, prompt {prompt}")
                case = _Case(options=options, spec=spec, batch=batch, prompt=prompt)
                if case.too_long is not None:
                    rows += _skipped(case, case.too_long)
                    continue
                between = _measure(machine, everyone, case)
                readings += [each for taken in between.values() for each in taken]
                limits = {what: _median(taken) for what, taken in between.items()}
                for runner, peers in zip(ours, beside, strict=True):
                    rows += _rows(runner, peers, case, limits)
        versions = ours[0].started["versions"]
        starts = tuple(Start(mesh=runner.mesh, **runner.started["start"]) for runner in ours)
    return Report(**options.about(command, readings, versions), starts=starts, rows=tuple(rows))


def _peers(options: Options, start: Starter, first: Runner) -> list[dict[str, Runner]]:
    """For each mesh its peers by name; those in one process are the same on every mesh."""
    shared = {peer: start.peer(peer, MeshShape()) for peer in options.peers if peer in _ONE_PROCESS}
    beside = []
    for mesh in options.meshes:
        own = {peer: start.peer(peer, mesh) for peer in options.peers if peer not in _ONE_PROCESS}
        ours = {f"parallama {first.mesh}": first} if mesh != options.meshes[0] else {}
        beside.append(ours | shared | own)
    return beside


def _distinct(runners: Iterable[Runner]) -> list[Runner]:
    return list({id(runner): runner for runner in runners}.values())


def _median(readings: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.median(each[name] for each in readings) for name in readings[0]}


def _skipped(case: _Case, reason: str) -> list[Row]:
    return [
        Row(what=what, mesh=str(mesh), batch=case.batch, prompt=case.prompt, skipped=reason)
        for mesh in case.options.meshes
        for what in WHATS
    ]


def _measure(
    machine: EngineProcess, runners: Sequence[Runner], case: _Case
) -> dict[What, list[dict[str, float]]]:
    """One case on every engine, turn by turn.

    The machine's limits have their turn, too, for they drift with its other guests.

    Returns:
        The limits in each round.
    """
    between: dict[What, list[dict[str, float]]] = {"prefill": [], "decode": []}
    options, prompts = case.options, case.prompts()
    all_steps = options.steps + _WARM_UP
    for runner in runners:
        runner.begin()
        runner.ask("prepare", batch=case.batch, prompt=case.prompt, steps=all_steps)
        runner.ask("prefill", prompts=prompts)
    for _ in range(case.repeats):
        between["prefill"].append(reading(machine))
        for runner in runners:
            if (reply := runner.ask("prefill", prompts=prompts)) is not None:
                runner.prefill_s += reply["seconds"]
                runner.tokens = reply["tokens"]
    done = 0
    while done < all_steps:
        between["decode"].append(reading(machine))
        # The first turn's first steps warm up: compiling that a peer puts off, and caches.
        warm_up = _WARM_UP if done == 0 else 0
        steps = min(_TURN + warm_up, all_steps - done)
        for runner in runners:
            if (reply := runner.ask("decode", steps=steps)) is not None:
                runner.decode_s += reply["seconds"][warm_up:]
                runner.tokens = runner.tokens + reply["tokens"]
        done += steps
    if options.profile:
        for runner in runners:
            runner.sample("prefill", options.cores, case.repeats, prompts=prompts)
            runner.sample("decode", options.cores, 1, steps=options.steps)
    return between


def _rows(ours: Runner, peers: Mapping[str, Runner], case: _Case, limits: Limits) -> list[Row]:
    """Our rows of a case on one mesh, with the peers beside them."""
    batch, prompt, spec = case.batch, case.prompt, case.spec
    shared: dict[str, Any] = {"mesh": ours.mesh, "batch": batch, "prompt": prompt}
    if ours.case_error is not None:
        return [Row(what=what, **shared, skipped=f"failed: {ours.case_error}") for what in WHATS]
    shared["peak_rss_bytes"] = ours.last["peak_rss_bytes"]
    prefill, decode = Speed.of(batch * prompt, ours.prefill_s), Speed.of(batch, ours.decode_s)
    flops = prefill_flops(spec, batch, prompt) / (batch * prompt)
    # The cache grows by a position a step: count its middle.
    positions = prompt + case.options.steps // 2
    moved = decode_bytes(spec, batch, positions, DTYPES[case.options.dtype].itemsize) / batch
    return [
        Row(
            what="prefill",
            **shared,
            tokens_per_s=prefill,
            mfu=flops * prefill.median / limits["prefill"]["gemm_flops_per_s"],
            profile=ours.profiles.get("prefill"),
            peers=_beside("prefill", prefill, ours, peers, batch * prompt),
        ),
        Row(
            what="decode",
            **shared,
            tokens_per_s=decode,
            mbu=moved * decode.median / limits["decode"]["bandwidth_bytes_per_s"],
            host_ms_per_step=ours.last["host_ms_per_step"],
            profile=ours.profiles.get("decode"),
            peers=_beside("decode", decode, ours, peers, batch),
        ),
    ]


def _beside(
    what: What, speed: Speed, ours: Runner, peers: Mapping[str, Runner], tokens: int
) -> tuple[PeerResult, ...]:
    results = []
    for name, peer in peers.items():
        if peer.case_error is not None:
            results.append(PeerResult(peer=name, processes=peer.processes, error=peer.case_error))
            continue
        compared = 1 if what == "prefill" else None  # a prefill chooses the first tokens only
        theirs = Speed.of(tokens, peer.prefill_s if what == "prefill" else peer.decode_s)
        results.append(
            PeerResult(
                peer=name,
                processes=peer.processes,
                tokens_per_s=theirs,
                ratio=speed.median / theirs.median,
                same_tokens=peer.tokens[:compared] == ours.tokens[:compared],
                peak_rss_bytes=peer.last["peak_rss_bytes"],
                profile=peer.profiles.get(what),
            )
        )
    return tuple(results)
