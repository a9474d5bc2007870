"""What a benchmark asks of an engine, and parallama as one of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from ..engine.row_sampling import RowSampling
from ..inference.llm import LLM
from ..inference.run_stats import Choice, RunStats
from ..inference.session import Session


class Engine(Protocol):
    """One way to run a model; it lives in a process of its own."""

    def prepare(self, batch: int, prompt: int, steps: int) -> None:
        """Allocate and compile for `batch` rows of `prompt` tokens and `steps` decode steps."""
        ...

    def prefill(self, prompts: list[list[int]]) -> list[int]:
        """Start anew with a prompt for every row, all of one length.

        Returns:
            Each row's first greedy token, on the host.
        """
        ...

    def decode(self) -> list[int]:
        """One step: the next greedy token of every row, on the host."""
        ...

    def close(self) -> None:
        """End what else the engine started."""
        ...


class Ours:
    """parallama, through the same sessions that `LLM.generate` uses."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self._session: Session | None = None
        self._steps = 0
        self._decoded: Iterator[list[Choice]] = iter(())

    @property
    def stats(self) -> RunStats:
        """Of the session of the last `prepare`."""
        return self.session.stats

    @property
    def session(self) -> Session:
        assert self._session is not None, "prepare comes first"
        return self._session

    def prepare(self, batch: int, prompt: int, steps: int) -> None:
        """See `Engine.prepare`."""
        self._steps = steps
        rows = [RowSampling()] * batch
        self._session = Session(
            self.llm.steps, self.llm.programs, rows, capacity=prompt + steps, longest_prompt=prompt
        )

    def prefill(self, prompts: list[list[int]]) -> list[int]:
        """See `Engine.prefill`."""
        tokens = [choice.token for choice in self.session.prefill(prompts)]
        self._decoded = self.session.decode(self._steps)
        return tokens

    def decode(self) -> list[int]:
        """See `Engine.decode`."""
        return [choice.token for choice in next(self._decoded)]

    def close(self) -> None:
        """Nothing else runs."""
