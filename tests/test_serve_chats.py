"""Conversations reach the model as `apply_chat_template` of transformers writes them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import train_models
from servers import Server

TEMPLATE = """
{%- if messages[0].role == 'assistant' %}{{ raise_exception('the user speaks first') }}{% endif %}
{%- for tool in tools or [] %}<tool>{{ tool | tojson }}</tool>{% endfor %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{%- if m.content is defined and m.content is none %}<none>{% else %} {{ m.content }}{% endif %}
{%- for call in m.tool_calls or [] %}<call>{{ call.function.name }} {{
    call.function.arguments | tojson }}</call>{% endfor %}
{%- if m.tool_call_id %}({{ m.tool_call_id }}){% endif %}<|im_end|>
{% endfor %}
{%- if mood is defined %}<mood>{{ mood }}</mood>{% endif %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if not enable_thinking %}<think></think>{% endif %}{% endif %}"""
SAID = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How warm is it?"},
]
PARTS = [
    {"role": "user", "content": [{"type": "text", "text": "How "}, {"type": "text", "text": "old"}]}
]
BEGUN = [*SAID, {"role": "assistant", "content": "It is  "}]
TOOL = {"type": "function", "function": {"name": "warm", "parameters": {"type": "object"}}}


def called(arguments: Any) -> list[dict[str, Any]]:
    """A history with a call. OpenAI's clients write arguments as text, templates read objects."""
    function = {"name": "warm", "arguments": arguments}
    call = {"id": "call1", "type": "function", "function": function}
    return [
        *SAID,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call1", "content": "21"},
    ]


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({"messages": SAID}, {"conversation": SAID}),
    "thinking": (
        {"messages": SAID, "chat_template_kwargs": {"enable_thinking": True, "mood": "sunny"}},
        {"conversation": SAID, "enable_thinking": True, "mood": "sunny"},
    ),
    "parts": ({"messages": PARTS}, {"conversation": [{"role": "user", "content": "How old"}]}),
    "no answer begun": (
        {"messages": SAID, "add_generation_prompt": False},
        {"conversation": SAID, "add_generation_prompt": False},
    ),
    "continued": (
        {"messages": BEGUN, "continue_final_message": True, "add_generation_prompt": False},
        {"conversation": BEGUN, "continue_final_message": True, "add_generation_prompt": False},
    ),
    "calls": (
        {"messages": called('{"place": "here", "days": [1, 2]}')},
        {"conversation": called({"place": "here", "days": [1, 2]})},
    ),
    "calls as objects": (
        {"messages": called({"place": "here"})},
        {"conversation": called({"place": "here"})},
    ),
    "calls without arguments": ({"messages": called("")}, {"conversation": called({})}),
    "calls that are no JSON": ({"messages": called("{x")}, {"conversation": called("{x")}),
    "tools": (
        {"messages": SAID, "tools": [TOOL], "tool_choice": "none"},
        {"conversation": SAID, "tools": [TOOL]},
    ),
}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("served")
    (folder / "chats.jinja").write_text(TEMPLATE)
    made = Server(
        train_models.make(folder / "model"),
        *("--chat-template", str(folder / "chats.jinja")),
        *("--default-chat-template-kwargs", json.dumps({"enable_thinking": False})),
        *("--max-num-seqs", "1", "--max-num-batched-tokens", "32"),
        log=folder / "log",
    )
    with made.client() as client:
        yield client
    made.child.kill()


@pytest.mark.parametrize("name", CASES)
def test_a_conversation_has_transformers_token_ids(client: httpx.Client, name: str) -> None:
    asked, theirs = CASES[name]
    tokenizer = train_models.tokenizer()
    how: Any = {"add_generation_prompt": True, "enable_thinking": False} | theirs
    text = tokenizer.apply_chat_template(**how, chat_template=TEMPLATE, tokenize=False)
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens = client.post("/tokenize", json=asked)
    assert tokens.status_code == 200, tokens.text
    assert tokens.json()["tokens"] == expected, tokenizer.decode(tokens.json()["tokens"])
    answer = client.post(
        "/v1/chat/completions", json=asked | {"max_tokens": 1, "return_token_ids": True}
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["prompt_token_ids"] == expected


def test_a_templates_refusal_is_400_with_its_words(client: httpx.Client) -> None:
    asked = {"messages": [{"role": "assistant", "content": "Hi"}]}
    for path in ("/v1/chat/completions", "/tokenize"):
        answer = client.post(path, json=asked)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert "the user speaks first" in error["message"] and error["param"] == "messages"


def test_a_continued_message_goes_on_where_it_ends(client: httpx.Client) -> None:
    """The answer is what a completion of the same token ids is."""
    asked: Any = {"max_tokens": 12, "seed": 3, "ignore_eos": True, "return_token_ids": True}
    body = CASES["continued"][0]
    chat = client.post("/v1/chat/completions", json=asked | body).json()
    plain = client.post("/v1/completions", json=asked | {"prompt": chat["prompt_token_ids"]}).json()
    assert chat["choices"][0]["token_ids"] == plain["choices"][0]["token_ids"]
