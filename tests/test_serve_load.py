"""A server holds up: under load, for long, and beside clients that go, are slow, or never read."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import train_models
from load_clients import (
    LIMIT_S,
    PROBE,
    Held,
    ask,
    at_rest,
    break_off,
    connect,
    many,
    metric,
    probe,
    raw,
    some_request,
)
from servers import Server

from parallama.serve.limits import BODY_S

SMALL = (
    *("--max-num-seqs", "4", "--max-num-batched-tokens", "32"),
    *("--max-num-queued-reqs", "48"),
)
UNREAD: dict[str, Any] = {
    **{"prompt": "Hi", "max_tokens": 1500, "n": 4, "ignore_eos": True, "return_token_ids": True},
    **{"stream": True, "priority": -1},
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
}
"""A request whose answer is more than the system's buffers take."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return train_models.make(tmp_path_factory.mktemp("served") / "model")


@pytest.fixture(scope="module")
def small(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Few programs, which are soon compiled."""
    log = tmp_path_factory.mktemp("small") / "log"
    made = Server(model, *SMALL, log=log, send_s=8)
    yield made
    made.child.kill()


@pytest.fixture(scope="module")
def whole(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """As people start it."""
    made = Server(model, log=tmp_path_factory.mktemp("whole") / "log", optimize=True)
    yield made
    made.child.kill()


@pytest.mark.parametrize(
    ("kind", "count", "at_once"),
    [("small", 300, 60), pytest.param("whole", 2000, 200, marks=pytest.mark.slow)],
)
def test_each_of_many_requests_is_answered_or_refused(
    request: pytest.FixtureRequest, kind: str, count: int, at_once: int
) -> None:
    server: Server = request.getfixturevalue(kind)
    with server.client() as client:
        alone, before = probe(client), Held(server)
        found = asyncio.run(many(server, count, at_once, seed=1))
        assert set(found) == {200, 429} and found.total() == count, found
        assert found[200] > count / 4
        text = at_rest(server, client)
        assert metric(text, "requests_rejected_total") == found[429]
        assert probe(client) == alone
    after = Held(server)
    print(f"{count} requests, {at_once} at once: {dict(found)}; {before}, then {after}")
    assert after.memory < 1.1 * before.memory
    assert "Traceback" not in server.log()


def test_500_broken_connections_leave_nothing_behind(small: Server) -> None:
    with small.client() as client:
        alone, before = probe(client), Held(small)

        def some(seed: int) -> None:
            chance = random.Random(seed)
            for _ in range(50):
                break_off(small, chance)

        threads = [threading.Thread(target=some, args=(seed,)) for seed in range(10)]
        for each in threads:
            each.start()
        for each in threads:
            each.join(LIMIT_S)
        text = at_rest(small, client)
        assert 'finished_reason="abort"' in text
        assert probe(client) == alone
        until = time.monotonic() + 30
        while True:  # threads that tokenize end when they had nothing to do for a while
            after = Held(small)
            if after.threads <= before.threads and after.files <= before.files:
                break
            assert time.monotonic() < until, (before, after)
            time.sleep(0.2)
            probe(client)
    assert after.memory < 1.1 * before.memory
    assert "Traceback" not in small.log()


@pytest.fixture(scope="module")
def slow_steps(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two slots, and rounds that take longer than anything of HTTP's."""
    log = tmp_path_factory.mktemp("slow") / "log"
    limits = ("--max-num-seqs", "2", "--max-num-batched-tokens", "32")
    made = Server(model, *limits, log=log, round_s=0.1)
    yield made
    made.child.kill()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("prompt", [3, 1600])
def test_a_client_that_goes_frees_its_slot_within_a_round(
    slow_steps: Server, prompt: int, stream: bool
) -> None:
    """A neighbour's tokens count the rounds until the next in the queue gets the slot."""
    ids = [random.Random(prompt + stream).randrange(3, 300) for _ in range(prompt)]
    asked = {"prompt": ids, "max_tokens": 400, "ignore_eos": True, "stream": stream}
    first: list[int] = []  # tokens of the neighbour's when the next one got its first
    with slow_steps.client() as client:

        def wait_for_a_slot() -> None:
            answer = client.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 1})
            assert answer.status_code == 200, answer.text
            first.append(rounds)

        rounds = 0
        gone = connect(slow_steps)
        waiting = threading.Thread(target=wait_for_a_slot)
        closed = 0
        body = PROBE | {"stream": True, "max_tokens": 400}
        with client.stream("POST", "/v1/completions", json=body) as neighbour:
            for line in neighbour.iter_lines():
                rounds += line.startswith("data: ")
                if not line.startswith("data: "):
                    continue
                if rounds == 1:
                    gone.sendall(b"".join(raw(slow_steps, "/v1/completions", asked)))
                elif rounds == 5:
                    waiting.start()
                elif rounds == 8:
                    assert not first
                    closed = rounds
                    gone.close()
                elif first:
                    break
        waiting.join(LIMIT_S)
        at_rest(slow_steps, client)
    # The round that ran when it went, one with the next one's prompt, and one to hear of it.
    assert first[0] - closed <= 3


