"""Bodies of requests: OpenAI's fields that make sense for a text model, and vLLM's."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from . import limits

Whole = StrictInt
INT64 = (1 << 63) - 1


def _number(value: Any) -> Any:
    """A JSON number; pydantic takes texts and booleans for numbers, too."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError("expected a number")
    return value


Number = Annotated[float, BeforeValidator(_number)]
Stop = Annotated[StrictStr, Field(min_length=1, max_length=limits.STOP_LETTERS)]
Id = Annotated[StrictInt, Field(ge=0, le=INT64)]
Ids = Annotated[list[Id], Field(max_length=limits.IDS)]
Prompt = Annotated[list[Id], Field(min_length=1)]


class Body(BaseModel):
    """A body of a request. Fields that aren't known are ignored, and logged."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    NOT_SUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Fields of OpenAI's that mean something we can't do, with the values that ask for nothing."""
    NO_EFFECT: ClassVar[frozenset[str]] = frozenset(
        {
            *("user", "metadata", "service_tier", "store", "safety_identifier", "request_id"),
            *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"),
            *("parallel_tool_calls", "verbosity", "reasoning_effort", "moderation"),
        }
    )
    """Fields that change nothing about the answer."""


class StreamOptions(BaseModel):
    """What a stream holds besides the answer."""

    include_usage: StrictBool | None = None
    continuous_usage_stats: StrictBool | None = None


class Sampled(Body):
    """What completions and chats have in common."""

    model: StrictStr | None = None
    stream: StrictBool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[Whole, Field(ge=1, le=limits.N)] | None = 1
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    top_k: Annotated[Whole, Field(ge=-1, le=INT64)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=100)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[
            dict[str, Annotated[Number, Field(ge=-100, le=100)]], Field(max_length=limits.BIASES)
        ]
        | None
    ) = None
    seed: Annotated[Whole, Field(ge=-INT64 - 1, le=(1 << 64) - 1)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=limits.STOPS)] | None = None
    stop_token_ids: Ids | None = None
    min_tokens: Annotated[Whole, Field(ge=0, le=INT64)] | None = None
    ignore_eos: StrictBool | None = None
    include_stop_str_in_output: StrictBool | None = None
    skip_special_tokens: StrictBool | None = None
    allowed_token_ids: Ids | None = None
    bad_words: Annotated[list[Stop], Field(max_length=limits.IDS)] | None = None
    prompt_logprobs: Annotated[Whole, Field(ge=0, le=limits.LOGPROBS)] | None = None
    return_token_ids: StrictBool | None = None
    return_tokens_as_token_ids: StrictBool | None = None
    priority: Annotated[Whole, Field(ge=-INT64 - 1, le=INT64)] | None = None


class CompletionRequest(Sampled):
    """POST /v1/completions."""

    NOT_SUPPORTED = {
        "suffix": (None, ""),
        "response_format": (None, {"type": "text"}),
        "structured_outputs": (None,),
        "prompt_embeds": (None,),
        "use_beam_search": (None, False),
    }

    prompt: (
        StrictStr
        | Prompt
        | Annotated[list[StrictStr] | list[Prompt], Field(min_length=1, max_length=limits.PROMPTS)]
    )
    max_tokens: Annotated[Whole, Field(ge=0, le=INT64)] | None = 16
    best_of: Annotated[Whole, Field(ge=1, le=limits.N)] | None = None
    echo: StrictBool | None = False
    logprobs: Annotated[Whole, Field(ge=0, le=limits.LOGPROBS)] | None = None
    add_special_tokens: StrictBool = True


class TextPart(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(extra="allow")

    type: Literal["text"]
    text: StrictStr


class Refusal(BaseModel):
    """What an assistant refused with, in a history."""

    type: Literal["refusal"]
    refusal: StrictStr


class ChatMessage(BaseModel):
    """A message of a conversation; its other fields are the template's to read."""

    model_config = ConfigDict(extra="allow")

    role: Annotated[StrictStr, Field(min_length=1, max_length=64)]
    content: StrictStr | list[TextPart | Refusal] | None = None
    tool_calls: list[dict[str, Any]] | None = None


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=limits.MESSAGES)]


class Conversation(Body):
    """A conversation, and how a template writes it."""

    messages: Messages
    add_generation_prompt: StrictBool = True
    continue_final_message: StrictBool = False
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None


class ChatRequest(Sampled, Conversation):
    """POST /v1/chat/completions."""

    NOT_SUPPORTED = {
        "response_format": (None, {"type": "text"}),
        "structured_outputs": (None,),
        "functions": (None, []),
        "function_call": (None, "none"),
        "tool_choice": (None, "none"),
        "audio": (None,),
        "prediction": (None,),
        "web_search_options": (None,),
        "modalities": (None, ["text"]),
        "chat_template": (None,),
        "documents": (None, []),
        "echo": (None, False),
        "use_beam_search": (None, False),
    }

    max_tokens: Annotated[Whole, Field(ge=1, le=INT64)] | None = None
    max_completion_tokens: Annotated[Whole, Field(ge=1, le=INT64)] | None = None
    logprobs: StrictBool | None = False
    top_logprobs: Annotated[Whole, Field(ge=0, le=limits.LOGPROBS)] | None = None


class TokenizeRequest(Body):
    """POST /tokenize of a text or a conversation."""

    model: StrictStr | None = None
    prompt: StrictStr | None = None
    messages: Messages | None = None
    add_special_tokens: StrictBool | None = None
    add_generation_prompt: StrictBool = True
    continue_final_message: StrictBool = False
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    return_token_strs: StrictBool | None = False


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: StrictStr | None = None
    tokens: list[Id]
