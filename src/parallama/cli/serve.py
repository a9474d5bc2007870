"""`parallama serve`: an OpenAI-compatible server."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError, cause, lines, shown
from ..progress_bars import progress_bars
from ..text_files import read
from . import options, output

if TYPE_CHECKING:
    from socket import socket as Socket

    from ..inference.llm import LLM
    from ..inference.serving import Serving
    from ..inference.sharded_model import Progress
    from ..serve.access import AccessRules

PACKAGES = ("starlette", "uvicorn", "pydantic", "prometheus_client")


@dataclass(frozen=True, kw_only=True)
class Listening:
    """Where a server listens, and who may ask."""

    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1"
    port: Annotated[
        int,
        typer.Option("--port", help="0 finds a free one.", callback=options.within(0, 65535)),
    ] = 8000
    uds: Annotated[
        Path | None, typer.Option("--uds", help="Unix domain socket, in place of host and port.")
    ] = None
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key", help="Key to ask for; several times. PARALLAMA_API_KEY hides better."
        ),
    ] = None
    api_key_file: Annotated[
        Path | None, typer.Option("--api-key-file", help="File with a key a line.")
    ] = None
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help="Let other machines ask without a key.")
    ] = False
    allowed_host: Annotated[
        list[str] | None,
        typer.Option("--allowed-host", help="Another name in the Host header; several times."),
    ] = None
    root_path: Annotated[
        str, typer.Option("--root-path", help="Path before ours that a proxy takes off.")
    ] = ""


@dataclass(frozen=True, kw_only=True)
class Queue:
    """How many requests run, and wait."""

    max_num_seqs: Annotated[
        int,
        typer.Option(
            "--max-num-seqs", help="Most requests at a time.", callback=options.within(1, 1024)
        ),
    ] = 16
    max_num_batched_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-num-batched-tokens",
            help="Tokens of a prompt between two steps of the others.",
            callback=options.within(1),
        ),
    ] = None
    max_num_queued_reqs: Annotated[
        int,
        typer.Option(
            "--max-num-queued-reqs",
            help="Most requests that wait; more are answered with 429.",
            callback=options.within(1),
        ),
    ] = 128
    max_num_queued_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-num-queued-tokens",
            help="Most prompt tokens that wait.",
            callback=options.within(1),
        ),
    ] = None
    enable_prefix_caching: Annotated[
        bool,
        typer.Option(
            "--enable-prefix-caching/--no-enable-prefix-caching",
            help="Use what is cached for requests that begin the same.",
        ),
    ] = True


def serve(
    *,
    chosen: options.ModelOptions,
    max_model_len: options.MaxModelLen = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            "--served-model-name",
            help="What requests call the model; several times.",
            show_default="MODEL",
        ),
    ] = None,
    listening: Listening,
    queue: Queue,
    generation_config: Annotated[
        str,
        typer.Option(
            "--generation-config",
            help="auto: sampling defaults of the model's; none: of OpenAI's.",
        ),
    ] = "auto",
    chat_template: Annotated[
        Path | None,
        typer.Option("--chat-template", help="A file, in place of the model's own."),
    ] = None,
    default_chat_template_kwargs: Annotated[
        str | None,
        typer.Option("--default-chat-template-kwargs", help='JSON, as {"enable_thinking": false}.'),
    ] = None,
    shutdown_timeout: Annotated[
        float,
        typer.Option(
            "--shutdown-timeout",
            help="Seconds that running requests get after SIGTERM.",
            callback=options.within(0, 86400),
        ),
    ] = 30.0,
    metrics: Annotated[
        bool, typer.Option("--metrics/--no-metrics", help="Answer /metrics, for Prometheus.")
    ] = True,
    quiet: options.Quiet = False,
) -> None:
    """Serve a model over HTTP, as OpenAI does: /v1/chat/completions, /v1/completions and more;
    Ctrl+C ends it.
    """
    _check_packages()
    if generation_config not in ("auto", "none"):
        raise UsageError(
            lines(f"--generation-config is {generation_config!r}", "expected auto or none")
        )
    arguments = _arguments(default_chat_template_kwargs)
    template = _template(chat_template)
    chosen.check_lengths(max_model_len)
    from .. import __version__
    from ..serve import server

    listens, rules = _listen(listening)
    asked = server.ServerOptions(
        version=__version__,
        names=served_model_name or (),
        rules=rules,
        shutdown_s=shutdown_timeout,
        root_path=listening.root_path.rstrip("/"),
        own_defaults=generation_config == "auto",
        template_arguments=arguments,
        metrics=metrics,
    )
    with listens, progress_bars(quiet) as progress:

        def load() -> LLM:
            llm = chosen.load(progress=progress, max_model_len=max_model_len)
            if template is not None:
                _use_template(llm, template)
            return llm

        server.serve(listens, asked, load, _engine(queue, progress), output.say)


def _check_packages() -> None:
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise UsageError(
            lines(f"{', '.join(missing)} is not installed", "pip install 'parallama[serve]'")
        )


def _arguments(given: str | None) -> dict[str, Any]:
    """`--default-chat-template-kwargs`, read."""
    if given is None:
        return {}
    try:
        found = json.loads(given)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UsageError(
            lines(
                f"--default-chat-template-kwargs is {shown(given)}",
                'expected a JSON object, as {"enable_thinking": false}',
            )
        )
    return found


def _template(file: Path | None) -> str | None:
    """`--chat-template`, read."""
    if file is None:
        return None
    try:
        return read(file)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            lines(f"--chat-template {file} cannot be read: {cause(error)}", "expected a text")
        ) from None


def _listen(asked: Listening) -> tuple[Socket, AccessRules]:
    """A socket, and who may ask there."""
    from ..serve.access import LOOPBACK, AccessRules
    from ..serve.keys import hide_arguments, read_keys
    from ..serve.sockets import bound, bound_file, check_exposed, is_loopback

    keys = read_keys(asked.api_key or (), asked.api_key_file)
    hide_arguments(asked.api_key or ())
    more = asked.allowed_host or []
    if asked.uds is not None:
        return bound_file(asked.uds), AccessRules(keys=keys, hosts=more or None)
    check_exposed(asked.host, keys=bool(keys), no_auth=asked.no_auth)
    local = is_loopback(asked.host)
    hosts = {*more, *LOOPBACK, asked.host} if local else set(more)
    return bound(asked.host, asked.port), AccessRules(keys=keys, hosts=hosts or None)


def _engine(queue: Queue, progress: Progress | None) -> Callable[[LLM], Serving]:
    """Makes the engine that answers requests, once it has compiled every program."""

    def made(llm: LLM) -> Serving:
        from ..inference.continuous import ContinuousEngine

        chunk = queue.max_num_batched_tokens
        engine = ContinuousEngine(
            llm,
            max_num_seqs=queue.max_num_seqs,
            max_num_queued_reqs=queue.max_num_queued_reqs,
            max_num_queued_tokens=queue.max_num_queued_tokens,
            prefix_caching=queue.enable_prefix_caching,
            progress=None if progress is None else partial(progress, "compiling"),
            **({} if chunk is None else {"chunk": chunk}),
        )
        engine.start()
        return engine

    return made


def _use_template(llm: LLM, template: str) -> None:
    if llm.tokenizer is None:
        raise UsageError(
            lines(f"model {llm.name!r} has no tokenizer", "expected no --chat-template")
        )
    llm.tokenizer.chat_template = template
