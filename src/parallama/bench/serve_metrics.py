"""What the requests of a benchmark come to, by the names of `vllm bench serve`. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from .serve_client import Outcome
from .serve_options import Workload, named

STATISTICS = ("mean", "median", "std")


def figures(workload: Workload, outcomes: Sequence[Outcome], duration_s: float) -> dict[str, Any]:
    """Counts, throughputs and latencies of a run."""
    done = [each for each in outcomes if each.error is None]
    output = sum(each.output_tokens for each in done)
    every = sum(each.prompt_tokens for each in done) + output
    good = sum(is_good(workload, each) for each in done)
    steady = steady_decoding(done)
    found: dict[str, Any] = {
        "duration": duration_s,
        "completed": len(done),
        "failed": len(outcomes) - len(done),
        "total_input_tokens": every - output,
        "total_output_tokens": output,
        "request_throughput": len(done) / duration_s,
        "request_goodput": good / duration_s if workload.goodput else None,
        "output_throughput": output / duration_s,
        "total_token_throughput": every / duration_s,
        "max_output_tokens_per_s": busiest_second(done),
        "max_concurrent_requests": most_at_once((each.began, each.ended) for each in done),
        "steady_decoding_requests": steady[0],
        "steady_decoding_s": steady[1],
        "steady_output_throughput": steady[2],
        "token_counts": "usage" if all(each.counted is not None for each in done) else "chunks",
        "failures": [
            {"error": error, "count": count}
            for error, count in Counter(each.error for each in outcomes if each.error).most_common()
        ],
    }
    for metric in workload.percentile_metrics:
        found |= spread(metric, seconds_of(metric, done), workload.metric_percentiles)
    return found


def seconds_of(metric: str, done: Sequence[Outcome]) -> list[float]:
    """Every value of a metric: of each request, of `itl` each gap between chunks."""
    if metric == "itl":
        return [gap for each in done for gap in each.itl_s]
    if metric == "tpot":
        return [each.tpot_s for each in done if each.tpot_s is not None]
    return [each.ttft_s if metric == "ttft" else each.latency_s for each in done]


def spread(metric: str, seconds: Sequence[float], percentiles: Sequence[float]) -> dict[str, float]:
    """Mean, median, standard deviation and percentiles in milliseconds; 0 where there is none."""
    values = 1e3 * np.array(list(seconds) or [0.0])
    found = {name: getattr(np, name)(values) for name in STATISTICS}
    found |= {name: np.percentile(values, of) for name, of in named(percentiles).items()}
    return {f"{name}_{metric}_ms": float(value) for name, value in found.items()}


def is_good(workload: Workload, each: Outcome) -> bool:
    """Whether a request stayed within every limit of `--goodput`."""
    taken = {"ttft": each.ttft_s, "tpot": each.tpot_s or 0.0, "e2el": each.latency_s}
    return all(1e3 * taken[name] <= limit for name, limit in workload.goodput.items())


def busiest_second(done: Sequence[Outcome]) -> float:
    """Most chunks in one second, counted from the first request."""
    began = min((each.began for each in done), default=0.0)
    seconds = Counter(int(time - began) for each in done for time in each.arrived)
    return float(max(seconds.values(), default=0))


def most_at_once(spans: Iterable[tuple[float, float]]) -> int:
    """Most spans that overlap."""
    return max((number for _, _, number in _levels(list(spans))), default=0)


def steady_decoding(done: Sequence[Outcome]) -> tuple[int, float, float]:
    """The time in which most requests were decoding at once: how many, how long, tokens a second.

    Prompts that are taken in meanwhile count in: nothing but the rows' number is fixed.
    """
    spans = [(each.arrived[0], each.arrived[-1]) for each in done if len(each.arrived) > 1]
    levels = _levels(spans)
    most = max((number for _, _, number in levels), default=0)
    full = [(start, end) for start, end, number in levels if number == most]
    seconds = math.fsum(end - start for start, end in full)
    if not seconds:
        return most, 0.0, 0.0
    times = np.sort([time for each in done for time in each.arrived])
    tokens = sum(
        int(np.searchsorted(times, end) - np.searchsorted(times, start)) for start, end in full
    )
    return most, seconds, tokens / seconds


def _levels(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float, int]]:
    """From, to, and how many of the spans overlap there. One ends before another begins."""
    changes = sorted([(start, 1) for start, _ in spans] + [(end, -1) for _, end in spans])
    found, number = [], 0
    for (time, change), (after, _) in pairwise(changes):
        number += change
        if after > time and number:
            found.append((time, after, number))
    return found


def details(outcomes: Sequence[Outcome], zero: float) -> dict[str, Any]:
    """What `--save-detailed` adds: lists with an entry for each request.

    Args:
        zero: where times begin.
    """
    return {
        "input_lens": [each.prompt_tokens for each in outcomes],
        "output_lens": [each.output_tokens if each.error is None else 0 for each in outcomes],
        "ttfts": [each.ttft_s for each in outcomes],
        "itls": [each.itl_s for each in outcomes],
        "latencies": [each.latency_s for each in outcomes],
        "start_times": [each.began - zero for each in outcomes],
        "queue_times": [each.waited_s for each in outcomes],
        "generated_texts": [each.text for each in outcomes],
        "errors": [each.error or "" for each in outcomes],
    }
