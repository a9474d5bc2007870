"""Clients by the hundred: requests of every kind, and connections that break off."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import struct
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from servers import Server

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "sleeps"]
LIMIT_S = 120
"""No request takes longer, or it hangs."""
PROBE: dict[str, Any] = {
    "prompt": "Once upon a time",
    "max_tokens": 24,
    "seed": 7,
    "ignore_eos": True,
    "return_token_ids": True,
}


def words(chance: random.Random, count: int) -> str:
    return " ".join(chance.choice(WORDS) for _ in range(count))


def some_request(chance: random.Random) -> tuple[str, dict[str, Any]]:
    """Streams, long prompts, several answers, seeds: whatever clients ask for."""
    body: dict[str, Any] = {
        "max_tokens": chance.choice((1, 4, 12, 32)),
        "stream": chance.random() < 0.5,
        "ignore_eos": chance.random() < 0.7,
        "temperature": chance.choice((0, 0.7, 1)),
    }
    if chance.random() < 0.3:
        body["n"] = chance.randrange(2, 5)
    if chance.random() < 0.3:
        body["seed"] = chance.randrange(100)
    if chance.random() < 0.2:
        body |= {"stop": ["e", "the"], "repetition_penalty": 1.2}
    text = words(chance, 300 if chance.random() < 0.05 else chance.randrange(1, 30))
    if chance.random() < 0.4:
        return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": text}]}
    return "/v1/completions", body | {"prompt": text}


async def ask(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> int:
    """Its status, once the answer is whole and what it should be."""
    answer = await client.post(path, json=body)
    if answer.status_code == 429:
        assert answer.headers["retry-after"] and answer.json()["error"]["code"]
    elif body.get("stream"):
        events = answer.text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""], answer.text[-300:]
        assert '"error"' not in answer.text
        ended = [event for event in events if '"finish_reason":"' in event]
        assert len(ended) == body.get("n", 1)
    else:
        choices = answer.json()["choices"]
        assert len(choices) == body.get("n", 1)
        assert all(choice["finish_reason"] in ("stop", "length") for choice in choices)
    return answer.status_code


async def many(server: Server, count: int, at_once: int, seed: int) -> Counter[int]:
    """Statuses of so many requests, so many of which run at a time."""
    chance = random.Random(seed)
    todo = iter([some_request(chance) for _ in range(count)])
    found: Counter[int] = Counter()

    async def client() -> None:
        for path, body in todo:
            found[await asyncio.wait_for(ask(http, path, body), LIMIT_S)] += 1

    limits = httpx.Limits(max_connections=at_once)
    async with httpx.AsyncClient(base_url=server.url, timeout=LIMIT_S, limits=limits) as http:
        await asyncio.gather(*(client() for _ in range(at_once)))
    return found


def raw(server: Server, path: str, body: dict[str, Any]) -> tuple[bytes, bytes]:
    """A request's headers and body as they are sent."""
    sent = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(sent)}\r\n\r\n"
    )
    return head.encode(), sent


def connect(server: Server, receive_bytes: int | None = None) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    made = socket.socket()
    if receive_bytes is not None:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    made.settimeout(LIMIT_S)
    made.connect((host, int(port)))
    return made


def break_off(server: Server, chance: random.Random) -> None:
    """Connect, and be gone: before the headers are whole, in mid body, in prefill, in decode."""
    path, body = some_request(chance)
    head, sent = raw(server, path, body | {"max_tokens": 400, "ignore_eos": True})
    with connect(server) as gone:
        kind = chance.randrange(5)
        if kind == 0:
            gone.sendall(head[: chance.randrange(len(head))])
        elif kind == 1:
            gone.sendall(head + sent[: chance.randrange(len(sent))])
        else:
            gone.sendall(head + sent)
        if kind == 4:
            gone.settimeout(0.3)
            with contextlib.suppress(ConnectionResetError, TimeoutError):
                gone.recv(chance.randrange(1, 3000))
        elif chance.random() < 0.7:
            time.sleep(chance.random() * 0.05)
        if chance.random() < 0.5:  # reset, not closed
            gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class Held:
    """What a server's process holds: memory in MB, threads and open files."""

    def __init__(self, server: Server) -> None:
        process = Path(f"/proc/{server.child.pid}")
        status = (process / "status").read_text()
        self.memory = int(status.split("VmRSS:")[1].split()[0]) / 1024
        self.threads = len(list((process / "task").iterdir()))
        self.files = len(list((process / "fd").iterdir()))

    def __repr__(self) -> str:
        return f"{self.memory:.0f} MB, {self.threads} threads, {self.files} files"


def metric(text: str, name: str) -> float:
    (line,) = [each for each in text.splitlines() if each.startswith(f"parallama:{name}{{")]
    return float(line.split()[-1])


def probe(client: httpx.Client) -> list[int]:
    """What a request with a seed is answered."""
    answer = client.post("/v1/completions", json=PROBE)
    assert answer.status_code == 200, answer.text
    ids: list[int] = answer.json()["choices"][0]["token_ids"]
    return ids


def at_rest(server: Server, client: httpx.Client, within_s: float = 20) -> str:
    """The metrics, once nothing runs or waits."""
    until = time.monotonic() + within_s
    while True:
        text = client.get("/metrics").text
        if metric(text, "num_requests_running") == metric(text, "num_requests_waiting") == 0:
            return text
        assert time.monotonic() < until, text
        time.sleep(0.01)
