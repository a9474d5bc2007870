"""`parallama chat --url`: a conversation with a server over real HTTP, without torch."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest
from forks import command
from messages import check_refusal
from scripted_server import Reply, ScriptedServer

from parallama.errors import UsageError
from parallama.remote_server import RemoteServer


def test_the_conversation_goes_with_each_message_and_commands_are_as_in_any_chat() -> None:
    with ScriptedServer() as server:
        said = "one\ntwo\n/new\nthree\n/help\n/exit\nnever\n"
        done = command(["chat", "--url", server.url, "--system", "Be brief."], stdin=said)
    assert (done.code, done.out) == (0, "a b c \n" * 3)
    assert "/new" in done.err and "9 tokens" in done.err and "scripted" in done.err
    system = {"role": "system", "content": "Be brief."}
    first = {"role": "user", "content": "one"}
    answer = {"role": "assistant", "content": "a b c "}
    second, third = ({"role": "user", "content": word} for word in ("two", "three"))
    assert [body["messages"] for body in server.asked] == [
        [system, first],
        [system, first, answer, second],
        [system, third],
    ]
    assert {body["model"] for body in server.asked} == {"scripted"}


def test_what_is_asked_for_is_sent_by_the_names_of_openai_and_vllm() -> None:
    options = ["--max-new-tokens", "7", "--temperature", "0", "--top-k", "3", "--seed", "4"]
    options += ["--chat-template-arg", "enable_thinking=false", "--quiet"]
    with ScriptedServer() as server:
        url = f"{server.url}/v1/"
        done = command(
            ["chat", "a-name", "--url", url, *options],
            stdin="one\n",
            env={"OPENAI_API_KEY": "secret-key"},
        )
    assert (done.code, done.err) == (0, "")
    assert server.asked == [
        {
            "model": "a-name",
            "messages": [{"role": "user", "content": "one"}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": 7,
            "chat_template_kwargs": {"enable_thinking": False},
            "temperature": 0.0,
            "top_k": 3,
            "seed": 4,
        }
    ]
    assert server.headers[0]["authorization"] == "Bearer secret-key"


def test_a_refused_message_is_said_and_the_chat_goes_on() -> None:
    too_long = Reply(status=400, body={"error": {"message": "it is too long"}})
    with ScriptedServer(lambda _body, number: Reply() if number else too_long) as server:
        done = command(["chat", "--url", server.url, "--quiet"], stdin="one\ntwo\n")
    assert (done.code, done.out) == (0, "a b c \n")
    assert "400" in done.err and "it is too long" in done.err
    assert [len(body["messages"]) for body in server.asked] == [1, 1]


@pytest.mark.parametrize(
    ("reply", "parts"),
    [
        (Reply(status=401, body={"error": {"message": "no key"}}), ("401", "OPENAI_API_KEY")),
        (Reply(status=404, body={"detail": "no such model"}), ("404", "no such model")),
        (Reply(error="the engine has failed"), ("the engine has failed",)),
        (Reply(breaks=True), ("cannot be reached",)),
    ],
)
def test_a_server_that_refuses_for_good_or_breaks_off_ends_the_chat(
    reply: Reply, parts: tuple[str, ...]
) -> None:
    with ScriptedServer(lambda _body, _number: reply) as server:
        done = command(["chat", "--url", server.url, "--quiet"], stdin="one\ntwo\n")
    assert done.code == 1 and all(part in done.err for part in parts), done.err
    assert "Traceback" not in done.err and len(server.asked) == 1


def test_a_server_that_is_not_there_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    check_refusal(command(["chat", "--url", url], stdin="one\n"), 1, url)


@pytest.mark.parametrize("url", ["localhost:8000", "http://", "ftp://a", "http://a:b", ""])
def test_an_address_is_one(url: str) -> None:
    with pytest.raises(UsageError):
        RemoteServer.parse(url)


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/", "/v1/chat/completions", "/v1/models"])
def test_an_address_may_end_in_what_clients_call_a_base_url(end: str) -> None:
    assert RemoteServer.parse(f"https://host:1/below{end}").url == "https://host:1/below"


@pytest.mark.parametrize("option", [["--mesh", "1x2"], ["--max-model-len", "64"]])
def test_what_the_server_was_started_with_is_refused(option: list[str]) -> None:
    done = command(["chat", "--url", "http://127.0.0.1:1", *option], stdin="one\n")
    check_refusal(done, 2, option[0], "--url")


def test_a_key_without_a_server_is_refused() -> None:
    done = command(["chat", "no-such-model", "--api-key", "secret-key"], stdin="one\n")
    check_refusal(done, 2, "--api-key", "--url")
    assert "secret-key" not in done.err


def test_it_imports_no_torch() -> None:
    program = (
        "import sys; from parallama.__main__ import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    with ScriptedServer() as server:
        done = subprocess.run(
            [sys.executable, "-c", program, "chat", "--url", server.url],
            input=b"one\n",
            capture_output=True,
            timeout=60,
        )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == b"a b c \n"
