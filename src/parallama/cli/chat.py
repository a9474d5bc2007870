"""`parallama chat`: talk to a model; its cache is kept between turns."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from ..errors import UsageError
from ..progress_bars import progress_bars
from . import options, output
from .chat_commands import HELP, command_of
from .input import text_of
from .template_args import TemplateArgs, template_kwargs

CHAT_LENGTH = 2048
"""`inference.chat.DEFAULT_CHAT_LENGTH`; to import that takes torch."""


def chat(
    *,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    chat_template_arg: TemplateArgs = None,
    chosen: options.ModelOptions,
    max_model_len: options.MaxModelLen = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            help="Most new tokens an answer.",
            show_default="512",
            callback=options.within(1),
        ),
    ] = None,
    sampling: options.SamplingOptions,
    quiet: options.Quiet = False,
) -> None:
    """Talk to a model, one line a turn. /help lists the commands; /new starts over, /exit or the
    end of input leaves.
    """
    variables = template_kwargs(chat_template_arg)
    chosen.check_lengths(max_model_len, max_new_tokens, default_len=CHAT_LENGTH)
    with progress_bars(quiet) as progress:
        llm = chosen.load(progress=progress, max_model_len=max_model_len)
        from ..inference.chat import Chat

        talk = Chat(
            llm,
            system=system,
            max_model_len=max_model_len,
            chat_template_kwargs=variables,
            **sampling.arguments,
        )
    for line in _said():
        try:
            asked = command_of(line)
            if asked == "exit":
                break
            if asked is not None:
                talk.reset() if asked == "new" else output.say(HELP)
                continue
            for chunk in talk.send(line, max_new_tokens=max_new_tokens):
                typer.echo(chunk.text, nl=False)
                sys.stdout.flush()
            typer.echo()
        except UsageError as error:
            output.say(f"parallama: {error}")
    if not quiet:
        stats = talk.stats
        output.say(
            f"[{llm.mesh.shape}; {stats.prefill_tokens} tokens prefilled,"
            f" {stats.decode_steps} decoded, {stats.programs_compiled} programs,"
            f" {stats.programs_after_warmup} after warm-up]"
        )


def _said() -> Iterator[str]:
    """The lines of standard input that hold something, until its end."""
    terminal = sys.stdin.isatty()
    while True:
        if terminal:
            typer.echo("> ", nl=False, err=True)
        line = text_of(sys.stdin.readline)
        if not line:
            return
        if line.strip():
            yield line.strip()
