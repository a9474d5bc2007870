"""`parallama bench --serve`: what it sends and when, what it measures, and what it says of it."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from forks import Done, command
from json_documents import documents
from json_reference import differences
from messages import check_raised, check_refusal
from scripted_server import Reply, ScriptedServer

from parallama.bench import shapes
from parallama.bench.serve_arrivals import arrivals, rates
from parallama.bench.serve_client import Outcome
from parallama.bench.serve_metrics import figures, most_at_once, steady_decoding
from parallama.bench.serve_options import METRICS, Workload, read_goodput
from parallama.bench.serve_prompts import prompts, tokenizer_of
from parallama.errors import UsageError

VLLM_KEYS = {
    *("date", "endpoint_type", "backend", "label", "model_id", "tokenizer_id", "num_prompts"),
    *("request_rate", "burstiness", "max_concurrency", "duration", "completed", "failed"),
    *("total_input_tokens", "total_output_tokens", "request_throughput", "request_goodput"),
    *("output_throughput", "total_token_throughput", "max_output_tokens_per_s"),
    "max_concurrent_requests",
    *(f"{of}_{metric}_ms" for of in ("mean", "median", "std", "p99") for metric in METRICS),
}
"""Of the file that `vllm bench serve --save-result` writes."""
SHORT = ["--random-input-len", "8", "--random-output-len", "5"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("serve") / "tiny"
    shapes.make("tiny", folder)
    return str(folder)


def bench(url: str, tiny: str, *arguments: str, **how: Any) -> Done:
    return command(["bench", "--serve", url, "--tokenizer", tiny, *arguments], **how)


def measured(done: Done) -> dict[str, Any]:
    assert done.code == 0, done.err
    document: dict[str, Any] = json.loads(done.out)
    assert differences(documents()["parallama bench --serve"], document) == []
    return document


# -- when requests are sent


def test_arrivals_have_the_rate_and_the_burstiness_that_were_asked_for() -> None:
    gaps = {}
    for burstiness in (0.25, 1.0, 4.0):
        times = arrivals(Workload(request_rate=8.0, burstiness=burstiness), 4000)
        assert times == sorted(times) and times[-1] == pytest.approx(4000 / 8.0)
        gaps[burstiness] = np.diff(times)
        spread = gaps[burstiness].std() / gaps[burstiness].mean()
        assert spread == pytest.approx(burstiness**-0.5, rel=0.1)
    assert np.ptp(np.diff(arrivals(Workload(request_rate=8.0, burstiness=math.inf), 9))) < 1e-9
    assert arrivals(Workload(), 3) == [0.0] * 3


@pytest.mark.parametrize(("strategy", "middle"), [("linear", 5.0), ("exponential", 3.0)])
def test_a_ramp_goes_from_one_rate_to_the_other(strategy: str, middle: float) -> None:
    ramp = Workload(ramp_up_strategy=strategy, ramp_up_start_rps=1, ramp_up_end_rps=9)
    found = rates(ramp, 3)
    assert found == pytest.approx([1.0, middle, 9.0])
    times = arrivals(ramp, 4000)
    assert np.diff(times[:400]).mean() > 3 * np.diff(times[-400:]).mean()


def test_a_closed_loop_keeps_to_its_limit_and_times_are_those_of_the_server(
    tiny: str, tmp_path: Path
) -> None:
    reply = Reply(texts=("a ",) * 5, first_s=0.2, next_s=0.05, prompt_tokens=9)
    many = ["--num-prompts", "12", "--max-concurrency", "4", "--num-warmups", "2", *SHORT]
    limits = ["--goodput", "ttft:1000", "tpot:40", "--plot", str(tmp_path / "chart.png"), "--json"]
    with ScriptedServer(lambda _body, _number: reply) as server:
        found = measured(bench(server.url, tiny, *many, *limits, "--save-detailed"))
    assert server.most == 4 and len(server.asked) == 12 + 2
    assert found.keys() >= VLLM_KEYS
    counted = (found["completed"], found["failed"], found["max_concurrent_requests"])
    assert counted == (12, 0, 4)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (12 * 9, 12 * 5)
    assert found["token_counts"] == "usage" and found["request_rate"] == "inf"
    latency_s = 0.2 + 4 * 0.05
    for metric, ms in {"ttft": 200, "itl": 50, "tpot": 50, "e2el": 1e3 * latency_s}.items():
        assert ms <= found[f"p50_{metric}_ms"] < 1.5 * ms, metric
    assert 3 * latency_s <= found["duration"] < 5 * latency_s
    for key, total in {"output": 60, "total_token": 168, "request": 12}.items():
        assert found[f"{key}_throughput"] == pytest.approx(total / found["duration"])
    assert found["request_goodput"] == 0  # 50 ms a token are more than 40
    assert found["steady_decoding_requests"] == 4
    assert found["steady_output_throughput"] == pytest.approx(4 / 0.05, rel=0.4)
    assert len(found["itls"]) == 12 and found["generated_texts"][0] == "a " * 5
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_an_open_loop_does_not_wait_for_answers(tiny: str) -> None:
    reply = Reply(texts=("a ",), first_s=1.0)
    rate = ["--num-prompts", "10", "--request-rate", "20", "--burstiness", "inf", *SHORT]
    with ScriptedServer(lambda _body, _number: reply) as server:
        found = measured(bench(server.url, tiny, *rate, "--json"))
    assert server.most == 10 and 1.4 < found["duration"] < 3


# -- what is sent


def test_requests_say_what_openai_and_vllm_say(tiny: str) -> None:
    one = ["--num-prompts", "1", *SHORT, "--json"]
    with ScriptedServer() as server:
        key = {"OPENAI_API_KEY": "secret-key"}
        first = bench(server.url, tiny, *one, env=key)
        chat = ["--endpoint", "/v1/chat/completions", "--no-ignore-eos", "--temperature", "0.5"]
        given = ["--served-model-name", "other", "--api-key", "secret-key"]
        second = bench(f"{server.url}/v1", tiny, *one, *chat, *given)
    texts, (plain, asked) = [measured(first), measured(second)], server.asked
    assert "secret-key" not in first.out + first.err + second.out + second.err
    assert {one["authorization"] for one in server.headers} == {"Bearer secret-key"}
    prompt = plain.pop("prompt")
    assert len(prompt.split()) == 8
    common = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 5}
    assert plain == {**common, "model": "scripted", "temperature": 0.0, "ignore_eos": True}
    messages = [{"role": "user", "content": prompt}]
    assert asked == {**common, "model": "other", "temperature": 0.5, "messages": messages}
    assert [each["backend"] for each in texts] == ["openai", "openai-chat"]


def test_random_prompts_have_the_lengths_and_the_prefix_that_were_asked_for(tiny: str) -> None:
    tokenizer = tokenizer_of(tiny)
    asked = Workload(
        num_prompts=200, num_warmups=3, random_input_len=40, random_output_len=10,
        random_range_ratio=0.5, random_prefix_len=6,
    )  # fmt: skip
    made, warm = prompts(asked, tokenizer)
    assert (len(made), len(warm)) == (200, 3)
    lengths = [each.tokens - 6 for each in made]
    assert (min(lengths), max(lengths)) == (20, 60)
    assert {each.output_tokens for each in made} == set(range(5, 16))
    assert len({tuple(each.text.split()[:6]) for each in made}) == 1
    assert len({each.text for each in [*made, *warm]}) == 203
    assert made == prompts(asked, tokenizer)[0]
    assert made != prompts(Workload(**{**vars(asked), "seed": 1}), tokenizer)[0]


def test_prompts_of_a_real_tokenizer_have_their_length(tiny: str) -> None:
    made, _ = prompts(Workload(num_prompts=20, random_input_len=64), tokenizer_of("smollm2"))
    assert {each.tokens for each in made} == {64}


def test_shared_prefixes_are_shared_by_as_many_prompts_each(tiny: str) -> None:
    asked = Workload(
        dataset_name="prefix_repetition", num_prompts=20, prefix_repetition_prefix_len=7,
        prefix_repetition_suffix_len=3, prefix_repetition_num_prefixes=4,
        prefix_repetition_output_len=2,
    )  # fmt: skip
    made, _ = prompts(asked, tokenizer_of(tiny))
    begun = [tuple(each.text.split()[:7]) for each in made]
    assert sorted(begun.count(prefix) for prefix in set(begun)) == [5] * 4
    assert {(each.tokens, each.output_tokens) for each in made} == {(10, 2)}
    ordered, _ = prompts(replace(asked, disable_shuffle=True), tokenizer_of(tiny))
    begun = [tuple(each.text.split()[:7]) for each in ordered]
    assert all(len(set(begun[first : first + 5])) == 1 for first in (0, 5, 10, 15))


def test_lengths_like_sharegpts_are_spread_as_its_are(tiny: str) -> None:
    made, _ = prompts(Workload(dataset_name="sharegpt", num_prompts=2000), tokenizer_of(tiny))
    inputs = np.array([each.tokens for each in made])
    outputs = np.array([each.output_tokens for each in made])
    assert 100 < inputs.mean() < 170 and 220 < outputs.mean() < 340
    assert inputs.mean() > 1.3 * np.median(inputs)  # a long tail
    assert inputs.min() >= 4 and inputs.max() <= 1024 and (inputs + outputs).max() <= 2048


def test_a_sharegpt_file_gives_its_first_messages_and_their_answers_lengths(
    tiny: str, tmp_path: Path
) -> None:
    def said(*texts: str) -> dict[str, Any]:
        return {"conversations": [{"from": "human", "value": text} for text in texts]}

    words = "w1 w2 w3 w4 w5"
    conversations = [said(words, "w1 " * 9, "w3"), said(words), said("w1", words), said(words, "")]
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps(conversations), encoding="utf-8")
    asked = {"dataset_name": "sharegpt", "dataset_path": str(path)}
    (made,), _ = prompts(Workload(**asked, num_prompts=1), tokenizer_of(tiny))
    assert (made.text, made.tokens, made.output_tokens) == (words, 5, 9)
    with pytest.raises(UsageError) as caught:
        prompts(Workload(**asked, num_prompts=2), tokenizer_of(tiny))
    check_raised(caught.value, 2, str(path), "1 conversations", "2")
    path.write_text('{"a": 1}', encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        prompts(Workload(**asked, num_prompts=1), tokenizer_of(tiny))
    check_raised(caught.value, 2, "--dataset-path", str(path))


def test_a_file_of_ones_own_is_sent_in_its_order_or_shuffled(tiny: str, tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    given = [("w1 " * number, number) for number in range(1, 7)]
    said = [{"prompt": text, "output_tokens": limit} for text, limit in given]
    path.write_text("\n".join(map(json.dumps, [*said, {"prompt": "w2"}])), encoding="utf-8")
    asked = {"dataset_name": "custom", "dataset_path": str(path), "num_prompts": 6}
    made, warm = prompts(Workload(**asked, disable_shuffle=True, num_warmups=1), tokenizer_of(tiny))
    assert [(each.text, each.output_tokens) for each in made] == given
    assert [each.tokens for each in made] == [1, 2, 3, 4, 5, 6]
    assert [(each.text, each.output_tokens) for each in warm] == [("w2", 256)]
    mixed, _ = prompts(Workload(**asked, custom_output_len=9), tokenizer_of(tiny))
    assert [each.text for each in mixed] != [text for text, _ in given][:6]
    assert {each.output_tokens for each in mixed} == {9}
    with pytest.raises(UsageError) as caught:
        prompts(Workload(**{**asked, "num_prompts": 8}), tokenizer_of(tiny))
    check_raised(caught.value, 2, str(path), "7 prompts", "8")
    path.write_text('{"text": "w1"}\n', encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        prompts(Workload(**asked), tokenizer_of(tiny))
    check_raised(caught.value, 2, "--dataset-path", str(path), "output_tokens")


# -- what is measured


def outcome(began: float, *arrived: float, counted: int | None = None) -> Outcome:
    return Outcome(
        prompt_tokens=10,
        began=began,
        arrived=list(arrived),
        ended=arrived[-1],
        counted=counted,
    )


def test_figures_are_those_of_known_times() -> None:
    # Two requests: first tokens after 1 and 3 s; four tokens in three chunks, two in two.
    done = [outcome(0, 1, 2, 4, counted=4), outcome(1, 4, 6, counted=2)]
    failed = Outcome(prompt_tokens=10, error="429: full")
    limits = {"ttft": 2000.0, "tpot": 1000.0}
    asked = Workload(goodput=limits, metric_percentiles=(50, 99.9))
    found = figures(asked, [*done, failed], 10.0)
    assert (found["completed"], found["failed"]) == (2, 1)
    assert found["failures"] == [{"error": "429: full", "count": 1}]
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (20, 6)
    assert found["request_goodput"] == 0.1
    means = {metric: found[f"mean_{metric}_ms"] for metric in METRICS}
    assert means == {"ttft": 2000, "tpot": 1500, "itl": 5000 / 3, "e2el": 4500}
    assert found["std_ttft_ms"] == 1000 and found["median_itl_ms"] == 2000
    assert found["p99.9_e2el_ms"] == pytest.approx(4999, abs=1.1)


def test_requests_that_meet_at_a_moment_do_not_overlap() -> None:
    assert most_at_once([(0, 1), (1, 2), (1.5, 3)]) == 2
    assert most_at_once([]) == 0
    rows, seconds, speed = steady_decoding([outcome(0, 1, 2, 3, 4), outcome(0, 2, 3, 5)])
    assert (rows, seconds, speed) == (2, 2, 2)  # from 2 to 4 s; tokens at 2, 2, 3 and 3 s


def test_failed_requests_are_counted_and_named(tiny: str) -> None:
    def script(_body: dict[str, Any], number: int) -> Reply:
        full = Reply(status=429, body={"error": {"message": "the queue is full"}})
        odd = (full, Reply(error="it broke"), Reply(breaks=True), Reply())
        return odd[number % 4]

    with ScriptedServer(script) as server:
        few = ["--num-prompts", "8", "--max-concurrency", "1", *SHORT]
        found = measured(bench(server.url, tiny, *few, "--json"))
        done = bench(server.url, tiny, *few)
    assert (found["completed"], found["failed"], found["total_output_tokens"]) == (2, 6, 6)
    assert {each["count"] for each in found["failures"]} == {2} and len(found["failures"]) == 3
    for words in ("429: the queue is full", "it broke"):
        assert any(words in each["error"] for each in found["failures"]) and words in done.out


def test_tokens_are_counted_by_chunks_where_the_server_does_not(tiny: str) -> None:
    with ScriptedServer(
        lambda _body, _number: Reply(texts=("a ", "", "b "), usage=False)
    ) as server:
        one = ["--num-prompts", "1", *SHORT]
        found = measured(bench(server.url, tiny, *one, "--json"))
        said = bench(server.url, tiny, *one)
    assert (found["token_counts"], found["total_output_tokens"]) == ("chunks", 2)
    assert found["total_input_tokens"] == 8 and "chunk" in said.out


def test_a_server_that_goes_away_ends_the_run_with_an_error(tiny: str) -> None:
    server = ScriptedServer()

    def script(_body: dict[str, Any], number: int) -> Reply:
        if number == 3:
            server._server.force_exit = server._server.should_exit = True
        return Reply(next_s=0.1)

    server._script = script
    with server:
        done = bench(server.url, tiny, "--num-prompts", "500", "--max-concurrency", "2", *SHORT)
    assert done.code == 1 and server.url in done.err and "500" in done.err, done.err
    assert "Traceback" not in done.err


def test_a_server_that_answers_nothing_or_is_not_there_is_an_error(tiny: str) -> None:
    refuses = Reply(status=400, body={"error": {"message": "ignore_eos is unknown"}})
    with ScriptedServer(lambda _body, _number: refuses) as server:
        done = bench(server.url, tiny, "--num-prompts", "2", *SHORT)
    check = (done.code, "ignore_eos is unknown" in done.err, "2" in done.err)
    assert check == (1, True, True), done.err
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    done = bench(url, tiny, "--num-prompts", "2", *SHORT)
    assert done.code == 1 and url in done.err


def test_peers_get_the_same_requests_and_stand_beside_with_ratios(tiny: str) -> None:
    few = ["--num-prompts", "4", "--max-concurrency", "1", *SHORT]
    with (
        ScriptedServer(lambda _body, _number: Reply(first_s=0.05)) as fast,
        ScriptedServer(lambda _body, _number: Reply(first_s=0.15), "slow") as slow,
    ):
        key = {"OPENAI_API_KEY": "secret-key"}
        done = bench(fast.url, tiny, *few, "--peer", slow.url, "--json", env=key)
        shown = bench(fast.url, tiny, *few, "--peer", slow.url)
    found = measured(done)
    peer = found["peers"][slow.url]
    assert [body["prompt"] for body in fast.asked] == [body["prompt"] for body in slow.asked]
    assert peer["completed"] == 4 and peer["model_id"] == "slow"
    assert peer["ratios"]["mean_ttft_ms"] == pytest.approx(
        found["mean_ttft_ms"] / peer["mean_ttft_ms"]
    )
    assert peer["ratios"]["request_throughput"] > 1.5
    assert slow.url in shown.out and "x" in shown.out
    assert not any("authorization" in one for one in slow.headers)  # the key is the first one's


# -- refusals

WRONG: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("--num-prompts 0", ("--num-prompts is 0", "at least 1")),
    ("--max-concurrency 0", ("--max-concurrency is 0", "at least 1")),
    ("--request-rate 0", ("--request-rate is 0", "more than 0")),
    ("--request-rate nan", ("--request-rate is nan",)),
    ("--burstiness -1", ("--burstiness is -1", "more than 0")),
    ("--random-range-ratio 1", ("--random-range-ratio is 1", "less than 1")),
    ("--endpoint /v1/embeddings", ("/v1/embeddings", "/v1/chat/completions")),
    ("--dataset-name hf", ("'hf'", "sharegpt")),
    ("--dataset-path x.json", ("--dataset-path", "sharegpt")),
    ("--dataset-name custom", ("custom", "--dataset-path")),
    ("--goodput itl:5", ("itl:5", "ttft")),
    ("--goodput ttft", ("ttft", "ttft:500")),
    ("--goodput ttft:-1", ("ttft:-1",)),
    ("--percentile-metrics ttft,x", ("'x'", "e2el")),
    ("--metric-percentiles 101", ("101", "0 to 100")),
    ("--metric-percentiles a", ("'a'", "50,99")),
    ("--ramp-up-start-rps 1", ("--ramp-up-strategy",)),
    ("--ramp-up-strategy steep", ("'steep'", "linear")),
    ("--ramp-up-strategy linear", ("--ramp-up-end-rps",)),
    (
        "--ramp-up-strategy linear --ramp-up-start-rps 1 --ramp-up-end-rps 2 --request-rate 3",
        ("--request-rate", "--ramp-up-strategy"),
    ),
    ("--mesh 1x2", ("--mesh", "address")),
    ("--max-num-seqs 4", ("--max-num-seqs", "address")),
    ("--steps 24", ("--steps", "--serve")),
    ("--peer vllm", ("'vllm'", "transformers")),
    ("--peer transformers", ("transformers", "address")),
    ("--peer http://127.0.0.1:1", ("twice",)),
    ("--plot no/such/folder.png", ("--plot", "folder")),
)


@pytest.mark.parametrize(("given", "parts"), WRONG)
def test_what_cannot_be_measured_is_refused_before_anything_is_sent(
    given: str, parts: tuple[str, ...]
) -> None:
    done = command(["bench", "--serve", "http://127.0.0.1:1", "--tokenizer", "t", *given.split()])
    check_refusal(done, 2, *parts)


def test_an_address_needs_a_tokenizer_and_its_options_need_serve(tmp_path: Path) -> None:
    check_refusal(command(["bench", "--serve", "http://127.0.0.1:1"]), 2, "--tokenizer")
    check_refusal(command(["bench", "tiny", "--num-prompts", "3"]), 2, "--num-prompts", "--serve")


def test_limits_are_read_as_vllm_writes_them() -> None:
    assert read_goodput(["ttft:500 tpot:50", "e2el:1e3"]) == {
        "ttft": 500,
        "tpot": 50,
        "e2el": 1000,
    }


def test_a_server_that_cannot_start_ends_the_run_with_its_last_words(tiny: str) -> None:
    done = command(["bench", "--serve", tiny, "--max-model-len", "999999", *SHORT, "--quiet"])
    check_refusal(done, 1, "parallama serve", "8192")


# -- real servers

OWN = ["--max-num-seqs", "2", "--max-model-len", "64", "--max-concurrency", "2", *SHORT]


def test_a_server_is_started_for_a_model_and_measured(tiny: str) -> None:
    few = ["--num-prompts", "4", "--num-warmups", "1", "--json"]
    found = measured(command(["bench", "--serve", tiny, *OWN, *few], optimize=False))
    assert (found["label"], found["completed"], found["token_counts"]) == ("parallama", 4, "usage")
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (32, 20)
    # Both clients ask at once; whether their few tokens come at a time is the machine's to say.
    assert found["model_id"] == tiny and found["max_concurrent_requests"] == 2
    assert found["steady_decoding_requests"] in (1, 2)


@pytest.mark.slow  # two servers start; what is asked of each is tested above and below
def test_transformers_own_server_is_started_beside_it(tiny: str) -> None:
    few = ["--num-prompts", "4", "--peer", "transformers", "--json"]
    found = measured(command(["bench", "--serve", tiny, *OWN, *few], optimize=False))
    peer = found["peers"]["transformers"]
    assert (found["completed"], peer["completed"]) == (4, 4)
    assert found["total_output_tokens"] == peer["total_output_tokens"] == 20
    assert peer["ratios"]["total_token_throughput"] > 0


@pytest.fixture(scope="module")
def transformers(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of `transformers serve` with the tiny model."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program = "from transformers.cli.transformers import app; app()"
    told = [sys.executable, "-c", program, "serve", tiny, "--device", "cpu", "--port", str(port)]
    log = tmp_path_factory.mktemp("log") / "log"
    with log.open("wb") as out:
        server = subprocess.Popen(
            [*told, "--host", "127.0.0.1"], stdout=out, stderr=out, env={**os.environ}
        )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            assert server.poll() is None, log.read_text()[-2000:]
            try:
                httpx2.get(f"{url}/health")
                break
            except httpx2.TransportError:
                time.sleep(0.5)
        yield url
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize("endpoint", ["/v1/completions", "/v1/chat/completions"])
def test_transformers_server_is_measured_as_any_other(
    transformers: str, tiny: str, endpoint: str
) -> None:
    asked = ["--num-prompts", "3", "--endpoint", endpoint, "--no-ignore-eos", *SHORT, "--json"]
    found = measured(bench(transformers, tiny, "--served-model-name", tiny, *asked))
    assert (found["completed"], found["token_counts"]) == (3, "usage")
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (24, 15)
