"""How a prompt is continued: sampling, limits and ends, by vLLM's and transformers' names. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

from ..engine.row_sampling import RowSampling, check_seed
from ..errors import UsageError, lines, shown

SAMPLERS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_ALIASES = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "num_return_sequences": "n",
    "stop_strings": "stop",
    "stop_sequences": "stop",
    "temp": "temperature",
}
_OTHERWISE = {
    "do_sample": "temperature=0 is greedy, anything above samples",
    "max_length": "max_new_tokens counts new tokens alone; max_model_len is an option of load",
    "num_beams": "beam search is not supported",
    "use_tqdm": "progress=False is an option of load",
    "sampler": "give temperature, top_k, top_p or min_p",
    "verbose": "stream gives the text as it comes",
}
"""Names that others know, and what to say instead."""
_UNSUPPORTED = {
    *("presence_penalty", "frequency_penalty", "length_penalty", "logit_bias", "typical_p"),
    *("min_tokens", "min_new_tokens", "stop_token_ids", "bad_words", "allowed_token_ids"),
    *("best_of", "logprobs", "prompt_logprobs", "include_stop_str_in_output"),
    *("skip_special_tokens", "structured_outputs", "guided_decoding", "response_format"),
}


@dataclass(frozen=True, kw_only=True, init=False)
class SamplingParams:
    """How a prompt is continued. What is None is the model's to say, by its generation config.

    Also taken are `max_tokens` and `max_completion_tokens` (for `max_new_tokens`),
    `num_return_sequences` (for `n`), `stop_strings` and `stop_sequences` (for `stop`), `temp`.

    Attributes:
        temperature: 0 is greedy.
        top_k: keep the so many best; 0 or -1 keeps all.
        top_p: keep the smallest set of best tokens with at least this probability.
        min_p: keep tokens with at least this share of the best one's probability.
        repetition_penalty: above 1 makes tokens of the prompt and the text so far less likely.
        seed: same seed, same text, on every mesh and in any batch; None draws one.
        n: completions of each prompt.
        max_new_tokens: most new tokens; if None 256, or what the model's maximum leaves.
        stop: strings that end a text.
        ignore_eos: go on past the end-of-text token.

    Raises:
        UsageError: a name is not known, or a value is out of its range.
    """

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    n: int
    max_new_tokens: int | None
    stop: tuple[str, ...]
    ignore_eos: bool

    def __init__(
        self,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        n: int = 1,
        max_new_tokens: int | None = None,
        stop: str | Sequence[str] | None = (),
        ignore_eos: bool = False,
        **other_names: Any,
    ) -> None:
        given: dict[str, Any] = {
            "temperature": temperature,
            "top_k": 0 if top_k == -1 else top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "seed": seed,
            "n": n,
            "max_new_tokens": max_new_tokens,
            "stop": stop,
            "ignore_eos": ignore_eos,
        }
        for name, value in by_our_names(other_names).items():
            if given[name] not in (None, (), 1):
                raise UsageError(lines(f"{name} was given by two names", "expected one of them"))
            given[name] = value
        given["stop"] = _strings(given["stop"])
        for name, value in given.items():
            object.__setattr__(self, name, _plain(value))
        RowSampling(**self.sampler())
        if self.seed is not None:
            check_seed(self.seed)
        for name in ("n", "max_new_tokens"):
            value = getattr(self, name)
            if not (value is None and name != "n") and (type(value) is not int or value < 1):
                expected = "expected a whole number of at least 1"
                raise UsageError(lines(f"{name} is {shown(value)}", expected))
        if not isinstance(self.ignore_eos, bool):
            raise UsageError(lines(f"ignore_eos is {shown(ignore_eos)}", "expected True or False"))

    def sampler(self) -> dict[str, Any]:
        """The parameters of a row's sampler that were given."""
        return {name: value for name in SAMPLERS if (value := getattr(self, name)) is not None}


def _plain(value: Any) -> Any:
    """A number of another library, as numpy's, as Python's own."""
    if isinstance(value, (bool, int, float)) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def by_our_names(given: Mapping[str, Any]) -> dict[str, Any]:
    """The same parameters by the names of `SamplingParams`.

    Raises:
        UsageError: a name is not known, or stands for the same as another.
    """
    found: dict[str, Any] = {}
    for alias, value in given.items():
        name = _ALIASES.get(alias, alias)
        if name not in _NAMES:
            raise UsageError(lines(f"unknown sampling parameter {shown(alias)}", _hint(alias)))
        if name in found:
            raise UsageError(lines(f"{name} was given by two names", "expected one of them"))
        found[name] = value
    return found


def _hint(name: str) -> str:
    if name in _OTHERWISE:
        return _OTHERWISE[name]
    if name in _UNSUPPORTED:
        return f"it is not supported; known: {', '.join(_NAMES)}"
    near = difflib.get_close_matches(name, [*_NAMES, *_ALIASES], 1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(_NAMES)}"


def _strings(stop: Any) -> tuple[str, ...]:
    strings = [stop] if isinstance(stop, str) else stop or []
    listed = isinstance(strings, Sequence)
    if not listed or not all(isinstance(string, str) and string for string in strings):
        raise UsageError(lines(f"stop is {shown(stop)}", "expected strings that aren't empty"))
    return tuple(strings)


_NAMES = [field.name for field in fields(SamplingParams)]
