"""What a call asks for: a request for each completion, in the order of the prompts."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import UsageError, lines, shown
from .choosing import Choosing
from .sampling_defaults import with_defaults
from .sampling_params import SamplingParams
from .seeds import row_seed
from .token_rules import Ends, TokenRules

DEFAULT_NEW_TOKENS = 256

Asked = SamplingParams | Sequence[SamplingParams] | None


@dataclass(frozen=True, kw_only=True)
class Request:
    """One completion of one prompt.

    Attributes:
        prompt: the text, or None if it was given as token ids or messages.
        ids: its tokens.
        index: its number among the completions of this prompt.
        params: what was asked for.
        choosing: what comes of that and of the model's defaults.
        limit: most new tokens.
        ends: tokens that end it.
    """

    prompt: str | None
    ids: list[int]
    index: int
    params: SamplingParams
    choosing: Choosing
    limit: int
    ends: Ends


def params_of(asked: Asked, names: Mapping[str, Any], prompts: int) -> list[SamplingParams]:
    """The sampling parameters of each prompt.

    Args:
        asked: of all prompts, or a list with one for each.
        names: the same by name, in place of `asked`.
        prompts: how many there are.

    Raises:
        UsageError: both or too few were given, or a name or value is wrong.
    """
    if asked is None:
        return [SamplingParams(**names)] * prompts
    if names:
        given = ", ".join(names)
        raise UsageError(
            lines(f"sampling_params and {given} were given", "expected one of the two ways")
        )
    each = [asked] * prompts if isinstance(asked, SamplingParams) else asked
    if not isinstance(each, Sequence) or not all(isinstance(one, SamplingParams) for one in each):
        raise UsageError(
            lines(f"sampling_params is {shown(asked)}", "expected SamplingParams or a list of them")
        )
    if len(each) != prompts:
        raise UsageError(
            lines(
                f"there are {len(each)} sampling_params and {prompts} prompts",
                "expected one for all, or one for each",
            )
        )
    return list(each)


def requests_of(
    prompts: Sequence[tuple[str | None, list[int]]],
    params: Sequence[SamplingParams],
    *,
    generation: Mapping[str, Any],
    rules: TokenRules,
    answers: Collection[int],
    of_chat: Collection[int],
    max_model_len: int,
    max_positions: int,
) -> list[Request]:
    """A request for each completion.

    Args:
        prompts: texts, if they were given so, and token ids.
        params: of each prompt.
        generation: the model's generation config.
        rules: the model's.
        answers: places of prompts that are conversations.
        of_chat: tokens that end those besides.
        max_model_len: most tokens of prompt and answer together.
        max_positions: the model's own maximum, for messages.

    Raises:
        UsageError: a prompt and its new tokens are over the limit, or copies of a greedy text were
            asked for.
    """
    drawn = secrets.randbits(64)
    earlier: Counter[tuple[int, ...]] = Counter()

    def made() -> Iterator[Request]:
        for place, ((text, ids), asked) in enumerate(zip(prompts, params, strict=True)):
            limit = _limit(len(ids), asked.max_new_tokens, max_model_len, max_positions)
            ends, choosing = rules.read(asked, of_chat if place in answers else ())
            for index in range(asked.n):
                key = tuple(ids)
                seed = row_seed(drawn if asked.seed is None else asked.seed, ids, earlier[key])
                earlier[key] += 1
                sampling = with_defaults(generation, asked.sampler(), seed)
                if asked.n > 1 and sampling.temperature == 0:
                    raise UsageError(
                        lines(
                            f"n is {asked.n} and temperature 0, which gives equal texts",
                            "expected n=1, or a temperature above 0",
                        )
                    )
                yield Request(
                    prompt=text,
                    ids=ids,
                    index=index,
                    params=asked,
                    choosing=replace(choosing, sampling=sampling),
                    limit=limit,
                    ends=ends,
                )

    return list(made())


def _limit(length: int, max_new_tokens: int | None, max_model_len: int, most: int) -> int:
    """New tokens that fit behind a prompt."""
    room = max_model_len - length
    if room < 1 or (max_new_tokens is not None and max_new_tokens > room):
        wanted = f" and {max_new_tokens} new ones" if max_new_tokens is not None else ""
        raise UsageError(
            lines(
                f"a prompt of {length} tokens{wanted} is over the limit of {max_model_len}",
                f"expected at most {max_model_len} together (the model's maximum is {most})",
            )
        )
    return min(DEFAULT_NEW_TOKENS, room) if max_new_tokens is None else max_new_tokens
