"""Measure servers with one workload: the one that was asked for, then its peers."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace

from ..environment import expect_no_devices
from ..errors import UsageError, lines
from ..host import processor, usable_cores
from ..remote_server import RemoteServer, is_address
from .serve_load import Run, Target, measure
from .serve_metrics import details, figures, seconds_of
from .serve_options import METRICS, OwnServer, Workload
from .serve_prompts import Prompt, prompts, tokenizer_of
from .serve_report import ServeReport, ServeResult
from .serve_servers import check_transformers, start_ours, start_transformers

TRANSFORMERS = "transformers"
Say = Callable[[str], None]
Watch = Callable[[str, int, int], None]


def run(
    target: str,
    workload: Workload,
    own: OwnServer,
    *,
    command: str,
    peers: Sequence[str] = (),
    model: str | None = None,
    tokenizer: str | None = None,
    api_key: str | None = None,
    say: Say,
    watch: Watch | None = None,
) -> ServeReport:
    """Send the same requests to each server, one server after another.

    Args:
        target: a server's address, or a model that a server is started for.
        own: how that is started.
        peers: addresses, and `transformers` for its own server on the target's model.
        api_key: the target's; peers get none.
        model: what requests to the target call its model, if not the first that it names.
        tokenizer: the model whose tokenizer makes the prompts, if not the target's.
        say: called with what begins.
        watch: called with a server's label, and how many requests have ended, of how many.

    Raises:
        UsageError: a peer is unknown, or there is no tokenizer.
        RunError: a server cannot be reached, dies, or answers no request.
    """
    for peer in peers:
        if peer != TRANSFORMERS and not is_address(peer):
            raise UsageError(
                lines(f"peer {peer!r} is unknown", f"expected {TRANSFORMERS} or an address")
            )
    if len({target, *peers}) <= len(peers):
        raise UsageError(lines("a server is given twice", "expected each once"))
    if TRANSFORMERS in peers:
        check_transformers()
        if is_address(target):
            raise UsageError(
                lines(
                    f"--peer {TRANSFORMERS} was given with a server's address",
                    "expected a model, which it can load, too",
                )
            )
    if is_address(target) and tokenizer is None:
        raise UsageError(
            lines(
                f"there is no tokenizer to make prompts for {target}",
                "give the server's model with --tokenizer: a folder or a hub id",
            )
        )
    expect_no_devices()  # a tokenizer comes with all of transformers
    tokenizer_id = tokenizer or target
    made = prompts(workload, tokenizer_of(tokenizer_id))
    results = []
    for name in (target, *peers):
        say(f"{name}: {'measuring' if is_address(name) else 'starting a server'}")
        with _running(name, target, own, api_key if name is target else None) as running:
            if name is target and model is not None:
                running = replace(running, model=model)
            results.append(_measured(workload, running, *made, watch))
    return ServeReport(
        command=command,
        date=datetime.datetime.now(),
        workload=workload,
        tokenizer_id=tokenizer_id,
        machine={"cpu": processor()[0], "cores": own.threads or usable_cores()},
        results=results,
    )


@contextmanager
def _running(name: str, model: str, own: OwnServer, api_key: str | None) -> Iterator[Target]:
    if is_address(name):
        yield Target(label=name, server=RemoteServer.parse(name, api_key))
        return
    start = start_transformers if name == TRANSFORMERS else start_ours
    process, target = start(model, own)
    with closing(process):
        yield target


def _measured(
    workload: Workload,
    target: Target,
    asked: Sequence[Prompt],
    warmups: Sequence[Prompt],
    watch: Watch | None,
) -> ServeResult:
    def tell(done: int, total: int) -> None:
        if watch is not None:
            watch(target.label, done, total)

    found: Run = measure(workload, target, asked, warmups, tell)
    done = [each for each in found.outcomes if each.error is None]
    return ServeResult(
        label=target.label,
        model_id=found.model,
        figures=figures(workload, found.outcomes, found.duration_s),
        seconds={metric: seconds_of(metric, done) for metric in METRICS},
        details=details(found.outcomes, found.zero) if workload.save_detailed else {},
    )
