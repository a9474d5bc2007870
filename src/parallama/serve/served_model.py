"""The model that a server has: its names, its defaults, and requests of it from fields."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import UsageError
from ..inference.messages import checked
from ..inference.requests import Request
from ..inference.sampling_defaults import with_defaults
from ..inference.sampling_params import SamplingParams
from ..inference.seeds import row_seed
from ..inference.serving import Serving
from .errors import ApiError, of_ours
from .protocol import Conversation, Sampled
from .token_texts import TokenTexts

_PASSED = (
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "logit_bias", "stop", "stop_token_ids", "min_tokens", "ignore_eos"),
    *("include_stop_str_in_output", "skip_special_tokens", "allowed_token_ids", "bad_words"),
)
"""Fields that `SamplingParams` takes by the same name."""
_DEFAULTS = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}
_LEAST_TOP_P = 1e-9
"""For OpenAI's 0, which keeps the best token alone."""


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model behind a server.

    Attributes:
        serving: the engine.
        names: that requests may call it by; answers have the first.
        sampling: defaults of its generation config; empty where that isn't to be used.
        template_arguments: for the chat template, where a request doesn't say otherwise.
        created: when it was loaded, in seconds since 1970.
    """

    serving: Serving
    names: Sequence[str]
    sampling: Mapping[str, Any]
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    created: int = 0
    texts: TokenTexts = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "texts", TokenTexts(self.serving.llm.tokenizer))

    @property
    def name(self) -> str:
        return self.names[0]

    def check_name(self, asked: str | None) -> None:
        """Raise `ApiError` where a request is for another model."""
        if asked is not None and asked not in self.names:
            known = ", ".join(self.names)
            raise ApiError(
                f"the model {asked[:200]!r} does not exist: expected {known}",
                status=404,
                param="model",
                code="model_not_found",
            )

    # -- prompts. They take a thread of their own: texts may be long.

    def encoded(self, prompt: str | Sequence[int], add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt."""
        llm = self.serving.llm
        try:
            if isinstance(prompt, str) and prompt and llm.tokenizer and not add_special_tokens:
                prompt = list(llm.tokenizer(prompt, add_special_tokens=False)["input_ids"])
            return llm.encode(prompt)
        except UsageError as error:
            raise of_ours(error, "prompt") from None

    def rendered(self, asked: Conversation | Any) -> list[int]:
        """Token ids of a conversation."""
        messages = [message.model_dump(exclude_unset=True) for message in asked.messages]
        for message in messages:
            if message.get("content") is None and message.get("tool_calls"):
                message.pop("content", None)
            elif isinstance(message.get("content"), list):
                message["content"] = [
                    {"type": "text", "text": part.get("text", part.get("refusal"))}
                    for part in message["content"]
                ]
        try:
            return self.serving.llm.render_chat(
                checked(messages),
                tools=getattr(asked, "tools", None),
                add_generation_prompt=asked.add_generation_prompt
                and not asked.continue_final_message,
                continue_final_message=asked.continue_final_message,
                chat_template_kwargs={
                    **self.template_arguments,
                    **(asked.chat_template_kwargs or {}),
                },
            )
        except UsageError as error:
            raise of_ours(error, "messages") from None

    # -- requests

    def limit(self, ids: Sequence[int], asked: int | None, default: int | None, *, of: str) -> int:
        """Most new tokens behind a prompt.

        Args:
            asked: by the request.
            default: where it asks for none; None is all that is left of the context.
            of: the field that the prompt is from.

        Raises:
            ApiError: they are over the context's length.
        """
        most = self.serving.llm.max_model_len
        room = most - len(ids)
        if room >= (1 if asked is None else asked):
            return asked if asked is not None else min(room, default or room)
        wanted = f"and {asked} new ones are" if asked else "is"
        raise ApiError(
            f"the prompt of {len(ids)} tokens {wanted} over the context of {most} tokens",
            param="max_tokens" if room >= 1 else of,
            code="context_length_exceeded",
        )

    def requests(
        self,
        prompts: Sequence[tuple[str | None, list[int]]],
        asked: Sampled,
        *,
        copies: int,
        limits: Sequence[int],
        logprobs: int | None,
        prompt_logprobs: int | None,
        answers: bool = False,
    ) -> list[Request]:
        """Requests of the engine: copies of the first prompt, then of the next.

        Args:
            answers: they answer conversations.

        Raises:
            ApiError: a parameter is out of its range, or isn't supported.
        """
        seed = secrets.randbits(64) if asked.seed is None else asked.seed % (1 << 64)
        given = self._passed(asked) | {"seed": seed}
        given |= {"logprobs": logprobs, "prompt_logprobs": prompt_logprobs}
        llm = self.serving.llm
        earlier: Counter[tuple[int, ...]] = Counter()
        made: list[Request] = []
        for (text, ids), limit in zip(prompts, limits, strict=True):
            try:
                params = SamplingParams(**given, max_new_tokens=max(limit, 1))
                ends, choosing = llm.rules.read(params, llm.chat_ends() if answers else ())
                for index in range(copies):
                    row = row_seed(seed, ids, earlier[tuple(ids)])
                    earlier[tuple(ids)] += 1
                    sampling = with_defaults({}, {**self._defaults, **params.sampler()}, row)
                    made.append(
                        Request(
                            prompt=text,
                            ids=ids,
                            index=index,
                            params=params,
                            choosing=replace(choosing, sampling=sampling),
                            limit=max(limit, 1),
                            ends=ends,
                        )
                    )
            except UsageError as error:
                name = str(error).split(" ", 1)[0]
                raise of_ours(error, name if name in type(asked).model_fields else None) from None
        return made

    @property
    def _defaults(self) -> dict[str, Any]:
        own = {
            name: self.sampling[name] for name in _DEFAULTS if self.sampling.get(name) is not None
        }
        return _DEFAULTS | own

    def _passed(self, asked: Sampled) -> dict[str, Any]:
        """The fields that are for `SamplingParams`, by its names."""
        given: dict[str, Any] = {}
        for name in _PASSED:
            value = getattr(asked, name)
            if value is not None:
                given[name] = value
        if given.get("top_p") == 0:
            given["top_p"] = _LEAST_TOP_P
        return given
