"""Chat templates: programs that come with a checkpoint, rendered in a process of their own.

transformers' renderer (jinja2's immutable sandbox, with additions) keeps a template from reaching
Python. The process limits its time, its memory and its output.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import CheckpointError, UsageError, cause, lines, shown
from .bounded_process import BoundedProcess, Ended, own_output, serve

LIMIT_S = 5.0
"""How long one conversation may take to render."""
LIMIT_BYTES = 16 << 20
"""How long the text may become, in UTF-8, beyond four times the conversation's own length."""
_MEMORY_BYTES = 512 << 20
_JSON_BYTES = 6
"""JSON may take so many bytes for one of UTF-8."""
_TAKEN = (
    *("messages", "conversations", "chat_template", "tools", "add_generation_prompt"),
    *("continue_final_message", "return_assistant_tokens_mask"),
)
"""Names that are no variables of a template's own."""


class Renderer:
    """Renders conversations with one chat template.

    Args:
        template: the Jinja text.
        variables: what else it may use: special tokens by name.
        origin: the model's name, for messages.
    """

    def __init__(self, template: str, variables: Mapping[str, str], origin: str) -> None:
        self._given: dict[str, Any] = {"template": template, "variables": dict(variables)}
        self._origin = origin
        self._bounded = BoundedProcess(
            __name__, "renders chat templates", ("text", "refused", "broken")
        )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation. May be called from any thread.

        Args:
            tools: functions that the assistant may call.
            add_generation_prompt: the text ends where an answer begins.
            continue_final_message: it ends within the last message.
            variables: what else the template may use, as `{"enable_thinking": False}`; over the
                special tokens.

        Raises:
            UsageError: the template refuses the messages, or a variable cannot be passed.
            CheckpointError: the template is broken, or does not end within `LIMIT_S`, or makes a
                text over `LIMIT_BYTES`.
        """
        plain = [
            {key: value for key, value in message.items() if value is not None}
            for message in messages
        ]
        asked = self._given | {"messages": plain, "add_generation_prompt": add_generation_prompt}
        if variables:
            asked |= {"variables": {**self._given["variables"], **_checked(variables)}}
        if tools:
            asked |= {"tools": list(tools)}
        if continue_final_message:
            asked |= {"continue_final_message": True}
        line = json.dumps(asked).encode() + b"\n"
        limit = LIMIT_BYTES + 4 * len(line)
        template = f"the chat template of {self._origin}"
        try:
            reply = self._bounded.ask(line, limit_s=LIMIT_S, limit_bytes=_JSON_BYTES * limit)
        except Ended as error:
            raise CheckpointError(
                lines(
                    f"{template} {error}",
                    f"expected a text within {LIMIT_S:g} s, in at most {_MEMORY_BYTES >> 20} MB",
                )
            ) from None
        if "refused" in reply:
            raise UsageError(lines(f"{template} refuses the messages: {reply['refused']}"))
        if "broken" in reply:
            raise CheckpointError(lines(f"{template} cannot be rendered: {reply['broken']}"))
        text = reply["text"]
        if len(text.encode(errors="replace")) > limit:
            raise CheckpointError(
                lines(
                    f"{template} makes a text of {len(text)} letters",
                    f"expected at most {limit} bytes",
                )
            )
        return text

    def close(self) -> None:
        """End the process, if there is one; the next conversation starts another."""
        self._bounded.close()


def _checked(variables: Mapping[str, Any]) -> Mapping[str, Any]:
    """Variables that a template may be given.

    Raises:
        UsageError: one has a name that means something else, or is nothing that JSON has.
    """
    for name, value in variables.items():
        if name in _TAKEN:
            raise UsageError(
                lines(
                    f"the chat template cannot be given {name!r} as a variable",
                    f"expected a name other than {', '.join(_TAKEN)}",
                )
            )
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            raise UsageError(
                lines(
                    f"the chat template's variable {name!r} is {shown(value)}",
                    "expected a text, number, boolean, null, or lists and objects of them",
                )
            ) from None
    return variables


def renderer_of(tokenizer: Any, origin: str) -> Renderer:
    """The renderer of a tokenizer's template for plain conversations.

    Raises:
        CheckpointError: it has several templates, and none is the default.
    """
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise CheckpointError(
            lines(f"model {origin} has no chat template for plain conversations: {cause(error)}")
        ) from None
    return Renderer(template, tokenizer.special_tokens_map, origin)


def main() -> None:
    """Render what comes in, line by line, until the input ends."""
    out = own_output()
    from transformers.utils.chat_template_utils import render_jinja_template

    for template in (
        "{{ messages | tojson }}{{ strftime_now('%Y') }}",
        "{{ raise_exception('') }}",
        "{{ 1 // 0 }}",
        "{% for %}",
    ):
        # Everything is imported now that rendering, and failing, needs.
        given: dict[str, Any] = {"template": template, "variables": {}, "messages": [{}]}
        answer(render_jinja_template, json.dumps(given).encode())
    serve(
        lambda line: answer(render_jinja_template, line),
        out,
        limit_s=lambda _line: LIMIT_S,
        memory_bytes=_MEMORY_BYTES,
    )


def answer(render: Any, line: bytes) -> dict[str, str]:
    """The reply to a line.

    Returns:
        A `text`, or why it was `refused` (by the template itself) or is `broken`.
    """
    import jinja2

    asked = json.loads(line)
    try:
        rendered, _ = render(
            conversations=[asked["messages"]],
            tools=asked.get("tools"),
            chat_template=asked["template"],
            add_generation_prompt=asked.get("add_generation_prompt", True),
            continue_final_message=asked.get("continue_final_message", False),
            **asked["variables"],
        )
        return {"text": rendered[0]}
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        if type(error) is jinja2.TemplateError:  # what templates raise themselves
            return {"refused": said}
        return {"broken": f"{type(error).__name__}: {said}"}


if __name__ == "__main__":
    main()
