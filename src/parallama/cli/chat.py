"""`parallama chat`: talk to a model; its cache is kept between turns."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import Annotated, Any

import typer

from ..errors import UsageError
from ..progress_bars import progress_bars
from ..remote_server import RemoteServer
from . import options, output
from .chat_commands import HELP, command_of
from .input import text_of
from .model_command import ModelCommand
from .template_args import TemplateArgs, template_kwargs
from .unused_options import refuse

CHAT_LENGTH, ANSWER_TOKENS = 2048, 512
"""The defaults of `inference.chat`; to import that takes torch."""
_OF_THE_SERVER = {
    *("adapter", "mesh", "tensor_parallel_size", "devices", "backend", "backend_option", "plan"),
    *("dtype", "allow_nonfinite", "max_model_len"),
}
"""What a server was started with, and a client has no say in."""


class ChatCommand(ModelCommand):
    """Needs no MODEL with `--url`: the server has one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing:
            given, _, _ = self.make_parser(ctx).parse_args(args=list(args))
            asked = [given.get(name) for name in ("model", "model_option")]
            if isinstance(given.get("url"), str) and not any(isinstance(a, str) for a in asked):
                args = ["", *args]
        return super().parse_args(ctx, args)


def chat(
    *,
    context: typer.Context,
    url: Annotated[
        str | None,
        typer.Option(
            "--url",
            help="Talk to an OpenAI-compatible server; MODEL is its name there, if it has several.",
        ),
    ] = None,
    api_key: options.ApiKey = None,
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
    if url is not None:
        refuse(context, _OF_THE_SERVER, "was given with --url", "the server was started with it")
        asked = {
            "max_tokens": max_new_tokens or ANSWER_TOKENS,
            "chat_template_kwargs": variables or None,
        }
        asked |= sampling.arguments
        given = {name: value for name, value in asked.items() if value is not None}
        _talk_to_server(RemoteServer.parse(url, api_key), chosen.model, system, given, quiet)
        return
    refuse(context, {"api_key"}, "was given without --url", "it is a server's")
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
    _talk(
        lambda line: (chunk.text for chunk in talk.send(line, max_new_tokens=max_new_tokens)),
        talk.reset,
    )
    if not quiet:
        stats = talk.stats
        output.say(
            f"[{llm.mesh.shape}; {stats.prefill_tokens} tokens prefilled,"
            f" {stats.decode_steps} decoded, {stats.programs_compiled} programs,"
            f" {stats.programs_after_warmup} after warm-up]"
        )


def _talk_to_server(
    server: RemoteServer, model: str, system: str | None, asked: dict[str, Any], quiet: bool
) -> None:
    from .remote_chat import RemoteChat

    with closing(RemoteChat(server, model=model or None, system=system, asked=asked)) as talk:
        _talk(talk.send, talk.reset)
    if not quiet:
        tokens = f"{talk.tokens} tokens" if talk.tokens else "answers of uncounted tokens"
        output.say(f"[{server.url}, {talk.model}; {tokens} in {talk.seconds:.1f} s]")


def _talk(send: Callable[[str], Iterable[str]], reset: Callable[[], None]) -> None:
    """Answer line after line of standard input; what is refused is said, and the chat goes on."""
    for line in _said():
        try:
            asked = command_of(line)
            if asked == "exit":
                break
            if asked is not None:
                reset() if asked == "new" else output.say(HELP)
                continue
            for text in send(line):
                typer.echo(text, nl=False)
                sys.stdout.flush()
            typer.echo()
        except UsageError as error:
            output.say(f"parallama: {error}")


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
