"""Prefill and decode for a ragged batch, on programs that are all compiled before the first token.

A `Session` owns the state of one batch on the devices: its KV cache, positions and last tokens. Rows have their own lengths and positions; slot
and position are the same number, so a row never sees another row or a place that it hasn't written.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from . import cache
from .buckets import CHUNK, cache_buckets, chunk_size, prompt_buckets
from .errors import UsageError, lines
from .mesh import DeviceMesh
from .plan import Plan
from .program import Program, ProgramSet, compiled_programs
from .reshard import Mover
from .rotary import SPAN
from .sampling import GREEDY, Mode, SamplingParams, host_params
from .shard import Layout, check_ids
from .steps import STATE_AXES, StepKey, Steps
from .topology import DATA

MOST_EOS = 16
_CONTINUED_CHUNKS = (64, CHUNK)


@dataclass(kw_only=True)
class RunStats:
    """What a session measured: seconds of wall clock, and counts.

    Attributes:
        compile_s: of making programs, tracing included.
        trace_s: the tracing.
        ttft_s: of the last prefill, until its tokens were on the host.
        decode_host_s: part of `decode_s` outside of the executable and of waiting for its results.
        programs_compiled: by torch-xla's own count, while the session warmed up.
        programs_after_warmup: the same, since then.
    """

    compile_s: float = 0.0
    trace_s: float = 0.0
    ttft_s: float = 0.0
    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_steps: int = 0
    decode_s: float = 0.0
    decode_host_s: float = 0.0
    programs_compiled: int = 0
    programs_after_warmup: int = 0


@dataclass(frozen=True)
class Choice:
    """One row's token in one step, with its log-probability under the model's own distribution."""

    row: int
    token: int
    logprob: float


def make_programs(steps: Steps) -> ProgramSet:
    """The programs of a model, empty; sessions on the same model share what they compile."""

    def build(key: StepKey) -> Program:
        if key.kind in ("logits", "score"):
            ids = torch.zeros(key.batch, key.new, dtype=torch.long)
            return steps.build(key, text_arguments(steps, ids, ids if key.kind == "score" else None, longest=1))
        buffers = _allocate(steps, key.batch, key.length)
        if key.kind == "grow":
            return steps.build(key, buffers)
        rows = [SamplingParams()] * key.batch
        arguments = _constants(steps, rows, key.mode, []) | _blank_state(steps, key.batch, key.batch, key.mode) | buffers
        if key.kind == "prefill":
            arguments |= _put(steps, _chunk([[0]] * key.batch, [0] * key.batch, key.new, 0))
        return steps.build(key, arguments)

    return ProgramSet(build, lambda key: key.parts())


class Session:
    """The state of a batch on the devices, and the programs that move it.

    Rows are filled up to a multiple of the "data" axis with idle ones, which are done from the start.

    Args:
        steps: the model.
        programs: from `make_programs`; what this session needs is compiled into it here, and nothing later.
        rows: sampling parameters, one for each row.
        capacity: most positions that any row will need.
        longest_prompt: most tokens that any prompt will have (ignored if `continued`).
        eos: ids that end a row; empty to ignore them.
        continued: `prefill` may be called again with longer token lists, and computes only what is new.
        scored: decode with `feed`, which gives logits, and not with `decode`.
        batch: fill up to so many rows, so that a batch that is not full needs no other programs.
        progress: called with programs compiled and their number.
    """

    def __init__(
        self,
        steps: Steps,
        programs: ProgramSet,
        rows: Sequence[SamplingParams],
        *,
        capacity: int,
        longest_prompt: int = 1,
        eos: Sequence[int] = (),
        continued: bool = False,
        scored: bool = False,
        batch: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.steps, self.mesh = steps, steps.mesh
        self.stats = RunStats()
        self._programs = programs
        self._count = len(rows)
        self._batch = _filled(max(len(rows), batch), self.mesh)
        self._mode = GREEDY
        for row in rows:
            self._mode = self._mode | row.mode
        self._continued = continued
        self._scored = scored
        if continued:
            self.buckets = cache_buckets(capacity + min(_CONTINUED_CHUNKS), smallest=2048, rows=self._batch)
            self._chunks: tuple[int, ...] = tuple(size for size in _CONTINUED_CHUNKS if size <= self.buckets[-1])
        else:
            self._chunks = (chunk_size(longest_prompt),)
            self.buckets = prompt_buckets(capacity, longest_prompt, rows=self._batch)
        self._fresh = not continued and longest_prompt <= CHUNK
        self._rows, self._eos = tuple(rows), tuple(eos)
        self._frozen: set[int] = set()
        self._cached: list[list[int]] = [[] for _ in rows]
        self._length = self.buckets[0]
        self._constants = _constants(steps, [*rows, *[SamplingParams()] * (self._batch - self._count)], self._mode, eos)
        self._state: dict[str, torch.Tensor] = {}
        self._late = 0
        self._warm_up(progress)

    def _warm_up(self, progress: Callable[[int, int], None] | None) -> None:
        before, traced, began = compiled_programs(), self._programs.trace_s, time.perf_counter()
        self._programs.warm_up(self._keys(), progress)
        self.stats.trace_s += self._programs.trace_s - traced
        self.stats.compile_s += time.perf_counter() - began
        self._compiled = compiled_programs()
        self.stats.programs_compiled += self._compiled - before

    def _keys(self) -> list[StepKey]:
        """Every program this session can ever need."""
        starts = self.buckets if self._continued else self.buckets[:1]
        keys = [self._prefill_key(length, size) for length in starts for size in self._chunks if size <= length]
        keys += [self._decode_key(length) for length in self.buckets]
        keys += [self._grow_key(short, long) for short, long in zip(self.buckets, self.buckets[1:], strict=False)]
        return keys

    def _prefill_key(self, length: int, size: int) -> StepKey:
        return StepKey(kind="prefill", batch=self._batch, length=length, new=size, fresh=self._fresh, mode=self._mode)

    def _decode_key(self, length: int) -> StepKey:
        return StepKey(kind="decode", batch=self._batch, length=length, mode=self._mode, scored=self._scored)

    def _grow_key(self, short: int, long: int) -> StepKey:
        return StepKey(kind="grow", batch=self._batch, length=short, new=long)

    def tensors(self) -> list[torch.Tensor]:
        """What it holds on the devices that would move with it."""
        return list(self._state.values())

    def leave(self) -> None:
        """Let go of the programs, which hold the model's weights: what follows is `move`."""
        self._late = self.stats.programs_after_warmup
        self._programs = make_programs(self.steps)

    def move(self, steps: Steps, programs: ProgramSet, mover: Mover) -> None:
        """Go on with the same model on another mesh, from the same cache. Compiles nothing yet: see `ready`."""
        old, new = self.steps.plan, steps.plan
        self.steps, self.mesh, self._programs = steps, steps.mesh, programs
        self._batch = _filled(self._count, self.mesh)
        layouts = {name: _state_layout(name, tuple(tensor.shape), old) for name, tensor in self._state.items()}
        # Idle rows fill a batch up to the mesh; they go with the old one, and come with the new one.
        self._state = mover(
            self._state,
            layouts.__getitem__,
            lambda name: _state_layout(name, self._shape(layouts[name]), new),
            rows=self._count,
        )
        if self._state:
            done = mover.new_mesh.fetch(self._state["done"], STATE_AXES["done"])
            done[self._count :] = True
            self._state |= _put(steps, {"done": done})
        idle = [SamplingParams()] * (self._batch - self._count)
        self._constants = _constants(steps, [*self._rows, *idle], self._mode, self._eos)

    def _shape(self, before: Layout) -> tuple[int, ...]:
        """The shape of a tensor of the state now, from that on another mesh."""
        return (self._batch, *before.shape[1:]) if before.axes[0] == DATA else before.shape

    def ready(self, progress: Callable[[int, int], None] | None) -> None:
        """Compile what this session can need after a `move`."""
        self._warm_up(progress)

    @property
    def cached(self) -> list[list[int]]:
        """For each row the tokens whose keys and values are in the cache."""
        return [row[:] for row in self._cached]

    def cache_bytes_per_device(self) -> list[int]:
        """Bytes of KV cache on each device, measured on its shards."""
        totals = [0] * self.mesh.shape.devices
        for name, tensor in self._state.items():
            if name.startswith("cache."):
                totals = [total + size for total, size in zip(totals, self.mesh.local_bytes(tensor), strict=True)]
        return totals

    def prefill(self, prompts: Sequence[Sequence[int]]) -> list[Choice]:
        """Take in each row's whole token list and choose a first token.

        Raises:
            UsageError: a token id is not of the vocabulary, a prompt is empty, or one is longer than the session was made for.
        """
        began = time.perf_counter()
        for prompt in prompts:
            if not prompt:
                raise UsageError(lines("a prompt has no tokens", "expected at least one"))
            check_ids(prompt, self.steps.plan.model.vocab)
        starts = [0] * self._count
        if self._continued:
            starts = [min(_common_prefix(row, new), len(new) - 1) for row, new in zip(self._cached, prompts, strict=True)]
        size, chunks, needed = self._chunking(starts, [len(prompt) for prompt in prompts])
        self._ensure(needed)
        news = [list(prompt[start:]) for prompt, start in zip(prompts, starts, strict=True)]
        idle = self._batch - self._count
        done = [row >= self._count for row in range(self._batch)]
        self._state |= _put(self.steps, {"done": torch.tensor(done)}) | put_span(self.steps, max(len(prompt) for prompt in prompts))
        if self._mode.penalty:
            self._state |= _put(self.steps, {"seen": self._seen(prompts)})
        for index in range(chunks):
            chunk = _chunk([*news, *[[] for _ in range(idle)]], [*starts, *[0] * idle], size, index)
            self._advance(self._prefill_key(self._length, size), _put(self.steps, chunk))
        choices = self._read()
        self._cached = [list(prompt) for prompt in prompts]
        self._frozen.clear()
        self.stats.ttft_s = time.perf_counter() - began
        self.stats.prefill_tokens += sum(len(new) for new in news)
        self.stats.prefill_s += self.stats.ttft_s
        self._count_programs()
        return choices

    def decode(self, steps: int) -> Iterator[list[Choice]]:
        """Up to `steps` more tokens a row, one list a step. A row past its end is frozen: it chooses nothing and repeats its last token."""
        pending = [choice.token for choice in self._read()]
        longest = max(len(row) for row in self._cached)
        for step in range(steps):
            began = time.perf_counter()
            self._ensure(longest + step + 1)
            launched, run_s = self._advance(self._decode_key(self._length))
            choices = self._read()
            read = time.perf_counter()
            for row, choice in zip(self._cached, choices, strict=True):
                if choice.row not in self._frozen:
                    row.append(pending[choice.row])
                    if pending[choice.row] in self._eos:  # from here on the device writes this token again and again, to one place
                        self._frozen.add(choice.row)
                    pending[choice.row] = choice.token
            self._count_programs()
            ended = time.perf_counter()
            self.stats.decode_steps += 1
            self.stats.decode_s += ended - began
            self.stats.decode_host_s += (launched - began) - run_s + (ended - read)
            yield choices

    def feed(self, tokens: Sequence[int]) -> torch.Tensor:
        """One decode step with tokens from outside, in place of those that were chosen.

        Returns:
            Logits of what comes after them, fp32 `[B, V]`.
        """
        assert self._scored
        fed = torch.zeros(self._batch, dtype=torch.long)
        fed[: self._count] = torch.tensor(tokens)
        done = torch.arange(self._batch) >= self._count
        self._ensure(max(len(row) for row in self._cached) + 1)
        self._advance(self._decode_key(self._length), _put(self.steps, {"token": fed, "done": done}))
        for row, token in zip(self._cached, tokens, strict=True):
            row.append(token)
        self._count_programs()
        self.stats.decode_steps += 1
        return self.mesh.fetch(self._state["logits"], STATE_AXES["logits"])[: self._count, : self.steps.plan.model.vocab]

    def _chunking(self, starts: Sequence[int], ends: Sequence[int]) -> tuple[int, int, int]:
        """How to prefill rows from `starts` to `ends`: chunk size, number of chunks, and places that the cache must have.

        The smallest size that takes every row at once, else the largest that fits.
        """

        def plan(size: int) -> tuple[int, int, int]:
            counts = [math.ceil((end - start) / size) for start, end in zip(starts, ends, strict=True)]
            chunks = max(counts)
            # A row that is through earlier than others has further chunks written behind its end.
            reach = [
                start + count * size if count == chunks else end + size for start, count, end in zip(starts, counts, ends, strict=True)
            ]
            return size, chunks, max(reach)

        plans = [plan(size) for size in self._chunks]
        fitting = [made for made in plans if made[2] <= self.buckets[-1]] or plans[:1]
        return min(fitting, key=lambda made: (made[1], made[0]))

    def _ensure(self, length: int) -> None:
        """Have a cache of at least `length` positions."""
        if length > self.buckets[-1]:
            raise UsageError(lines(f"{length} positions are needed", f"this session was made for {self.buckets[-1]}"))
        if not self._state:
            self._length = next(bucket for bucket in self.buckets if bucket >= length)
            self._state = _blank_state(self.steps, self._batch, self._count, self._mode) | _allocate(self.steps, self._batch, self._length)
        while self._length < length:
            longer = self.buckets[self.buckets.index(self._length) + 1]
            buffers = {name: self._state.pop(name) for name in cache.names(self.steps.plan.model.layers)}
            self._state |= self._programs[self._grow_key(self._length, longer)](buffers)
            self._length = longer

    def _advance(self, key: StepKey, extra: dict[str, torch.Tensor] | None = None) -> tuple[float, float]:
        """Hand one step to the devices; returns when that was done, and the seconds spent in the executable's call."""
        program = self._programs[key]
        outputs = program(self._constants | self._state | (extra or {}))
        launched = time.perf_counter()
        self._state |= outputs
        return launched, program.last_run_s

    def _read(self) -> list[Choice]:
        tokens, logprobs = (self.mesh.fetch(self._state[name], (DATA,)).tolist() for name in ("token", "logprob"))
        return [Choice(row, tokens[row], logprobs[row]) for row in range(self._count)]

    def _seen(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        seen = torch.zeros(self._batch, self.steps.plan.vocab, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            seen[row, list(prompt)] = True
        return seen

    def _count_programs(self) -> None:
        self.stats.programs_after_warmup = self._late + compiled_programs() - self._compiled


def _filled(rows: int, mesh: DeviceMesh) -> int:
    return math.ceil(rows / mesh.shape.data) * mesh.shape.data


def _state_layout(name: str, shape: tuple[int, ...], plan: Plan) -> Layout:
    """How a tensor of a session's state lies, whose dims but heads and vocabulary are those of `shape`."""
    axes, blocks = STATE_AXES.get(name, cache.AXES), None
    if name.startswith("cache."):
        blocks = plan.cache_blocks()
    elif name in ("seen", "logits"):
        blocks = plan.vocab_blocks()
    if blocks is not None:
        shape = (shape[0], len(blocks.sources), *shape[2:])
    return Layout(mesh=plan.mesh, shape=shape, axes=axes, blocks=blocks)


def _put(steps: Steps, host: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: steps.mesh.put(tensor, STATE_AXES[name]) for name, tensor in host.items()}


def put_span(steps: Steps, longest: int) -> dict[str, torch.Tensor]:
    """The argument that says how many positions the longest row has, for steps that take it."""
    return _put(steps, {SPAN: torch.tensor([longest], dtype=torch.int32)}) if steps.follows_span else {}


def text_arguments(steps: Steps, ids: torch.Tensor, targets: torch.Tensor | None, *, longest: int) -> dict[str, torch.Tensor]:
    """Arguments of a step that runs texts `ids` `[B, S]` at once: for their logits, or to score `targets` `[B, S]`. The longest row has `longest` tokens."""
    host = {"ids": ids, "start": torch.zeros(len(ids), dtype=torch.int32)} | ({} if targets is None else {"targets": targets})
    return _put(steps, host) | put_span(steps, longest)


def _allocate(steps: Steps, batch: int, length: int) -> dict[str, torch.Tensor]:
    plan = steps.plan
    return cache.allocate(steps.mesh, plan.model.layers, batch, plan.head_layout.slots, plan.model.head_dim, length, steps.dtype)


def _constants(steps: Steps, rows: list[SamplingParams], mode: Mode, eos: Sequence[int]) -> dict[str, torch.Tensor]:
    """What stays the same for a whole run: the rows' sampling parameters and the ids that end a row."""
    if len(eos) > MOST_EOS:
        raise UsageError(lines(f"{len(eos)} end-of-text ids", f"expected at most {MOST_EOS}"))
    host = host_params(rows)
    if not mode.sample:
        host = {name: value for name, value in host.items() if name == "penalty"}
    if not mode.penalty:
        del host["penalty"]
    return _put(steps, host | {"eos": torch.tensor([*eos, *[-1] * (MOST_EOS - len(eos))], dtype=torch.long)})


def _blank_state(steps: Steps, batch: int, live: int, mode: Mode) -> dict[str, torch.Tensor]:
    host = {
        "token": torch.zeros(batch, dtype=torch.long),
        "logprob": torch.zeros(batch),
        "position": torch.zeros(batch, dtype=torch.int32),
        "done": torch.tensor([row >= live for row in range(batch)]),
    }
    if mode.penalty:
        host["seen"] = torch.zeros(batch, steps.plan.vocab, dtype=torch.bool)
    return _put(steps, host) | put_span(steps, 1)


def _chunk(news: Sequence[Sequence[int]], starts: Sequence[int], size: int, index: int) -> dict[str, torch.Tensor]:
    """Host arguments of chunk `index` of a prefill. Rows are filled up with id 0 at places that are written again before anything sees them."""
    ids = torch.zeros(len(news), size, dtype=torch.long)
    parts = [new[index * size : (index + 1) * size] for new in news]
    begins = [start + (index * size if part else len(new)) for new, start, part in zip(news, starts, parts, strict=True)]
    for row, part in enumerate(parts):
        ids[row, : len(part)] = torch.tensor(part, dtype=torch.long)
    return {
        "ids": ids,
        "start": torch.tensor(begins, dtype=torch.int32),
        "count": torch.tensor([len(part) for part in parts], dtype=torch.int32),
        "final": torch.tensor([bool(part) and len(new) <= (index + 1) * size for part, new in zip(parts, news, strict=True)]),
    }


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))
