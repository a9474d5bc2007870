"""How a prompt is continued: sampling, limits and ends, by vLLM's and transformers' names. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

from ..engine.row_sampling import RowSampling, check_seed
from ..errors import UsageError, lines, shown
from ..plan.program_shapes import MOST_TOP

SAMPLERS = (
    *("temperature", "top_k", "top_p", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)
"""Parameters of a row's sampler, but for its seed."""
_ALIASES = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "min_new_tokens": "min_tokens",
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
    *("length_penalty", "typical_p", "best_of"),
    *("structured_outputs", "guided_decoding", "response_format"),
}


@dataclass(frozen=True, kw_only=True, init=False)
class SamplingParams:
    """How a prompt is continued. What is None is the model's to say, by its generation config.

    Also taken are `max_tokens` and `max_completion_tokens` (for `max_new_tokens`),
    `min_new_tokens` (for `min_tokens`), `num_return_sequences` (for `n`), `stop_strings` and
    `stop_sequences` (for `stop`), `temp`.

    Attributes:
        temperature: 0 is greedy.
        top_k: keep the so many best; 0 or -1 keeps all.
        top_p: keep the smallest set of best tokens with at least this probability.
        min_p: keep tokens with at least this share of the best one's probability.
        repetition_penalty: above 1 makes tokens of the prompt and the text so far less likely.
        presence_penalty: taken from the logit of each token of the text so far; -2 to 2.
        frequency_penalty: the same, once for each time that the text has it.
        seed: same seed, same text, on every mesh and in any batch; None draws one.
        n: completions of each prompt.
        max_new_tokens: most new tokens; if None 256, or what the model's maximum leaves.
        min_tokens: so many new tokens come before one that ends the text.
        stop: strings that end a text.
        stop_token_ids: tokens that end it besides the model's own.
        ignore_eos: go on past the end-of-text token.
        include_stop_str_in_output: what ends a text is part of it.
        skip_special_tokens: special tokens are no part of a text.
        logit_bias: token id to what is added to its logit.
        allowed_token_ids: no other tokens are chosen, if there are any.
        bad_words: texts that aren't written.
        logprobs: how many likeliest tokens are told with each new one; 0 to 20.
        prompt_logprobs: how many are told with each token of the prompt, which is scored.

    Raises:
        UsageError: a name is not known, or a value is out of its range.
    """

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    seed: int | None
    n: int
    max_new_tokens: int | None
    min_tokens: int
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    include_stop_str_in_output: bool
    skip_special_tokens: bool
    logit_bias: Mapping[int, float]
    allowed_token_ids: tuple[int, ...]
    bad_words: tuple[str, ...]
    logprobs: int | None
    prompt_logprobs: int | None

    def __init__(
        self,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        seed: int | None = None,
        n: int = 1,
        max_new_tokens: int | None = None,
        min_tokens: int = 0,
        stop: str | Sequence[str] | None = (),
        stop_token_ids: Sequence[int] | None = (),
        ignore_eos: bool = False,
        include_stop_str_in_output: bool = False,
        skip_special_tokens: bool = True,
        logit_bias: Mapping[int | str, float] | None = None,
        allowed_token_ids: Sequence[int] | None = (),
        bad_words: Sequence[str] | None = (),
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        **other_names: Any,
    ) -> None:
        given: dict[str, Any] = {
            "temperature": temperature,
            "top_k": 0 if top_k == -1 else top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "presence_penalty": presence_penalty,
            "frequency_penalty": frequency_penalty,
            "seed": seed,
            "n": n,
            "max_new_tokens": max_new_tokens,
            "min_tokens": min_tokens,
            "stop": stop,
            "stop_token_ids": stop_token_ids,
            "ignore_eos": ignore_eos,
            "include_stop_str_in_output": include_stop_str_in_output,
            "skip_special_tokens": skip_special_tokens,
            "logit_bias": logit_bias,
            "allowed_token_ids": allowed_token_ids,
            "bad_words": bad_words,
            "logprobs": logprobs,
            "prompt_logprobs": prompt_logprobs,
        }
        for name, value in by_our_names(other_names).items():
            if given[name] not in (None, (), 1, 0):
                raise UsageError(lines(f"{name} was given by two names", "expected one of them"))
            given[name] = value
        for name, value in given.items():
            object.__setattr__(self, name, _plain(value))
        for name in ("stop", "bad_words"):
            object.__setattr__(self, name, _strings(name, getattr(self, name)))
        for name in ("stop_token_ids", "allowed_token_ids"):
            object.__setattr__(self, name, _ids(name, getattr(self, name)))
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        RowSampling(**self.sampler())
        if self.seed is not None:
            check_seed(self.seed)
        for name, least, most in _WHOLE:
            value = getattr(self, name)
            if value is None and name not in ("n", "min_tokens"):
                continue
            if type(value) is not int or value < least or value > (most or value):
                limits = f"from {least} to {most}" if most else f"of at least {least}"
                raise UsageError(
                    lines(f"{name} is {shown(value)}", f"expected a whole number {limits}")
                )
        if self.min_tokens > (self.max_new_tokens or self.min_tokens):
            raise UsageError(
                lines(
                    f"min_tokens is {self.min_tokens} and max_new_tokens {self.max_new_tokens}",
                    "expected at most as many",
                )
            )
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                value = shown(getattr(self, name))
                raise UsageError(lines(f"{name} is {value}", "expected True or False"))

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


def _strings(name: str, given: Any) -> tuple[str, ...]:
    strings = [given] if isinstance(given, str) else given or []
    listed = isinstance(strings, Sequence)
    if not listed or not all(isinstance(string, str) and string for string in strings):
        raise UsageError(lines(f"{name} is {shown(given)}", "expected strings that aren't empty"))
    return tuple(strings)


def _ids(name: str, given: Any) -> tuple[int, ...]:
    """Token ids; one need not be in a list."""
    ids = [given] if type(given) is int else given or []
    if not isinstance(ids, Sequence) or not all(type(each) is int and each >= 0 for each in ids):
        raise UsageError(lines(f"{name} is {shown(given)}", "expected token ids"))
    return tuple(ids)


def _biases(given: Any) -> dict[int, float]:
    """Token ids, which JSON writes as texts, with what is added to their logits."""
    good = given is None or isinstance(given, Mapping)
    found: dict[int, float] = {}
    for token, value in (given or {}).items() if good else ():
        whole = type(token) is int or (
            isinstance(token, str) and token.isascii() and token.isdigit()
        )
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        good = good and whole and number and abs(value) <= _MOST_BIAS
        if good:
            found[int(token)] = float(value)
    if not good or len(found) < len(given or {}):
        expected = f"expected token ids with numbers from -{_MOST_BIAS} to {_MOST_BIAS}"
        raise UsageError(lines(f"logit_bias is {shown(given)}", expected))
    return found


_MOST_BIAS = 100
_WHOLE = (
    ("n", 1, None),
    ("max_new_tokens", 1, None),
    ("min_tokens", 0, None),
    ("logprobs", 0, MOST_TOP),
    ("prompt_logprobs", 0, MOST_TOP),
)
_NAMES = [field.name for field in fields(SamplingParams)]
