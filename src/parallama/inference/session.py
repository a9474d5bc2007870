"""Prefill and decode for one batch, on programs that are all compiled before the first token.

A `Session` owns the state of one batch on the devices: its KV cache, positions and last tokens.
Rows have their own lengths and positions. A row's position is also its place in the cache, so a row
never sees another row, or a place that it hasn't written.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from ..engine.interface import DeviceTensor, Engine, Steps
from ..engine.row_sampling import RowSampling
from ..engine.steps import STATE_AXES, cache_names
from ..errors import UsageError, lines
from ..model.token_ids import check_ids
from ..sharded.reshard import Mover
from . import state
from .device_state import DeviceState
from .programs import ProgramSet
from .run_stats import Choice
from .session_shapes import SessionShapes, cached_start


class Session(DeviceState):
    """The state of a batch on the devices, and the programs that move it.

    Rows are filled up to a multiple of the "data" axis with idle ones, which are done from the
    start. Sessions of one model may run in several threads: each step has the devices alone.

    Args:
        steps: the model.
        programs: from `make_programs`. What this session needs is compiled into it here, and
            nothing later.
        rows: sampling parameters, one for each row.
        capacity: most positions that any row will need.
        longest_prompt: most tokens that any prompt will have (ignored if `continued`).
        eos: ids that end a row; empty to ignore them.
        continued: `prefill` may be called again with longer token lists, and computes only what
            is new.
        scored: decode with `feed`, which gives logits, and not with `decode`.
        progress: called with programs compiled and their number.
    """

    def __init__(
        self,
        steps: Steps,
        programs: ProgramSet,
        rows: Sequence[RowSampling],
        *,
        capacity: int,
        longest_prompt: int = 1,
        eos: Sequence[int] = (),
        continued: bool = False,
        scored: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        super().__init__(steps, programs)
        self._count = len(rows)
        self._batch = _filled(len(rows), self.mesh)
        self.shapes = SessionShapes.of(
            batch=self._batch,
            capacity=capacity,
            longest_prompt=longest_prompt,
            continued=continued,
            scored=scored,
        )
        self._rows, self._eos = tuple(rows), tuple(eos)
        self._frozen: set[int] = set()
        self._cached: list[list[int]] = [[] for _ in rows]
        self._length = self.shapes.buckets[0]
        self._constants = self._make_constants()
        self._turn = 0
        self.ready(progress)

    def _make_constants(self) -> dict[str, DeviceTensor]:
        idle = [RowSampling()] * (self._batch - self._count)
        return state.constants(self.steps, [*self._rows, *idle], self._eos)

    # -- moving to another mesh

    def move(self, steps: Steps, programs: ProgramSet, mover: Mover) -> None:
        """Go on with the same model on another mesh, from the same cache.

        Compiles nothing yet: see `ready`.
        """
        self._batch = _filled(self._count, steps.mesh)
        self.shapes = replace(self.shapes, batch=self._batch)
        # Idle rows fill a batch up to the mesh: they go with the old one, and come with the new.
        self._take_along(steps, programs, mover, kept=self._count, rows=self._batch)
        if self._state:
            done = mover.new_mesh.fetch(self._state["done"], STATE_AXES["done"])
            done[self._count :] = True
            self._state |= state.put(steps, {"done": done})
        self._constants = self._make_constants()

    def ready(self, progress: Callable[[int, int], None] | None) -> None:
        """Compile what this session can need that isn't yet, as after a `move`."""
        self._compile(self.shapes.keys(), progress)

    # -- running

    @property
    def cached(self) -> list[list[int]]:
        """For each row the tokens whose keys and values are in the cache."""
        return [row[:] for row in self._cached]

    def prefill(self, prompts: Sequence[Sequence[int]]) -> list[Choice]:
        """Take in each row's whole token list and choose a first token.

        Whatever `decode` gave before is over.

        Raises:
            UsageError: a token id is not of the vocabulary, a prompt is empty, or one is longer
                than the session was made for.
        """
        for prompt in prompts:
            if not prompt:
                raise UsageError(lines("a prompt has no tokens", "expected at least one"))
            check_ids(prompt, self.steps.plan.model.vocab)
        with self._step():
            self._turn += 1
            return self._prefill(prompts)

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> list[Choice]:
        began = time.perf_counter()
        starts = [0] * self._count
        if self.shapes.continued:
            starts = [
                cached_start(row, new) for row, new in zip(self._cached, prompts, strict=True)
            ]
        size, chunks, needed = self.shapes.chunking(starts, [len(prompt) for prompt in prompts])
        self._ensure(needed)
        news = [list(prompt[start:]) for prompt, start in zip(prompts, starts, strict=True)]
        idle = self._batch - self._count
        self._state |= state.put(self.steps, {"done": torch.arange(self._batch) >= self._count})
        self._state |= state.put_span(self.steps, max(len(prompt) for prompt in prompts))
        counts = state.prompt_counts([*prompts, *[[]] * idle], self.steps.plan.vocab)
        self._state |= state.put(self.steps, {"counts": counts})
        # From here on the cache is neither the old rows' nor yet the new ones'.
        self._cached = [[] for _ in self._cached]
        for index in range(chunks):
            chunk = state.prompt_chunk([*news, *[[]] * idle], [*starts, *[0] * idle], size, index)
            given = self._constants | state.put(self.steps, chunk)
            self._advance(self.shapes.prefill(self._length, size), given)
        choices = self._chosen()
        self._cached = [list(prompt) for prompt in prompts]
        self._frozen.clear()
        self.stats.ttft_s = time.perf_counter() - began
        self.stats.prefill_tokens += sum(len(new) for new in news)
        self.stats.prefill_s += self.stats.ttft_s
        return choices

    def decode(self, steps: int) -> Iterator[list[Choice]]:
        """Up to `steps` more tokens a row, one list a step.

        A row past its end is frozen: it chooses nothing and repeats its last token. The iterator is
        over when the session goes on otherwise: by `prefill`, `feed` or another `decode`.

        Raises:
            UsageError: by the iterator, when it is over in this way.
        """
        self._turn += 1
        return self._decoded(steps, self._turn)

    def _decoded(self, steps: int, turn: int) -> Iterator[list[Choice]]:
        pending: list[int] = []
        for _ in range(steps):
            began = time.perf_counter()
            with self._step():
                if self._turn != turn:
                    raise UsageError(
                        lines(
                            "this stream is over: its session has gone on without it",
                            "read one stream of a session or chat at a time",
                        )
                    )
                pending = pending or [choice.token for choice in self._chosen()]
                self._ensure(max(len(row) for row in self._cached) + 1)
                launched, run_s = self._advance(self.shapes.decode(self._length), self._constants)
                choices = self._chosen()
                read = time.perf_counter()
                for row, token, choice in zip(self._cached, pending, choices, strict=True):
                    if choice.row not in self._frozen:
                        row.append(token)
                        if token in self._eos:  # the device now writes it again and again
                            self._frozen.add(choice.row)
                pending = [choice.token for choice in choices]
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
        assert self.shapes.scored
        fed = torch.zeros(self._batch, dtype=torch.long)
        fed[: self._count] = torch.tensor(tokens)
        done = torch.arange(self._batch) >= self._count
        with self._step():
            self._turn += 1
            self._ensure(max(len(row) for row in self._cached) + 1)
            given = self._constants | state.put(self.steps, {"token": fed, "done": done})
            self._advance(self.shapes.decode(self._length), given)
            for row, token in zip(self._cached, tokens, strict=True):
                row.append(token)
            self.stats.decode_steps += 1
            logits = self.mesh.fetch(self._told["logits"], STATE_AXES["logits"])
        return logits[: self._count, : self.steps.plan.model.vocab]

    def _ensure(self, length: int) -> None:
        """Have a cache of at least `length` positions."""
        if length > self.shapes.buckets[-1]:
            raise UsageError(
                lines(
                    f"{length} positions are needed",
                    f"this session was made for {self.shapes.buckets[-1]}",
                )
            )
        if not self._state:
            self._length = next(bucket for bucket in self.shapes.buckets if bucket >= length)
            self._state = state.blank_state(self.steps, self._batch, self._count)
            self._state |= state.empty_cache(self.steps, self._batch, self._length)
        while self._length < length:
            longer = self.shapes.buckets[self.shapes.buckets.index(self._length) + 1]
            names = cache_names(self.steps.plan.model.layers)
            buffers = {name: self._state.pop(name) for name in names}
            self._state |= self._programs[self.shapes.grow(self._length, longer)](buffers)
            self._length = longer

    def _chosen(self) -> list[Choice]:
        return self._read(range(self._count))


def _filled(rows: int, mesh: Engine) -> int:
    return math.ceil(rows / mesh.shape.data) * mesh.shape.data
