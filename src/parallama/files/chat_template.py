"""Chat templates: programs that come with a checkpoint, rendered in a process of their own with limits on time, memory and output.

transformers' renderer (jinja2's immutable sandbox, with additions) keeps a template from reaching Python; it does not keep it from looping for ever or from making a text
of ten gigabytes. A process can be ended, from any thread. It is started with the first conversation, and kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ..errors import CheckpointError, RunError, UsageError, cause, lines, shown
from ..isolated_process import how_ended

LIMIT_S = 5.0
"""How long one conversation may take to render."""
LIMIT_BYTES = 16 << 20
"""How long the text may become, in UTF-8, beyond four times the conversation's own length."""
_MEMORY_BYTES = 512 << 20
_START_LIMIT_S, _END_LIMIT_S = 120.0, 10.0
_REPLIES = ("text", "refused", "broken")


class Renderer:
    """Renders conversations with one chat template.

    Args:
        template: the Jinja text.
        variables: what else it may use: special tokens by name.
        origin: the model's name, for messages.
    """

    def __init__(self, template: str, variables: Mapping[str, str], origin: str) -> None:
        self._given = {"template": template, "variables": dict(variables)}
        self._origin = origin
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """The text of a conversation, ready for an answer if `add_generation_prompt`; with `continue_final_message` it ends within the last message.

        May be called from any thread.

        Raises:
            UsageError: the template refuses the messages.
            CheckpointError: the template is broken, or does not end within `LIMIT_S`, or makes a text over `LIMIT_BYTES`.
        """
        plain = [
            {key: value for key, value in message.items() if value is not None}
            for message in messages
        ]
        asked = self._given | {"messages": plain, "add_generation_prompt": add_generation_prompt}
        asked |= {"continue_final_message": True} if continue_final_message else {}
        line = json.dumps(asked).encode() + b"\n"
        limit = LIMIT_BYTES + 4 * len(line)
        with self._lock:
            process = self._running()
            try:
                # JSON may take six bytes for one.
                reply = _read(_ask(process, line, LIMIT_S, 6 * limit), *_REPLIES)
            except _Ended as error:
                self.close()
                how = f"broke its renderer, which {error}" if isinstance(error, _Broken) else error
                raise CheckpointError(
                    lines(
                        f"the chat template of {self._origin} {how}",
                        f"expected a text within {LIMIT_S:g} s, in at most {_MEMORY_BYTES >> 20} MB",
                    )
                ) from None
        if "refused" in reply:
            raise UsageError(
                lines(
                    f"the chat template of {self._origin} refuses the messages: {reply['refused']}"
                )
            )
        if "broken" in reply:
            raise CheckpointError(
                lines(f"the chat template of {self._origin} cannot be rendered: {reply['broken']}")
            )
        text: str = reply["text"]
        if len(text.encode(errors="replace")) > limit:
            raise CheckpointError(
                lines(
                    f"the chat template of {self._origin} makes a text of {len(text)} letters",
                    f"expected at most {limit} bytes",
                )
            )
        return text

    def close(self) -> None:
        """End the process, if there is one; the next conversation starts another."""
        if self._process is not None:
            _end(self._process)
            self._process = None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            # -P: the folder we stand in is no place to import from.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            weakref.finalize(self, _end, self._process)
            try:
                _read(_ask(self._process, b"", _START_LIMIT_S, 10_000), "ready")
            except _Ended as error:
                self.close()
                raise RunError(
                    lines(
                        f"the process that renders chat templates {error}",
                        f"expected it to say that it is ready, within {_START_LIMIT_S:g} s",
                    )
                ) from None
        return self._process


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


class _Ended(Exception):
    """The process did not answer; the text says why."""


class _Broken(_Ended):
    """The process ended, or answered something that is no reply."""


def _ask(process: subprocess.Popen[bytes], line: bytes, limit_s: float, limit_bytes: int) -> bytes:
    """Write a line, and read one."""
    assert process.stdin is not None and process.stdout is not None
    until = time.monotonic() + limit_s
    inward, outward = process.stdin.fileno(), process.stdout.fileno()
    os.set_blocking(inward, False)
    left, found = memoryview(line), bytearray()
    while True:
        seconds = until - time.monotonic()
        if seconds <= 0:
            raise _Ended(f"does not end within {limit_s:g} s")
        poll = select.poll()
        poll.register(outward, select.POLLIN)
        if left:
            poll.register(inward, select.POLLOUT)
        ready = {descriptor for descriptor, _ in poll.poll(1000 * seconds)}
        try:
            if inward in ready:
                left = left[os.write(inward, left[:65536]) :]
            if outward in ready:
                part = os.read(outward, 1 << 20)
                if not part:
                    raise _Broken(_how(process))
                found += part
        except BlockingIOError:
            continue
        except BrokenPipeError:
            raise _Broken(_how(process)) from None
        if len(found) > limit_bytes:
            raise _Ended(f"makes a text of more than {len(found)} bytes")
        if found.endswith(b"\n"):
            return bytes(found)


def _read(line: bytes, *keys: str) -> dict[str, str]:
    """A reply: a JSON object with one of these keys, and a text."""
    try:
        reply = json.loads(line)
    except (ValueError, RecursionError):
        reply = None
    if isinstance(reply, dict) and len(reply) == 1:
        ((key, text),) = reply.items()
        if key in keys and isinstance(text, str):
            return reply
    raise _Broken(f"answered {shown(line[:200], 160)}")


def _how(process: subprocess.Popen[bytes]) -> str:
    """How a process ended that has closed its output."""
    try:
        code: int | None = process.wait(_END_LIMIT_S)
    except subprocess.TimeoutExpired:
        return "closed its output"
    return how_ended(code)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            if pipe is not None:
                pipe.close()


def main() -> None:
    """Render what comes in, line by line, until the input ends."""
    # What is printed by others must not stand between the replies.
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    from transformers.utils.chat_template_utils import render_jinja_template

    os.chdir("/")
    for template in (
        "{{ messages | tojson }}{{ strftime_now('%Y') }}",
        "{{ raise_exception('') }}",
        "{{ 1 // 0 }}",
        "{% for %}",
    ):
        # Everything is imported now that rendering, and failing, needs.
        answer(
            render_jinja_template,
            json.dumps({"template": template, "variables": {}, "messages": [{}]}).encode(),
        )
    _limit()
    _say(out, {"ready": ""})
    for line in sys.stdin.buffer:
        # Should this process be left behind while it renders, it ends by itself.
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(used.ru_utime + used.ru_stime + 2 * LIMIT_S) + 1
        resource.setrlimit(
            resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1])
        )
        _say(out, answer(render_jinja_template, line))


def answer(render: Any, line: bytes) -> dict[str, str]:
    """What to say to a line: a `text`, or why it was `refused` (by the template itself) or is `broken`."""
    import jinja2

    asked = json.loads(line)
    try:
        rendered, _ = render(
            conversations=[asked["messages"]],
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


def _say(out: IO[bytes], reply: Mapping[str, str]) -> None:
    try:
        out.write(json.dumps(reply).encode() + b"\n")
    except MemoryError:
        out.write(b'{"broken": "MemoryError: the text is too long"}\n')
    out.flush()


def _limit() -> None:
    """From here on: no more than so much memory, and no file is opened or grows."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + _MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))


if __name__ == "__main__":
    main()
