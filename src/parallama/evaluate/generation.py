"""Generates the answers of one task of lm-evaluation-harness, in batches of one size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)

from ..engine.row_sampling import RowSampling
from ..errors import UsageError, lines, shown
from ..inference.llm import LLM
from ..inference.sampling_params import SamplingParams
from ..inference.session import Session
from ..inference.text_stream import TextStream
from ..plan.program_shapes import text_size

DEFAULT_NEW_TOKENS = 256
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
# transformers' generation settings that change nothing with these values.
_NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True}


class TaskGeneration:
    """Generates texts with the settings of one task.

    Args:
        llm: the model.
        tokenizer: of transformers.
        given: the harness's generation settings of the task.
        batch: rows of each batch, over all devices.
        eos_text: the text of the tokenizer's end-of-text token.
        seed_of: number of a request -> its seed.

    Attributes:
        new: most tokens that are generated.
        room: tokens of the context that fit in front of them.
        tokens: tokens generated so far.
        programs_compiled: by the engine's own count, in `warm_up`.
        programs_after_warmup: the same, in `run`.

    Raises:
        UsageError: a setting is not known, or leaves no room for a context.
    """

    def __init__(
        self,
        llm: LLM,
        tokenizer: Any,
        given: Mapping[str, Any],
        *,
        batch: int,
        eos_text: str,
        seed_of: Callable[[int], int],
    ) -> None:
        settings: dict[str, Any] = dict(normalize_gen_kwargs(dict(given), DEFAULT_NEW_TOKENS))
        self.tokens = self.programs_compiled = self.programs_after_warmup = 0
        self._llm, self._batch, self._seed_of = llm, batch, seed_of
        self._tokenizer = tokenizer
        self.new: int = settings.pop("max_gen_toks")
        self.room = llm.max_model_len - self.new
        self._until: list[str] = handle_stop_sequences(settings.pop("until"), eos=eos_text)
        if self.new < 1 or self.room < 1:
            raise UsageError(
                lines(
                    f"the task generates {self.new} tokens",
                    f"expected at least one, and fewer than {llm.max_model_len}, "
                    "the model's limit with its context",
                )
            )
        self._params = SamplingParams(**_sampling(settings))
        # A stop string that is a special token is never part of a text: the token itself ends it.
        special = set(self._tokenizer.all_special_tokens)
        stops = {
            self._tokenizer.convert_tokens_to_ids(string)
            for string in self._until
            if string in special
        }
        self._ends = [*llm.eos_ids, *sorted(stops - set(llm.eos_ids))]

    def longest(self, prompts: Sequence[Sequence[int]]) -> int:
        """The prompt length that a batch gets programs for: one of few, so that batches share."""
        size = text_size(max(len(prompt) for prompt in prompts), self._llm.max_model_len)
        return min(size, self.room)

    def warm_up(self, prompts: Sequence[Sequence[int]], requests: Sequence[int]) -> None:
        """Compile every program that `run` needs for a batch of this length."""
        self.programs_compiled += self._session(prompts, requests).stats.programs_compiled

    def run(self, prompts: Sequence[Sequence[int]], requests: Sequence[int]) -> list[str]:
        """Continue a batch of prompts, each until its text ends.

        Args:
            prompts: token ids, at most `room` each.
            requests: the number of each prompt's request.
        """
        session, ends = self._session(prompts, requests), set(self._ends)
        streams = [TextStream(self._tokenizer, self._until) for _ in prompts]
        tokens: list[list[int]] = [[] for _ in prompts]
        live = set(range(len(prompts)))
        choices = session.prefill(prompts)
        steps = session.decode(self.new - 1)
        while True:
            for choice in choices:
                if choice.row in live:
                    tokens[choice.row].append(choice.token)
                    streams[choice.row].push(choice.token)
                    if choice.token in ends or streams[choice.row].stopped:
                        live.discard(choice.row)
            following = next(steps, None) if live else None
            if following is None:
                break
            choices = following
        self.tokens += sum(len(row) for row in tokens)
        compiled = session.stats.programs_compiled + session.stats.programs_after_warmup
        self.programs_after_warmup += compiled
        # Where a text is cut is the harness's to say.
        texts = [self._tokenizer.decode(row, skip_special_tokens=True) for row in tokens]
        return [postprocess_generated_text(text, self._until, None) for text in texts]

    def _session(self, prompts: Sequence[Sequence[int]], requests: Sequence[int]) -> Session:
        """A session with a row for each prompt, filled up to the batch."""
        longest = self.longest(prompts)
        params: list[RowSampling] = [
            self._llm.row_sampling(self._params, self._seed_of(request)) for request in requests
        ]
        return self._llm.session(
            params,
            capacity=longest + self.new,
            longest_prompt=longest,
            eos=self._ends,
            batch=self._batch,
        )


def _sampling(settings: dict[str, Any]) -> dict[str, Any]:
    """Sampling parameters of a task's generation settings; greedy unless it says `do_sample`.

    Raises:
        UsageError: a setting is not known.
    """
    sampled = settings.pop("do_sample")
    sampling = {name: settings.pop(name) for name in _SAMPLING if name in settings}
    for name, value in settings.items():
        if value is not None and _NEUTRAL.get(name) != value:
            raise UsageError(
                lines(
                    f"the task's generation setting {name!r} is {shown(value)}",
                    f"known: do_sample, until, max_gen_toks, {', '.join(_SAMPLING)}",
                )
            )
    if not sampled:
        return sampling | {"temperature": 0.0}
    return {"temperature": 1.0} | sampling