@pytest.mark.parametrize(
    ("kind", "seconds"),
    [("small", 20), pytest.param("whole", 900, marks=pytest.mark.slow)],
)
def test_a_server_that_works_for_long_stays_as_it_was(
    request: pytest.FixtureRequest, kind: str, seconds: int
) -> None:
    """Whoever never reads, or never sends all of a body, is cut off."""
    server: Server = request.getfixturevalue(kind)
    with server.client() as client, contextlib.ExitStack() as stack:
        alone, before = probe(client), Held(server)
        unread = [stack.enter_context(connect(server, 1024)) for _ in range(2)]
        for each in unread:
            each.sendall(b"".join(raw(server, "/v1/completions", UNREAD)))
        unsent = stack.enter_context(connect(server))
        head, body = raw(server, "/v1/completions", PROBE)
        unsent.sendall(head + body[:-1])
        found, memory = asyncio.run(_work(server, seconds))
        text = at_rest(server, client)
        assert probe(client) == alone
        for each in unread:
            assert not _read_all(each).endswith(b"0\r\n\r\n")
        if seconds > BODY_S:
            assert _read_all(unsent).startswith(b"HTTP/1.1 408")
    assert metric(text, "programs_compiled_while_serving_total") == 0
    assert metric(text, "kv_cache_usage_perc") == 0
    assert set(found) <= {200, 429} and found[200] > 3 * seconds, found
    early, late = (
        statistics.median(memory[len(memory) * part // 10 :][: len(memory) // 5 + 1])
        for part in (2, 8)
    )
    print(f"{seconds} s: {dict(found)}; {before}; {early:.0f} MB, then {late:.0f} MB")
    assert late < 1.03 * early
    assert "Traceback" not in server.log()


async def _work(server: Server, seconds: float) -> tuple[Counter[int], list[float]]:
    """Keep a server busy: statuses, and its memory as it went."""
    until = time.monotonic() + seconds
    found: Counter[int] = Counter()
    memory: list[float] = []

    async def client(seed: int) -> None:
        chance = random.Random(seed)
        while time.monotonic() < until:
            if chance.random() < 0.15:
                await asyncio.to_thread(break_off, server, chance)
                continue
            path, body = some_request(chance)
            status = await asyncio.wait_for(ask(http, path, body), LIMIT_S)
            found[status] += 1
            if status == 429:
                await asyncio.sleep(0.1)

    async def watch() -> None:
        while time.monotonic() < until:
            memory.append(Held(server).memory)
            await asyncio.sleep(0.5)

    async with httpx.AsyncClient(base_url=server.url, timeout=LIMIT_S) as http:
        await asyncio.gather(watch(), *(client(seed) for seed in range(20)))
    return found, memory


def _read_all(connection: socket.socket) -> bytes:
    found = b""
    connection.settimeout(5)
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(1 << 20):
            found = (found + part)[-4096:]
    return found
