"""Options of `generate` for what a text may hold, where it ends, and what is told of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from ..errors import UsageError, lines
from ..inference.sampling_params import SamplingParams


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """What a text may hold and where it ends, by the names of `SamplingParams`.

    Raises:
        UsageError: a value is out of its range.
    """

    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", help="End the text before this string; several times."),
    ] = None
    stop_token_ids: Annotated[
        list[int] | None,
        typer.Option("--stop-token-ids", help="End the text with this token; several times."),
    ] = None
    min_tokens: Annotated[
        int, typer.Option("--min-tokens", help="New tokens before one that ends the text.")
    ] = 0
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on past the end-of-text token.")
    ] = False
    include_stop_str_in_output: Annotated[
        bool,
        typer.Option("--include-stop-str-in-output", help="What ends a text is part of it."),
    ] = False
    skip_special_tokens: Annotated[
        bool,
        typer.Option(
            "--skip-special-tokens/--no-skip-special-tokens",
            help="Leave special tokens out of the text.",
        ),
    ] = True
    logit_bias: Annotated[
        list[str] | None,
        typer.Option(
            "--logit-bias",
            help="ID=NUMBER: added to a token's logit, as 42=-1.5; several times.",
        ),
    ] = None
    allowed_token_ids: Annotated[
        list[int] | None,
        typer.Option("--allowed-token-ids", help="Choose no other tokens; several times."),
    ] = None
    bad_words: Annotated[
        list[str] | None,
        typer.Option("--bad-words", help="Never write this text; several times."),
    ] = None
    logprobs: Annotated[
        int | None,
        typer.Option("--logprobs", help="Likeliest tokens told with each new one; up to 20."),
    ] = None
    prompt_logprobs: Annotated[
        int | None,
        typer.Option(
            "--prompt-logprobs", help="Score the prompt, with so many likeliest tokens in a place."
        ),
    ] = None

    def __post_init__(self) -> None:
        SamplingParams(**self.arguments)  # refuses what is out of range

    @property
    def arguments(self) -> dict[str, Any]:
        """For `SamplingParams`."""
        return asdict(self) | {"logit_bias": dict(map(_bias, self.logit_bias or []))}


def _bias(given: str) -> tuple[str, float]:
    token, _, value = given.partition("=")
    try:
        return token, float(value)
    except ValueError:
        raise UsageError(
            lines(f"--logit-bias is {given!r}", "expected a token id and a number, as 42=-1.5")
        ) from None
