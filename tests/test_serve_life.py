"""A server's beginning and end: what is said before loading, signals, and clients that go."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import train_models
from forks import command, environment, script
from messages import check_refusal
from servers import Server

KEY = "a-key-that-nobody-guesses"
LONG: dict[str, Any] = {"prompt": "Hi", "max_tokens": 1500, "ignore_eos": True}
SOME = LONG | {"prompt": ["Hi"] * 16, "max_tokens": 300}
MANY = LONG | {"prompt": ["Hi"] * 64, "max_tokens": 200}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return train_models.make(tmp_path_factory.mktemp("served") / "model")


@pytest.fixture
def server(model: str, tmp_path: Path) -> Iterator[Server]:
    made = Server(model, "--shutdown-timeout", "120", log=tmp_path / "log")
    yield made
    made.child.kill()


def refused(*words: str, cwd: Path, **env: str | None) -> Any:
    return command(["serve", "nowhere", *words], cwd=cwd, env=env)


def test_what_is_wrong_is_said_before_anything_is_loaded(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        check_refusal(refused("--port", port, cwd=tmp_path), 2, port, "127.0.0.1")
    (tmp_path / "file").write_text("")
    for words, parts in (
        (["--host", "0.0.0.0"], ("--host 0.0.0.0", "--no-auth")),
        (["--api-key-file", "none"], ("--api-key-file none",)),
        (["--api-key-file", "file"], ("--api-key-file file",)),
        (["--api-key", "short"], ("--api-key", "5 letters")),
        (["--uds", "file"], ("--uds file",)),
        (["--generation-config", "some"], ("--generation-config", "some")),
        (["--chat-template", "none"], ("--chat-template none",)),
        (["--default-chat-template-kwargs", "[]"], ("--default-chat-template-kwargs",)),
        (["--port", "65536"], ("--port", "65536")),
        (["--host", "no.such.name.invalid"], ("no.such.name.invalid",)),
    ):
        check_refusal(
            refused(*words, "--port", "0", cwd=tmp_path)
            if "--port" not in words
            else refused(*words, cwd=tmp_path),
            2,
            *parts,
        )


def test_a_missing_extra_is_named(tmp_path: Path):
    text = (
        "import sys; sys.modules['uvicorn'] = None; from parallama.__main__ import run;"
        "sys.exit(run(['serve', 'nowhere']))"
    )
    check_refusal(script(text, cwd=tmp_path), 2, "uvicorn", "pip install 'parallama[serve]'")


def test_sigterm_lets_running_requests_end_and_takes_no_more(server: Server):
    found: list[Any] = []

    def ask() -> None:
        with server.client() as client:
            found.append(client.post("/v1/completions", json=SOME).json())

    asking = threading.Thread(target=ask)
    asking.start()
    with server.client() as client:
        while metric(client.get("/metrics").text, "num_requests_running") < 1:
            time.sleep(0.01)
        server.signal()
        server.until("stopping")
        for answer in (client.get("/health"), client.post("/v1/completions", json=LONG)):
            assert answer.status_code == 503, answer.text
            assert answer.json()["error"]["code"] == "engine_stopping"
            assert "retry-after" in answer.headers
        assert client.get("/live").status_code == 200
    asking.join(150)
    assert found[0]["usage"]["completion_tokens"] == 16 * 300
    assert server.child.wait(30) == 0


def test_a_second_signal_ends_at_once(server: Server):
    with (
        server.client() as client,
        client.stream("POST", "/v1/completions", json=MANY | {"stream": True}) as answer,
    ):
        next(answer.iter_lines())
        server.signal()
        server.until("stopping")
        server.signal()
        assert server.child.wait(5) == 128 + signal.SIGTERM


def test_a_failed_engine_ends_its_requests_and_the_process(model: str, tmp_path: Path):
    server = Server(model, log=tmp_path / "log", fails_at=tmp_path / "fail")
    try:
        with (
            server.client() as client,
            client.stream("POST", "/v1/completions", json=MANY | {"stream": True}) as answer,
        ):
            lines = answer.iter_lines()
            next(lines)
            began = time.monotonic()
            (tmp_path / "fail").touch()
            rest = [line for line in lines if line]
        assert '"error"' in rest[-2] and rest[-1] == "data: [DONE]"
        assert server.child.wait(10) == 1 and time.monotonic() - began < 10
        assert "a device is lost" in server.log()
    finally:
        server.child.kill()


def test_clients_that_go_leave_nothing_behind(server: Server):
    with server.client() as client:
        for _ in range(5):
            with client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as answer:
                next(answer.iter_lines())
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/completions", json=MANY, timeout=0.1)
        began = time.monotonic()
        short = {"prompt": "Hi", "max_tokens": 1}
        assert client.post("/v1/completions", json=short).status_code == 200
        assert time.monotonic() - began < 5
        text = client.get("/metrics").text
    assert metric(text, "num_requests_running") == metric(text, "num_requests_waiting") == 0
    assert 'finished_reason="abort"' in text and "Traceback" not in server.log()


def metric(text: str, name: str) -> float:
    (line,) = [each for each in text.splitlines() if each.startswith(f"parallama:{name}{{")]
    return float(line.split()[-1])


def test_a_socket_file_and_a_key_from_the_environment(model: str, tmp_path: Path):
    path = tmp_path / "socket"
    made = Server(
        *(model, "--uds", str(path)), log=tmp_path / "log", env={"PARALLAMA_API_KEY": KEY}
    )
    try:
        with httpx.Client(
            transport=httpx.HTTPTransport(uds=str(path)), base_url="http://any.name"
        ) as client:
            assert client.get("/health").status_code == 200
            assert client.get("/v1/models").status_code == 401
            headers = {"authorization": f"Bearer {KEY}"}
            assert client.get("/v1/models", headers=headers).status_code == 200
        check_refusal(refused("--uds", str(path), cwd=tmp_path), 2, str(path))
        assert KEY not in made.log()
    finally:
        assert made.stop() == 0
    assert path.exists()  # a dead server's file doesn't hinder the next one
    again = refused("--uds", str(path), cwd=tmp_path)
    assert again.code == 3 and "'nowhere'" in again.err


def test_a_key_of_the_command_line_is_not_in_the_list_of_processes(tmp_path: Path):
    text = (
        "import sys; from parallama.serve.keys import hide_arguments, read_keys;"
        "keys = read_keys(sys.argv[1:], None); hide_arguments(keys);"
        "print(keys[0], flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", text, KEY],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as process:
        assert process.stdin and process.stdout
        assert process.stdout.readline().strip() == KEY
        shown = Path(f"/proc/{process.pid}/cmdline").read_bytes()
        assert KEY.encode() not in shown and b"x" * len(KEY) in shown
        process.stdin.close()
