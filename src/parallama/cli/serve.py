"""`parallama serve`: an OpenAI-compatible server."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError, cause, lines, shown
from ..progress_bars import progress_bars
from ..text_files import read
from . import options, output
from .serve_options import Listening, Memory, Queue

if TYPE_CHECKING:
    from socket import socket as Socket

    from ..inference.llm import LLM
    from ..inference.serving import Serving
    from ..inference.sharded_model import Progress
    from ..plan.placement import Plan
    from ..serve.access import AccessRules

PACKAGES = ("starlette", "uvicorn", "pydantic", "prometheus_client")


def serve(
    *,
    chosen: options.ModelOptions,
    memory: Memory,
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
    chosen.check_lengths(memory.max_model_len)
    memory.room(chosen.backend)  # refuses hardware that isn't known
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
            llm = chosen.load(progress=progress, max_model_len=_context(memory, queue, chosen))
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


def _context(
    memory: Memory, queue: Queue, chosen: options.ModelOptions
) -> Callable[[Plan, int], int]:
    """Says how long requests may be, before weights are read."""

    def fitted(plan: Plan, itemsize: int) -> int:
        from ..plan.slot_fit import Slots

        slots = Slots(
            plan=plan,
            count=queue.max_num_seqs,
            itemsize=itemsize,
            chunk=queue.max_num_batched_tokens,
            room=memory.room(chosen.backend),
        )
        tokens = slots.context(memory.max_model_len)
        output.say(slots.said(tokens))
        return tokens

    return fitted


def _engine(queue: Queue, progress: Progress | None) -> Callable[[LLM], Serving]:
    """Makes the engine that answers requests, once it has compiled every program."""

    def made(llm: LLM) -> Serving:
        from ..inference.continuous import ContinuousEngine

        engine = ContinuousEngine(
            llm,
            max_num_seqs=queue.max_num_seqs,
            max_num_queued_reqs=queue.max_num_queued_reqs,
            max_num_queued_tokens=queue.max_num_queued_tokens,
            prefix_caching=queue.enable_prefix_caching,
            progress=None if progress is None else partial(progress, "compiling"),
            chunk=queue.max_num_batched_tokens,
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
