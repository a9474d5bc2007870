"""Bodies of answers: OpenAI's, and what vLLM adds to them."""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict

from ..inference.serving import TokenLogprob
from .token_texts import TokenTexts

LEAST = -9999.0
"""For a log-probability of minus infinity, which JSON has no word for."""
Finish = Literal["stop", "length"]


class CachedTokens(TypedDict):
    """Tokens of a prompt that were not computed."""

    cached_tokens: int


class Usage(TypedDict):
    """Tokens of a call."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class PromptLogprob(TypedDict):
    """A token in the place of a prompt's, as vLLM writes it."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class CompletionLogprobs(TypedDict):
    """Tokens of a completion."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """A completion, or a part of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish | None
    stop_reason: int | str | None
    prompt_logprobs: NotRequired[PromptLogprobs]
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]


class Completion(TypedDict):
    """The answer of /v1/completions, and a chunk of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]


class TopLogprob(TypedDict):
    """A token that could have stood in a place."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TopLogprob):
    """A token of an answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    """Tokens of an answer."""

    content: list[ChatLogprob]
    refusal: None


class AnswerMessage(TypedDict):
    """What the assistant says."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(TypedDict):
    """An answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish
    stop_reason: int | str | None
    token_ids: NotRequired[list[int]]


class Chat(TypedDict):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: NotRequired[PromptLogprobs]
    prompt_token_ids: NotRequired[list[int]]


class Delta(TypedDict):
    """What of an answer is new."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]


class ChatChunkChoice(TypedDict):
    """A part of an answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None
    stop_reason: NotRequired[int | str | None]
    token_ids: NotRequired[list[int]]


class ChatChunk(TypedDict):
    """A chunk of a stream of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage | None]
    prompt_logprobs: NotRequired[PromptLogprobs]
    prompt_token_ids: NotRequired[list[int]]


class Model(TypedDict):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int


class Models(TypedDict):
    """The answer of /v1/models."""

    object: Literal["list"]
    data: list[Model]


class Tokens(TypedDict):
    """The answer of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(TypedDict):
    """The answer of /detokenize."""

    prompt: str


class Version(TypedDict):
    """The answer of /version."""

    version: str


class Status(TypedDict):
    """The answer of /health and /live."""

    status: str


class PlacedTensor(TypedDict):
    """How a tensor is split."""

    name: str
    shape: list[str]
    axes: list[str | None]
    style: str


class Mesh(TypedDict):
    """The answer of /mesh: which device holds what."""

    mesh: dict[str, int]
    backend: str
    title: str
    svg: str
    tensors: list[PlacedTensor]


class ErrorDetails(TypedDict):
    """Why a request failed."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(TypedDict):
    """The answer to a request that failed."""

    error: ErrorDetails


def usage_of(prompt: int, new: int, cached: int) -> Usage:
    """The tokens of a call."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return max(logprob, LEAST)


def chat_logprobs(
    texts: TokenTexts, tokens: tuple[TokenLogprob, ...], as_ids: bool
) -> ChatLogprobs:
    """Tokens of a chat's answer."""

    def one(token: int, logprob: float) -> TopLogprob:
        return {
            "token": texts.text(token, as_id=as_ids),
            "logprob": finite(logprob),
            "bytes": list(texts.raw(token)),
        }

    content: list[ChatLogprob] = [
        {**one(each.token, each.logprob), "top_logprobs": [one(*top) for top in each.top]}
        for each in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    texts: TokenTexts, tokens: list[tuple[int, TokenLogprob | None]], start: int, as_ids: bool
) -> CompletionLogprobs:
    """Tokens of a completion; the first of a prompt has no log-probability.

    Args:
        start: letters before.
    """
    return {
        "tokens": [texts.text(token, as_id=as_ids) for token, _ in tokens],
        "token_logprobs": [None if each is None else finite(each.logprob) for _, each in tokens],
        "top_logprobs": [None if each is None else _top(texts, each, as_ids) for _, each in tokens],
        "text_offset": texts.offsets([token for token, _ in tokens], start),
    }


def _top(texts: TokenTexts, each: TokenLogprob, as_ids: bool) -> dict[str, float]:
    """The most likely tokens, and the one that stands there."""
    found: dict[str, float] = {}
    for token, logprob in (*each.top, (each.token, each.logprob)):
        found.setdefault(texts.text(token, as_id=as_ids), finite(logprob))
    return found


def prompt_logprobs(texts: TokenTexts, given: tuple[TokenLogprob | None, ...]) -> PromptLogprobs:
    """Tokens of a prompt, as vLLM writes them."""

    def one(token: int, logprob: float, rank: int | None) -> PromptLogprob:
        return {"logprob": finite(logprob), "rank": rank, "decoded_token": texts.text(token)}

    found: PromptLogprobs = []
    for each in given:
        if each is None:
            found.append(None)
            continue
        ranked = {str(token): one(token, at, rank) for rank, (token, at) in enumerate(each.top, 1)}
        ranked.setdefault(str(each.token), one(each.token, each.logprob, None))
        found.append(ranked)
    return found
