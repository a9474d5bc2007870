"""A server's life: HTTP from the start, the model when it is loaded, and an orderly end."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import uvicorn

from ..errors import RunError, lines
from ..inference.llm import LLM
from ..inference.serving import Serving
from . import limits
from .access import AccessRules
from .app import make_app
from .calls import Door
from .connections import BoundedConnection
from .metrics import Metrics
from .served_model import ServedModel
from .sockets import BACKLOG, allow_connections, url_of

FLUSH_S = 3
"""How long answers may take to be sent when the server ends."""
HANG_S = 6
"""How long the process may take to end after its engine has failed."""
TICK_S = 0.1


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """What a server is asked to be.

    Attributes:
        version: ours.
        names: of the model; its own if empty.
        rules: who may ask.
        shutdown_s: how long running requests may go on after SIGTERM.
        root_path: that a proxy takes off.
        own_defaults: whether the sampling defaults of the generation config hold.
        template_arguments: for the chat template.
        metrics: whether /metrics is answered.
    """

    version: str
    names: Sequence[str] = ()
    rules: AccessRules = field(default_factory=AccessRules)
    shutdown_s: float = 30.0
    root_path: str = ""
    own_defaults: bool = True
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    metrics: bool = True


def serve(
    listening: socket.socket,
    options: ServerOptions,
    load: Callable[[], LLM],
    engine: Callable[[LLM], Serving],
    say: Callable[[str], None],
) -> None:
    """Serve a model until a signal asks to stop.

    Args:
        listening: a socket.
        load, engine: make the model, and the engine that runs it.
        say: tells people.

    Raises:
        RunError: the engine has failed.
    """
    allow_connections()
    door = Door(version=options.version)
    http = _Http(listening, door, options)
    with _Signals() as signals:
        http.start()
        try:
            say(f"listening on {url_of(listening)}; loading the model")
            llm = load()
            serving = engine(llm)
            names = options.names or (llm.name,)
            if options.metrics:
                door.metrics = Metrics(serving, names[0])
            door.served = ServedModel(
                serving=serving,
                names=names,
                sampling=llm.source.generation if options.own_defaults else {},
                template_arguments=options.template_arguments,
                created=int(time.time()),
            )
            _wait(lambda: serving.state() != "starting" or signals.asked, http)
            if serving.state() == "ready":
                say(f"serving {names[0]} at {url_of(listening)}")
            signals.loaded = True
            _wait(lambda: serving.state() == "dead" or signals.asked, http)
            door.stopping = True
            if serving.state() == "dead":
                threading.Thread(target=_end_soon, daemon=True).start()
                raise RunError(lines("the engine has failed", "the lines above say why"))
            say(f"stopping: requests that run may take {options.shutdown_s:g} s more")
            serving.close(options.shutdown_s)
        finally:
            http.stop()


def _wait(until: Callable[[], bool], http: _Http) -> None:
    while not until():
        if not http.is_alive():
            raise RunError(lines("the HTTP side has ended"))
        time.sleep(TICK_S)


def _end_soon() -> None:
    """End the process even where a thread of its devices never ends."""
    time.sleep(HANG_S)
    os._exit(1)


class _Http(threading.Thread):
    """The thread of the event loop."""

    def __init__(self, listening: socket.socket, door: Door, options: ServerOptions) -> None:
        super().__init__(name="http", daemon=True)
        config = uvicorn.Config(
            make_app(door, options.rules),
            http=BoundedConnection,
            ws="none",
            lifespan="on",
            log_config=None,
            log_level="critical",  # what fails is logged where it is answered
            access_log=False,
            h11_max_incomplete_event_size=limits.HEADER_BYTES,
            timeout_keep_alive=int(limits.IDLE_S),
            timeout_graceful_shutdown=FLUSH_S,
            server_header=False,
            proxy_headers=False,
            root_path=options.root_path,
            backlog=BACKLOG,
        )
        self._server, self._listening = uvicorn.Server(config), listening

    def run(self) -> None:
        """Answer until `stop`."""
        self._server.run([self._listening])

    def stop(self) -> None:
        """Let answers be sent, and end."""
        self._server.should_exit = True
        self.join(FLUSH_S + 2)


class _Signals:
    """SIGTERM and SIGINT: the first asks to stop, a second one ends the process.

    Attributes:
        asked: whether one came.
        loaded: before that, the first one ends the process, too.
    """

    def __init__(self) -> None:
        self.asked = self.loaded = False

    def __enter__(self) -> _Signals:
        kinds = (signal.SIGTERM, signal.SIGINT)
        self._before = {kind: signal.signal(kind, self._take) for kind in kinds}
        return self

    def __exit__(self, *_error: object) -> None:
        for kind, before in self._before.items():
            signal.signal(kind, before)

    def _take(self, number: int, _frame: FrameType | None) -> None:
        if self.asked:
            os._exit(128 + number)
        self.asked = True
        if not self.loaded:
            raise SystemExit(0)
