"""Prompts and conversations to token ids of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from ..errors import CheckpointError, UsageError, lines, shown
from ..files.chat_template import Renderer, renderer_of
from ..model.token_ids import check_ids
from ..notices import say_once
from .messages import Message, check_text

Prompt = str | Sequence[int] | Mapping[str, Any]
"""A text, token ids, or a mapping with one of `prompt`, `prompt_token_ids` and `input_ids`.

Ids may be in an array or a tensor, too.
"""
_ANSWER = "parallama"
_KEYS = ("prompt", "prompt_token_ids", "input_ids")


def list_of(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """The prompts of a call, of which one need not be in a list.

    Raises:
        UsageError: there are none.
    """
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    given = members(prompts)
    if given is None:
        raise UsageError(
            lines(
                f"prompts is {shown(prompts)}",
                "expected a text, a list of token ids, or a list of either",
            )
        )
    if not given:
        raise UsageError(lines("there are no prompts", "expected at least one"))
    return [given] if isinstance(given[0], Integral) else given


def members(given: Any) -> list[Any] | None:
    """The members of a sequence, an array or a tensor; None of anything else."""
    if isinstance(given, Sequence) and not isinstance(given, (str, bytes)):
        return list(given)
    # Arrays of every library have it, and are no sequences to Python.
    listed = getattr(given, "tolist", None)
    members = listed() if callable(listed) else None
    return members if isinstance(members, list) else None


class Prompts:
    """What a model is asked, as token ids.

    Args:
        name: the model's, for messages.
        tokenizer: of transformers, or None.
        vocab: ids of the model.
    """

    def __init__(self, name: str, tokenizer: Any | None, vocab: int) -> None:
        self.name, self.tokenizer, self.vocab = name, tokenizer, vocab
        self._renderer: Renderer | None = None
        self._chat_ends: frozenset[int] | None = None

    def encoded(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """A prompt's text, or None if it was given as token ids, and its ids; see `encode`."""
        given: Any = prompt
        if isinstance(prompt, Mapping):
            keys = [key for key in _KEYS if key in prompt]
            if len(keys) != 1:
                raise UsageError(
                    lines(
                        f"the prompt has the keys {shown(list(prompt))}",
                        f"expected one of {', '.join(_KEYS)}",
                    )
                )
            given = prompt[keys[0]]
        return (given if isinstance(given, str) else None), self.encode(given)

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt; ids are checked and passed through.

        Raises:
            UsageError: the prompt is empty, an id is out of range, or a text has no tokenizer.
        """
        if isinstance(prompt, str):
            if not prompt:
                raise UsageError(lines("the prompt is empty", "expected some text"))
            if self.tokenizer is None:
                raise UsageError(
                    lines(f"model {self.name!r} has no tokenizer", "give the prompt as token ids")
                )
            check_text(prompt, "the prompt")
            ids = self._begun_once(list(self.tokenizer(prompt)["input_ids"]))
        else:
            listed = members(prompt)
            if listed is None or not all(map(_is_id, listed)):
                raise UsageError(
                    lines(f"the prompt {shown(prompt)} is neither text nor a list of token ids")
                )
            ids = [int(token) for token in listed]
        if not ids:
            raise UsageError(lines("the prompt has no tokens", "expected at least one"))
        check_ids(ids, self.vocab)
        return ids

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation by the model's chat template, ready for an answer.

        Args:
            tools: functions that the assistant may call.
            add_generation_prompt: they end where an answer begins.
            continue_final_message: they end within the last message.
            chat_template_kwargs: variables for the template, as `{"enable_thinking": False}`.

        Raises:
            UsageError: there is no tokenizer or no chat template, or the template refuses the
                messages or cannot be given a variable.
            CheckpointError: the template is broken, or takes too long.
        """
        text = self._rendered(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt and not continue_final_message,
            continue_final_message=continue_final_message,
            variables=chat_template_kwargs,
        )
        assert self.tokenizer is not None
        # As apply_chat_template does: the template writes special tokens itself.
        ids = self._begun_once(list(self.tokenizer(text, add_special_tokens=False)["input_ids"]))
        check_ids(ids, self.vocab)
        return ids

    def _rendered(self, messages: Sequence[Message], **how: Any) -> str:
        """What the chat template makes of messages; see `render_chat`."""
        if self.tokenizer is None or not getattr(self.tokenizer, "chat_template", None):
            raise UsageError(
                lines(
                    f"model {self.name!r} has no chat template",
                    "expected an instruction-tuned model, or a plain prompt",
                )
            )
        if not messages:
            raise UsageError(lines("the conversation is empty", "expected at least one message"))
        if self._renderer is None:
            self._renderer = renderer_of(self.tokenizer, repr(self.name))
        return self._renderer.render(messages, **how)

    def chat_ends(self) -> frozenset[int]:
        """Tokens that end an answer: the tokenizer's end-of-text, and what a template writes there.

        Generation configs often name the first alone.
        """
        if self._chat_ends is None:
            end = getattr(self.tokenizer, "eos_token_id", None)
            found = {end} if isinstance(end, int) else set()
            self._chat_ends = frozenset(
                each for each in found | self._turn_end() if each < self.vocab
            )
        return self._chat_ends

    def _turn_end(self) -> set[int]:
        """The special token that the template writes behind an answer, if it does."""
        turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
        try:
            text = self._rendered(turn, add_generation_prompt=False)
        except (UsageError, CheckpointError):  # it doesn't take such a turn
            return set()
        _, written, behind = text.rpartition(_ANSWER)
        behind = behind.lstrip() if written else ""
        assert self.tokenizer is not None
        special = self.tokenizer.get_added_vocab()
        here = [token for token in special if token.strip() and behind.startswith(token.strip())]
        return {special[max(here, key=len)]} if here else set()

    def _begun_once(self, ids: list[int]) -> list[int]:
        """The ids with one begin-of-text token where a text brings one beside the tokenizer's."""
        tokenizer: Any = self.tokenizer
        begin = tokenizer.bos_token_id
        if begin is None or ids[:2] != [begin, begin]:
            return ids
        say_once(
            f"a prompt begins with {tokenizer.bos_token!r} itself, so the tokenizer's is left out"
        )
        return ids[1:]


def _is_id(token: object) -> bool:
    return isinstance(token, Integral) and not isinstance(token, bool)
