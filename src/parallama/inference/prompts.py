"""Prompts and conversations to token ids of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UsageError, lines, shown
from ..files.chat_template import Renderer, renderer_of
from ..model.token_ids import check_ids


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
            ids = list(self.tokenizer(prompt)["input_ids"])
        else:
            ids = list(prompt) if isinstance(prompt, Sequence) else [prompt]
            if not isinstance(prompt, Sequence) or not all(type(token) is int for token in ids):
                raise UsageError(
                    lines(f"the prompt {shown(prompt)} is neither text nor a list of token ids")
                )
        if not ids:
            raise UsageError(lines("the prompt has no tokens", "expected at least one"))
        check_ids(ids, self.vocab)
        return ids

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation by the model's chat template, ready for an answer.

        Raises:
            UsageError: there is no tokenizer or no chat template, or the template refuses the
                messages.
            CheckpointError: the template is broken, or takes too long.
        """
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
        # As apply_chat_template does: the template writes special tokens itself.
        ids = list(
            self.tokenizer(self._renderer.render(messages), add_special_tokens=False)["input_ids"]
        )
        check_ids(ids, self.vocab)
        return ids
