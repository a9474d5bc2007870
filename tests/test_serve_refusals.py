"""Bad requests are refused by name, and hurt nobody: bodies, keys, hosts, slow connections."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import train_models
from servers import Server

KEY = "a-key-that-nobody-guesses"
GOOD: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Hi", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
}
HUGE = 10**30
NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty")
WHOLES = ("n", "max_tokens", "top_k", "seed", "min_tokens", "prompt_logprobs")
SWITCHES = (
    *("stream", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens"),
    "return_token_ids",
)
COMMON: list[tuple[str, Any]] = [
    *((name, bad) for name in NUMBERS for bad in (-1, 1e308, "1", True, [], {}, HUGE)),
    *(
        (name, bad)
        for name in ("presence_penalty", "frequency_penalty")
        for bad in (-2.01, 2.01, "0", True, [])
    ),
    *((name, bad) for name in WHOLES for bad in (-(10**20), 1.5, "1", True, [], HUGE)),
    *((name, bad) for name in SWITCHES for bad in (2, "true", [], {})),
    *(("n", bad) for bad in (0, 17)),
    *(("max_tokens", bad) for bad in (-1, 2047, 2048)),
    *(("top_k", bad) for bad in (-2, -1.0)),
    ("prompt_logprobs", 21),
    ("min_tokens", -1),
    *(("seed", bad) for bad in (1 << 64, -(1 << 63) - 1)),
    *(("model", bad) for bad in ("other", 5, [], "x" * 10_000)),
    *(("stop", bad) for bad in (5, [5], "", [""], "x" * 257, ["a"] * 17, [["a"]], {})),
    *(("stop_token_ids", bad) for bad in ("1", [-1], [320], [1.5], [HUGE], ["1"], [[1]])),
    *(("allowed_token_ids", bad) for bad in ("1", [-1], [320], [True], [0] * 1025)),
    *(("bad_words", bad) for bad in ("x", [5], [""], {})),
    *(
        ("logit_bias", bad)
        for bad in (
            *([], "x", {"x": 1}, {"-1": 1}, {"320": 1}, {"1": 101}, {"1": "1"}, {"1.5": 1}),
            *({"1": None}, {"1": -101}, {str(each): 1 for each in range(301)}, {"1": 1, "01": 2}),
        )
    ),
    *(("stream_options", bad) for bad in (5, "x", [], {"include_usage": 5})),
    *(("response_format", bad) for bad in ({"type": "json_object"}, "json", 5)),
]
OWN: dict[str, list[tuple[str, Any]]] = {
    "/v1/completions": [
        *(("prompt", bad) for bad in (None, 5, "", [], {}, [""], [[]], [-1], [320], [1.5])),
        *(("prompt", bad) for bad in ([HUGE], [True], ["a", 5], [[1], "a"], ["a"] * 65, [[320]])),
        *(("prompt", bad) for bad in ("ab " * 4000, [1] * 2048)),
        *(("logprobs", bad) for bad in (-1, 21, "1", True, 1.5)),
        *(("best_of", bad) for bad in (0, 17, "1", 1.5)),
        *(("echo", bad) for bad in (5, "x")),
        *(("max_tokens", bad) for bad in (0,)),
        ("suffix", "x"),
    ],
    "/v1/chat/completions": [
        *(("messages", bad) for bad in (None, 5, "x", [], {}, [5], [[]], [{}], [{"role": "user"}])),
        *(
            ("messages", [bad])
            for bad in (
                {"role": 5, "content": "x"},
                {"role": "", "content": "x"},
                {"role": "user", "content": 5},
                {"role": "user", "content": None},
                {"role": "user", "content": [5]},
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
                {"role": "user", "content": [{"type": "text"}]},
                {"role": "user", "content": "ab " * 4000},
                {"content": "x"},
            )
        ),
        ("messages", [{"role": "user", "content": "x"}] * 4097),
        *(("max_completion_tokens", bad) for bad in (0, -1, "1", 2048)),
        *(("logprobs", bad) for bad in (5, "x")),
        *(("top_logprobs", bad) for bad in (1, 21, -1, "1")),
        *(("tools", bad) for bad in (5, [{"type": "function", "function": {"name": "f"}}])),
        ("tool_choice", "required"),
        *(("chat_template_kwargs", bad) for bad in (5, [], {"messages": []})),
        ("continue_final_message", True),
        ("functions", [{"name": "f"}]),
        ("modalities", ["audio"]),
        ("audio", {"voice": "x"}),
    ],
}
CASES = [(path, {**GOOD[path], name: bad}) for path in GOOD for name, bad in [*COMMON, *OWN[path]]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    (folder / "keys").write_text(f"another-key-beside-it\n{KEY}\n")
    made = Server(
        train_models.make(folder / "model"),
        *("--served-model-name", "tiny", "--api-key-file", str(folder / "keys")),
        log=folder / "log",
    )
    yield made
    made.child.kill()


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client(headers={"authorization": f"Bearer {KEY}"}) as made:
        yield made


def error_of(answer: httpx.Response) -> dict[str, Any]:
    body = answer.json()
    assert body.keys() == {"error"}, body
    error: dict[str, Any] = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}, error
    assert error["message"] and len(error["message"].splitlines()) <= 11
    assert len(error["message"]) < 6000
    return error


def neighbour(client: httpx.Client) -> str:
    asked = {"prompt": "Once upon a time", "max_tokens": 32, "seed": 7, "ignore_eos": True}
    text: str = client.post("/v1/completions", json=asked).json()["choices"][0]["text"]
    return text


def test_bad_fields_are_named_and_a_neighbour_keeps_its_text(client: httpx.Client, server: Server):
    assert len(CASES) >= 250
    before = neighbour(client)
    for number, (path, body) in enumerate(CASES):
        answer = client.post(path, json=body)
        wrong = {name: value for name, value in body.items() if GOOD[path].get(name) != value}
        (name,) = wrong or ("max_tokens",)
        assert 400 <= answer.status_code < 500, (number, str(wrong)[:200], answer.text[:500])
        assert answer.status_code in (400, 404), (wrong, answer.status_code)
        error = error_of(answer)
        named = (error["param"] or "", error["message"])
        others = ("max_completion_tokens", "model", "chat_template_kwargs")
        assert any(name in each for each in named) or name in others, (
            str(wrong)[:200],
            error,
        )
    assert neighbour(client) == before
    assert "Traceback" not in server.log()


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"null", 400),
        (b"[]", 400),
        (b"{", 400),
        (b'{"prompt": "\xff"}', 400),
        (b'{"prompt": "\\ud800"}', 400),
        (b'{"prompt": "a", "temperature": NaN}', 400),
        (b'{"prompt": "a", "temperature": 1e999}', 400),
        (b'{"prompt": "a", "temperature": -Infinity}', 400),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", 400),
        (b'{"prompt": ' + b"[" * 100_000, 400),
        (b'{"prompt": ' + b"[" * 500 + b"]" * 500 + b"}", 400),
        (b'{"prompt": "a", "metadata": ' + b'{"a":' * 33 + b"1" + b"}" * 33 + b"}", 400),
        (b'{"prompt": "' + b"a" * (2 << 20) + b'"}', 413),
    ],
)
def test_bad_bodies(client: httpx.Client, body: bytes, status: int):
    headers = {"content-type": "application/json"}
    answer = client.post("/v1/completions", content=body, headers=headers)
    assert answer.status_code == status, answer.text
    error_of(answer)


def test_a_body_of_another_type_is_refused_since_any_web_page_may_send_it(client: httpx.Client):
    answer = client.post("/v1/completions", content=b'{"prompt": "a"}')
    assert answer.status_code == 400 and "application/json" in error_of(answer)["message"]


def test_a_message_names_ten_places_at_most(client: httpx.Client):
    bad = {"messages": [{"role": 5}] * 30}
    message = error_of(client.post("/v1/chat/completions", json=bad))["message"]
    assert len(message.splitlines()) == 11 and "20 more" in message


def test_every_route_of_the_model_asks_for_a_key(server: Server):
    with server.client() as plain:
        for method, path in (
            ("GET", "/v1/models"),
            ("POST", "/v1/completions"),
            ("POST", "/v1/chat/completions"),
            ("POST", "/tokenize"),
            ("POST", "/detokenize"),
            ("GET", "/metrics"),
            ("GET", "/mesh"),
            ("GET", "/v1/nothing"),
        ):
            for headers in ({}, {"authorization": f"Bearer {KEY}x"}, {"authorization": KEY}):
                answer = plain.request(method, path, headers=headers)
                assert answer.status_code == 401, (path, headers)
                assert error_of(answer)["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer"
        for path in ("/health", "/live", "/version", "/", "/docs", "/openapi.json"):
            assert plain.get(path).status_code == 200, path
        for key in (KEY, "another-key-beside-it"):
            headers = {"authorization": f"Bearer {key}"}
            assert plain.get("/v1/models", headers=headers).status_code == 200
    assert KEY not in server.log()


def test_other_names_in_the_host_header_are_refused(server: Server, client: httpx.Client):
    port = server.url.rpartition(":")[2]
    for host, status in (
        ("evil.example", 400),
        (f"evil.example:{port}", 400),
        ("127.0.0.1.evil.example", 400),
        ("", 400),
        (f"localhost:{port}", 200),
        ("[::1]:80", 200),
        ("LOCALHOST", 200),
    ):
        answer = client.get("/v1/models", headers={"host": host})
        assert answer.status_code == status, host
        if status != 200:
            error_of(answer)


def test_no_other_origin_is_let_in(client: httpx.Client):
    headers = {
        "origin": "https://evil.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "content-type",
    }
    for answer in (
        client.options("/v1/completions", headers=headers),
        client.get("/v1/models", headers=headers),
    ):
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_slow_and_broken_connections_are_cut_off_beside_others(
    server: Server, client: httpx.Client
):
    host, port = server.url.removeprefix("http://").split(":")
    with contextlib.ExitStack() as stack:
        slow = [
            stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(500)
        ]
        began = time.monotonic()
        for each in slow[1:]:
            each.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n")
        assert len(neighbour(client)) and time.monotonic() - began < 8
        for each in slow:
            each.settimeout(20)
            with contextlib.suppress(ConnectionResetError):
                assert each.recv(100) == b""
        assert 8 < time.monotonic() - began < 16
    for sent in (
        b"\x16\x03\x01 nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * (17 << 10) + b"\r\n\r\n",
    ):
        with socket.create_connection((host, int(port)), timeout=20) as broken:
            broken.sendall(sent)
            with contextlib.suppress(ConnectionResetError):
                head, _, body = read_all(broken).partition(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 400")
                assert json.loads(body)["error"]["code"] in ("invalid_http", "headers_too_large")
    assert client.get("/health").status_code == 200


def read_all(connection: socket.socket) -> bytes:
    found = b""
    while part := connection.recv(10_000):
        found += part
    return found


@pytest.mark.slow
def test_a_slow_body_is_cut_off(server: Server):
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=40) as slow:
        slow.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer "
            + KEY.encode()
            + b"\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
        began = time.monotonic()
        assert slow.recv(10_000).startswith(b"HTTP/1.1 408")
        assert 25 < time.monotonic() - began < 38


def test_keys_stay_out_of_sight(tmp_path: Path):
    from parallama.errors import UsageError
    from parallama.serve.keys import read_keys

    (tmp_path / "empty").write_text("\n")
    (tmp_path / "short").write_text("short")
    for file in ("empty", "short", "none"):
        with pytest.raises(UsageError) as refused:
            read_keys([], tmp_path / file)
        assert file in str(refused.value)
    with pytest.raises(UsageError) as refused:
        read_keys(["with a space"], None)
    assert "with a space" not in str(refused.value)
