"""Send a benchmark's requests to a server, in closed or open loop. Pure."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..errors import RunError, lines
from ..remote_server import CHAT, RemoteServer
from .serve_arrivals import arrivals
from .serve_client import Outcome, ask, client, is_there, served_model
from .serve_options import Workload

if TYPE_CHECKING:
    from .serve_prompts import Prompt

Dialect = Literal["openai", "transformers"]
Watch = Callable[[int, int], None]
"""Called with how many requests have ended, of how many."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A server that is measured.

    Attributes:
        label: its name in reports.
        model: what requests call the model; the first that it names if None.
        dialect: `transformers` refuses fields that it doesn't know, `ignore_eos` among them.
    """

    label: str
    server: RemoteServer
    model: str | None = None
    dialect: Dialect = "openai"


@dataclass(frozen=True, kw_only=True)
class Run:
    """What came of a workload.

    Attributes:
        model: what requests called the model.
        zero: where its times begin.
    """

    model: str
    outcomes: list[Outcome]
    zero: float
    duration_s: float


def body(workload: Workload, target: Target, model: str, prompt: Prompt) -> dict[str, Any]:
    """What a request says."""
    said: dict[str, Any] = {
        "model": model,
        "max_tokens": prompt.output_tokens,
        "temperature": workload.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if workload.endpoint == CHAT:
        said["messages"] = [{"role": "user", "content": prompt.text}]
    else:
        said["prompt"] = prompt.text
    if target.dialect == "transformers":
        if workload.goes_past_eos:  # a generation config has no end-of-text token of its own
            said["generation_config"] = json.dumps({"do_sample": workload.temperature > 0})
    elif workload.goes_past_eos:
        said["ignore_eos"] = True
    return said


def measure(
    workload: Workload,
    target: Target,
    prompts: Sequence[Prompt],
    warmups: Sequence[Prompt],
    watch: Watch,
) -> Run:
    """Run a workload on a server.

    Raises:
        RunError: the server cannot be reached, at first or later; or no request succeeds.
    """
    return asyncio.run(_measure(workload, target, prompts, warmups, watch))


async def _measure(
    workload: Workload,
    target: Target,
    prompts: Sequence[Prompt],
    warmups: Sequence[Prompt],
    watch: Watch,
) -> Run:
    async with client(target.server) as http:
        model = target.model or await served_model(http, target.server)

        async def send(prompt: Prompt) -> Outcome:
            outcome = Outcome(prompt_tokens=prompt.tokens)
            await ask(http, workload.endpoint, body(workload, target, model, prompt), outcome)
            return outcome

        gate = asyncio.Semaphore(workload.max_concurrency or max(1, len(prompts)))

        async def send_in_turn(prompt: Prompt) -> Outcome:
            due = time.perf_counter()
            async with gate:
                waited = time.perf_counter() - due
                outcome = await send(prompt)
            outcome.waited_s = waited
            return outcome

        warm = await asyncio.gather(*(send_in_turn(prompt) for prompt in warmups))
        _check(target, warm, "warm-up request")
        ended = 0

        async def send_and_tell(prompt: Prompt) -> Outcome:
            nonlocal ended
            outcome = await send_in_turn(prompt)
            if outcome.gone and not await is_there(http):
                raise RunError(
                    lines(
                        f"the server {target.server.url} is gone: {outcome.error}",
                        f"{ended} of {len(prompts)} requests had ended",
                    )
                )
            ended += 1
            watch(ended, len(prompts))
            return outcome

        zero = time.perf_counter()
        outcomes = await _in_time(zero, arrivals(workload, len(prompts)), prompts, send_and_tell)
        duration_s = time.perf_counter() - zero
        _check(target, outcomes, "request")
        return Run(model=model, outcomes=outcomes, zero=zero, duration_s=duration_s)


async def _in_time(
    zero: float,
    due: Sequence[float],
    prompts: Sequence[Prompt],
    send: Callable[[Prompt], Coroutine[Any, Any, Outcome]],
) -> list[Outcome]:
    """Send every prompt when it is due; all outcomes, in their order. An error ends it at once."""
    tasks: list[asyncio.Task[Outcome]] = []
    try:
        async with asyncio.TaskGroup() as group:
            for after, prompt in zip(due, prompts, strict=True):
                pause = zero + after - time.perf_counter()
                if pause > 0:
                    await asyncio.sleep(pause)
                tasks.append(group.create_task(send(prompt)))
    except* RunError as errors:
        error = errors.exceptions[0]
        assert isinstance(error, RunError)
        raise error from None
    return [task.result() for task in tasks]


def _check(target: Target, outcomes: Sequence[Outcome], what: str) -> None:
    """Raise `RunError` where requests were sent, and none succeeded."""
    if outcomes and all(each.error is not None for each in outcomes):
        raise RunError(
            lines(
                f"{target.label}: no {what} of {len(outcomes)} succeeded: {outcomes[0].error}",
                "see the server's log",
            )
        )
