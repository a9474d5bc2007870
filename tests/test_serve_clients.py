"""OpenAI's own client, and what it asks for: whole, streamed, several at once, refused."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import train_models
from servers import Server

PROMPT = "The quick brown fox"
MESSAGES: Any = [{"role": "user", "content": PROMPT}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    made = Server(
        train_models.make(folder / "model"), "--served-model-name", "tiny", log=folder / "log"
    )
    yield made
    made.child.kill()


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def expected() -> Any:
    """What transformers says to a prompt: ids -> the next tokens."""
    from reference import greedy, make_model

    model = make_model(
        heads=3, kv_heads=1, hidden=24, intermediate=40, layers=1, vocab=320, tied=True
    )
    return lambda ids, count: greedy(model, ids, count)[0]


def test_a_completion_has_transformers_tokens(client: openai.OpenAI, expected: Any):
    ids = train_models.tokenizer()(PROMPT)["input_ids"]
    wanted = expected(ids, 8)
    for prompt in (PROMPT, ids):
        got = client.completions.create(
            model="tiny",
            prompt=prompt,
            max_tokens=8,
            temperature=0,
            extra_body={"return_token_ids": True, "ignore_eos": True, "priority": -1},
        )
        choice: Any = got.choices[0]
        assert choice.token_ids == wanted and choice.prompt_token_ids == ids
        assert choice.finish_reason == "length" and got.model == "tiny"
        assert got.usage and (got.usage.prompt_tokens, got.usage.completion_tokens) == (len(ids), 8)
        assert choice.text == train_models.tokenizer().decode(wanted, skip_special_tokens=True)


def test_a_stream_is_the_same_text_in_parts(client: openai.OpenAI):
    asked: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 24, "seed": 5, "n": 2}
    whole = client.chat.completions.create(**asked)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    texts, reasons = ["", ""], [None, None]
    for chunk in chunks[:-1]:
        assert chunk.usage is None and chunk.id == chunks[0].id
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert texts[0] != texts[1]
    assert chunks[-1].usage and whole.usage and not chunks[-1].choices
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_a_seed_decides_and_none_is_drawn_anew(client: openai.OpenAI):
    def text(**more: Any) -> str:
        return (
            client.completions.create(
                model="tiny", prompt=PROMPT, max_tokens=16, extra_body={"ignore_eos": True}, **more
            )
            .choices[0]
            .text
        )

    assert text(seed=3) == text(seed=3) != text(seed=4)
    assert text(seed=-1) == text(seed=-1)
    assert len({text() for _ in range(3)}) > 1


def test_lists_of_prompts_keep_their_order(client: openai.OpenAI):
    got = client.completions.create(
        model="tiny", prompt=[[5, 6, 7], [8, 9]], max_tokens=3, n=2, temperature=0, echo=True
    )
    assert [choice.index for choice in got.choices] == [0, 1, 2, 3]
    decode = train_models.tokenizer().decode
    assert all(got.choices[k].text.startswith(decode([5, 6, 7])) for k in (0, 1))
    assert got.choices[2].text == got.choices[3].text
    assert got.usage and got.usage.prompt_tokens == 5


def test_a_stop_string_ends_a_text_before_it(client: openai.OpenAI):
    more: Any = {"max_tokens": 24, "seed": 1, "extra_body": {"ignore_eos": True}}
    whole = client.completions.create(model="tiny", prompt=PROMPT, **more).choices[0].text
    stop = whole[6:9]
    got = client.completions.create(model="tiny", prompt=PROMPT, stop=[stop], **more).choices[0]
    assert got.text == whole[: whole.index(stop)]
    assert got.finish_reason == "stop"


def test_completions_have_sixteen_tokens_and_chats_what_is_left(client: openai.OpenAI):
    more: Any = {"extra_body": {"ignore_eos": True}}
    short = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=None, **more)
    assert short.usage and short.usage.completion_tokens == 16
    long = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "ab " * 1000}], **more
    )
    assert long.usage and long.usage.total_tokens == 2048
    assert long.choices[0].finish_reason == "length"


def test_the_async_client_and_raw_responses(server: Server):
    async def ask() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            asked: Any = {"model": "tiny", "messages": MESSAGES, "seed": 2, "max_tokens": 9}
            raw = await client.chat.completions.with_raw_response.create(**asked)
            assert raw.headers["content-type"] == "application/json"
            stream = await client.chat.completions.create(**asked, stream=True)
            parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
            return raw.parse().choices[0].message.content or "", "".join(parts)

    whole, streamed = asyncio.run(ask())
    assert whole == streamed


@pytest.mark.parametrize(
    ("asked", "kind", "param", "code"),
    [
        ({"model": "other"}, openai.NotFoundError, "model", "model_not_found"),
        ({"temperature": -0.1}, openai.BadRequestError, "temperature", None),
        ({"extra_body": {"top_k": -2}}, openai.BadRequestError, "top_k", None),
        ({"max_tokens": 2040}, openai.BadRequestError, "max_tokens", "context_length_exceeded"),
        ({"prompt": [320]}, openai.BadRequestError, "prompt", None),
        ({"prompt": ""}, openai.BadRequestError, "prompt", None),
        ({"suffix": "x"}, openai.BadRequestError, "suffix", "unsupported_parameter"),
    ],
)
def test_refusals_name_the_field(
    client: openai.OpenAI, asked: dict[str, Any], kind: type, param: str, code: str | None
):
    with pytest.raises(kind) as refused:
        client.completions.create(**({"model": "tiny", "prompt": PROMPT} | asked))
    error: Any = refused.value
    assert (error.param, error.code, bool(error.body["message"])) == (param, code, True)


def test_models_health_and_version(client: openai.OpenAI, server: Server):
    found: Any = list(client.models.list())
    assert [(model.id, model.max_model_len) for model in found] == [("tiny", 2048)]
    assert client.models.retrieve("tiny").id == "tiny"
    with server.client() as plain:
        assert plain.get("/health").status_code == plain.get("/live").status_code == 200
        assert plain.get("/version").json().keys() == {"version"}
        for method, path, status in (("GET", "/nothing", 404), ("GET", "/v1/completions", 405)):
            answer = plain.request(method, path)
            assert answer.status_code == status and answer.json()["error"].keys() == {
                *("message", "type", "param", "code")
            }


def test_unknown_fields_are_logged_once(client: openai.OpenAI, server: Server):
    for _ in range(2):
        client.completions.create(
            model="tiny", prompt="a", max_tokens=1, extra_body={"frobnicate": 1, "user": "me"}
        )
    assert server.log().count("frobnicate") == 1 and "me" not in server.log().split("frob")[1]


def test_log_probabilities_of_completions_and_prompts(client: openai.OpenAI, expected: Any):
    ids = train_models.tokenizer()(PROMPT)["input_ids"]
    asked: Any = {"model": "tiny", "prompt": ids, "temperature": 0, "logprobs": 4}
    more = {"ignore_eos": True, "return_token_ids": True}
    got = client.completions.create(**asked, max_tokens=3, echo=True, extra_body=more).choices[0]
    told: Any = got.logprobs
    assert got.token_ids == expected(ids, 3)  # type: ignore[attr-defined]
    assert len(told.tokens) == len(told.token_logprobs) == len(told.text_offset) == len(ids) + 3
    assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
    for place in range(1, len(ids) + 3):
        best, own = max(told.top_logprobs[place].values()), told.token_logprobs[place]
        assert own == best if place >= len(ids) else own <= best
    none = client.completions.create(**asked, max_tokens=0, echo=True)
    assert none.usage and none.usage.completion_tokens == 0 and none.choices[0].logprobs
    assert none.choices[0].logprobs.token_logprobs == told.token_logprobs[: len(ids)]


def test_log_probabilities_of_chats(client: openai.OpenAI):
    asked: Any = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 5}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2).choices[0]
    assert whole.logprobs and whole.logprobs.content
    for each in whole.logprobs.content:
        assert len(each.top_logprobs) == 2 and each.top_logprobs[0].logprob == each.logprob
        assert each.top_logprobs[0].token == each.token
    stream = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2, stream=True)
    parts = [each for chunk in stream for each in chunk.choices if each.logprobs]
    streamed = [each for part in parts for each in (part.logprobs and part.logprobs.content) or []]
    assert [each.token for each in streamed] == [each.token for each in whole.logprobs.content]
    for each, other in zip(streamed, whole.logprobs.content, strict=True):
        assert each.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_the_best_of_several_comes_back(client: openai.OpenAI):
    asked: Any = {"model": "tiny", "prompt": PROMPT, "seed": 3, "max_tokens": 6, "logprobs": 0}
    three = client.completions.create(**asked, n=3).choices
    best = client.completions.create(**asked, n=1, best_of=3).choices

    def likelihood(choice: Any) -> float:
        chances = choice.logprobs.token_logprobs
        return sum(chances) / len(chances)

    assert best[0].text == max(three, key=likelihood).text and len({c.text for c in three}) > 1


def test_samplers_reach_the_devices(client: openai.OpenAI, expected: Any):
    ids = train_models.tokenizer()(PROMPT)["input_ids"]
    wanted = expected(ids, 6)

    def answered(**more: Any) -> Any:
        body = {"return_token_ids": True, "ignore_eos": True} | more
        return client.completions.create(
            model="tiny", prompt=ids, temperature=0, max_tokens=6, extra_body=body
        ).choices[0]

    assert answered().token_ids == wanted
    assert wanted[0] not in answered(logit_bias={str(wanted[0]): -100}).token_ids
    assert set(answered(allowed_token_ids=[40, 41]).token_ids) <= {40, 41}
    ended = answered(stop_token_ids=[wanted[0]])
    assert (ended.token_ids, ended.finish_reason, ended.stop_reason) == (
        wanted[:1],
        "stop",
        wanted[0],
    )
    later = answered(stop_token_ids=[wanted[0]], min_tokens=4)
    assert len(later.token_ids) >= 4 and wanted[0] not in later.token_ids[:4]
    assert len(set(answered(frequency_penalty=2, presence_penalty=2).token_ids)) == 6
