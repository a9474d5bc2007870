"""Generates the answers of one task of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)

from ..errors import UsageError, lines, shown
from ..inference.completion import Row
from ..inference.llm import LLM
from ..inference.requests import Request
from ..inference.sampling_params import SamplingParams

DEFAULT_NEW_TOKENS = 256
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
# transformers' generation settings that change nothing with these values.
_NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True}


class TaskGeneration:
    """Continues texts with the settings of one task.

    Args:
        llm: the model.
        tokenizer: of transformers.
        given: the harness's generation settings of the task.
        eos_text: the text of the tokenizer's end-of-text token.

    Attributes:
        room: tokens of the context that fit in front of those that are generated.

    Raises:
        UsageError: a setting is not known, or leaves no room for a context.
    """

    def __init__(
        self, llm: LLM, tokenizer: Any, given: Mapping[str, Any], *, eos_text: str
    ) -> None:
        settings: dict[str, Any] = dict(normalize_gen_kwargs(dict(given), DEFAULT_NEW_TOKENS))
        self._llm, self._tokenizer = llm, tokenizer
        self._new: int = settings.pop("max_gen_toks")
        self.room = llm.max_model_len - self._new
        self._until: list[str] = handle_stop_sequences(settings.pop("until"), eos=eos_text)
        if self._new < 1 or self.room < 1:
            raise UsageError(
                lines(
                    f"the task generates {self._new} tokens",
                    f"expected at least one, and fewer than {llm.max_model_len}, "
                    "the model's limit with its context",
                )
            )
        self._params = SamplingParams(**_sampling(settings), stop=self._until)

    def request(self, ids: list[int], seed: int) -> tuple[Request, Row]:
        """A context to continue, of at most `room` tokens, and the row that follows it."""
        request = self._llm.request(ids, self._params, seed, self._new)
        return request, self._llm.row(request)

    def text(self, row: Row) -> str:
        """What has come of a row. Where a text is cut is the harness's to say."""
        whole = self._tokenizer.decode(row.token_ids, skip_special_tokens=True)
        return postprocess_generated_text(whole, self._until, None)


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
