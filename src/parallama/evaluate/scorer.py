"""Scores given texts, in batches of one size and of few lengths.

All programs are compiled before the first batch, and none after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..engine.steps import STATE_AXES, StepKey
from ..errors import UsageError, lines
from ..inference import state
from ..inference.llm import LLM
from ..model.token_ids import check_ids
from ..plan.program_shapes import text_size


@dataclass(frozen=True)
class Text:
    """Token ids, of which the last `scored` are scored, given all that come before them."""

    ids: Sequence[int]
    scored: int


@dataclass(frozen=True)
class Score:
    """The score of a text.

    Attributes:
        logprob: sum of the scored tokens' log-probabilities, in nats.
        greedy: greedy decoding would choose exactly these tokens.
    """

    logprob: float
    greedy: bool


class Scorer:
    """Scores texts on a model's devices.

    Args:
        llm: the model.
        batch: texts that are run at once, over all devices. A batch that is not full is filled up
            with idle rows.

    Attributes:
        tokens: tokens that were run so far, without idle rows and padding.
        programs_compiled: by the engine's own count, in `warm_up`.
        programs_after_warmup: the same, while texts were scored.
    """

    def __init__(self, llm: LLM, batch: int) -> None:
        self.batch = batch
        self.tokens = self.programs_compiled = self.programs_after_warmup = 0
        self._llm = llm

    def warm_up(self, texts: Sequence[Text]) -> None:
        """Compile every program that is needed to score these texts."""
        longest = [len(texts[row].ids) - 1 for row in self._checked(texts)[:: self.batch]]
        keys = [self._key(length) for length in longest]
        with self._llm.mesh.counted() as compiled:
            self._llm.programs.warm_up(keys, self._llm.report("compiling"))
            self.programs_compiled += compiled()

    def __call__(
        self, texts: Sequence[Text], progress: Callable[[int, int], None] | None = None
    ) -> list[Score]:
        """Score texts, longest first.

        Args:
            texts: each of 2 to `max_model_len + 1` tokens. The last token of a text is only
                scored, so it needs no position.
            progress: called with the number of texts done, and of all.

        Returns:
            A score for each text, in their order.

        Raises:
            UsageError: a text is too short or too long, or an id is not of the vocabulary.
            ProgramError: `warm_up` was not called with texts as long.
        """
        order = self._checked(texts)
        scores: dict[int, Score] = {}
        for first in range(0, len(order), self.batch):
            rows = order[first : first + self.batch]
            scores.update(zip(rows, self._run([texts[row] for row in rows]), strict=True))
            if progress is not None:
                progress(len(scores), len(texts))
        return [scores[index] for index in range(len(texts))]

    def _checked(self, texts: Sequence[Text]) -> list[int]:
        """The texts' numbers, longest first."""
        limit = self._llm.max_model_len + 1
        for text in texts:
            if not 1 <= text.scored < len(text.ids):
                raise UsageError(
                    lines(
                        f"a text of {len(text.ids)} tokens with {text.scored} to score",
                        "expected at least one, and one before them",
                    )
                )
            if len(text.ids) > limit:
                raise UsageError(
                    lines(
                        f"a text of {len(text.ids)} tokens to score",
                        f"expected at most {limit}: the limit of the model, and one behind it",
                    )
                )
            check_ids(text.ids, self._llm.plan.model.vocab)
        return sorted(range(len(texts)), key=lambda index: -len(texts[index].ids))

    def _key(self, longest: int) -> StepKey:
        """The program for rows of up to `longest` tokens."""
        return StepKey(
            kind="score",
            batch=self.batch,
            length=0,
            new=text_size(longest, self._llm.max_model_len),
            fresh=True,
        )

    def _run(self, rows: Sequence[Text]) -> list[Score]:
        llm, longest = self._llm, len(rows[0].ids) - 1
        key = self._key(longest)
        ids, targets = torch.zeros(2, self.batch, key.new, dtype=torch.long)
        for row, text in enumerate(rows):
            ids[row, : len(text.ids) - 1] = torch.tensor(text.ids[:-1])
            targets[row, : len(text.ids) - 1] = torch.tensor(text.ids[1:])
        with llm.mesh.counted() as compiled:
            given = state.text_arguments(llm.steps, ids, targets, longest=longest)
            out = llm.programs[key](given)
            logprobs = llm.mesh.fetch(out["logprobs"], STATE_AXES["logprobs"]).tolist()
            greedy = llm.mesh.fetch(out["greedy"], STATE_AXES["greedy"]).tolist()
            self.programs_after_warmup += compiled()
        self.tokens += sum(len(text.ids) - 1 for text in rows)
        scores = []
        for row, text in enumerate(rows):
            scored = slice(len(text.ids) - 1 - text.scored, len(text.ids) - 1)
            scores.append(Score(math.fsum(logprobs[row][scored]), all(greedy[row][scored])))
        return scores
