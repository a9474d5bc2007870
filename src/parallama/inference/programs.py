"""The programs of a model: declared before a run, compiled by `warm_up`, then closed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..engine.interface import Compiled, Steps
from ..engine.row_sampling import RowSampling
from ..engine.steps import StepKey
from ..errors import ProgramError, lines
from . import state


class ProgramSet:
    """The programs of a run: declared before it, compiled by `warm_up`, then closed.

    Args:
        build: makes the program of a key.
    """

    def __init__(self, build: Callable[[StepKey], Compiled]) -> None:
        self._build = build
        self._programs: dict[StepKey, Compiled] = {}
        self.trace_s = 0.0

    def __len__(self) -> int:
        return len(self._programs)

    def warm_up(
        self, keys: Sequence[StepKey], progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Compile the programs of `keys` that aren't yet."""
        todo = [key for key in dict.fromkeys(keys) if key not in self._programs]
        for done, key in enumerate(todo):
            if progress is not None:
                progress(done, len(todo))
            self._programs[key] = self._build(key)
            self.trace_s += self._programs[key].trace_s
        if progress is not None and todo:
            progress(len(todo), len(todo))

    def __getitem__(self, key: StepKey) -> Compiled:
        """The program of a key.

        Raises:
            ProgramError: it was not declared; the message names the part that differs from the
                nearest one that was.
        """
        try:
            return self._programs[key]
        except KeyError:
            raise ProgramError(self._difference(key)) from None

    def _difference(self, key: StepKey) -> str:
        asked = dict(key.parts())
        known = [dict(other.parts()) for other in self._programs]
        if not known:
            return lines(
                f"no program was compiled before the run; {asked} was asked for",
                "call warm_up first",
            )
        nearest = min(
            known,
            key=lambda other: sum(asked.get(part) != other.get(part) for part in asked | other),
        )
        parts = [
            f"{part} is {asked.get(part)!r}, known: {nearest.get(part)!r}"
            for part in asked | nearest
            if asked.get(part) != nearest.get(part)
        ]
        return lines(
            f"this step is none of the {len(known)} programs known before the run",
            "; ".join(parts),
            "declare it in warm_up",
        )


def make_programs(steps: Steps) -> ProgramSet:
    """The programs of a model, empty; sessions on the same model share what they compile."""

    def build(key: StepKey) -> Compiled:
        if key.kind in ("logits", "score"):
            ids = torch.zeros(key.batch, key.new, dtype=torch.long)
            targets = ids if key.kind == "score" else None
            return steps.compile(key, state.text_arguments(steps, ids, targets, longest=1))
        given = state.empty_cache(steps, key.batch, key.length)
        if key.kind == "grow":
            return steps.compile(key, given)
        if key.kind.startswith("slot_"):
            return steps.compile(key, given | state.slot_arguments(steps, key))
        rows = [RowSampling()] * key.batch
        given |= state.constants(steps, rows, [])
        given |= state.blank_state(steps, key.batch, key.batch)
        if key.kind == "prefill":
            chunk = state.prompt_chunk([[0]] * key.batch, [0] * key.batch, key.new, 0)
            given |= state.put(steps, chunk)
        return steps.compile(key, given)

    return ProgramSet(build)
