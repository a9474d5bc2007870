"""`/metrics`: what vLLM counts, by its names with our prefix, for Prometheus."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..inference.serving import EndReason, Serving

PREFIX = "parallama:"
_FIRST = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_TOKEN = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
)
_REQUEST = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0),
    *(240.0, 480.0, 960.0, 1920.0, 7680.0),
)
"""Upper bounds of buckets in seconds, as vLLM has them."""
_REASONS: tuple[EndReason, ...] = ("stop", "length", "abort", "error")


class Metrics:
    """Counts what the engine tells (an `Observer`), and how busy it is.

    Args:
        serving: the engine.
        model: its name, the label of every metric.
    """

    def __init__(self, serving: Serving, model: str) -> None:
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model, "engine": "0"}
        most = serving.llm.max_model_len
        self._gauge("num_requests_running", "Requests that run.").set_function(
            lambda: serving.load().running
        )
        self._gauge("num_requests_waiting", "Requests that wait.").set_function(
            lambda: serving.load().waiting
        )
        self._gauge("kv_cache_usage_perc", "Used part of the cache; 1 is all.").set_function(
            lambda: serving.load().kv_usage
        )
        self._gauge("programs", "Programs that are compiled.").set_function(
            lambda: serving.load().programs
        )
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts.")
        self._new = self._counter("generation_tokens", "New tokens.")
        self._asked = self._counter("prefix_cache_queries", "Prompt tokens looked up in the cache.")
        self._found = self._counter("prefix_cache_hits", "Prompt tokens found in the cache.")
        self._rejected = self._counter("requests_rejected", "Requests answered with 429.")
        self._compiled = self._counter(
            "programs_compiled_while_serving", "Programs that were compiled too late."
        )
        names = [*self._labels, "finished_reason"]
        ended = Counter(f"{PREFIX}request_success", "Ends.", names, registry=self.registry)
        self._ended = {reason: ended.labels(*self._labels.values(), reason) for reason in _REASONS}
        self._first = self._histogram("time_to_first_token_seconds", "From arrival.", _FIRST)
        self._between = self._histogram("inter_token_latency_seconds", "Between tokens.", _TOKEN)
        self._whole = self._histogram("e2e_request_latency_seconds", "From arrival.", _REQUEST)
        self._queued = self._histogram("request_queue_time_seconds", "Before a slot.", _REQUEST)
        sizes = _sizes(most)
        self._prompts = self._histogram("request_prompt_tokens", "Of a request.", sizes)
        self._news = self._histogram("request_generation_tokens", "Of a request.", sizes)
        serving.observe(self)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)

    def rejected(self) -> None:
        """A request was answered with 429."""
        self._rejected.inc()

    # -- an `Observer`

    def admitted(self, waited_s: float, prompt_tokens: int, cached_tokens: int) -> None:
        self._queued.observe(waited_s)
        self._prompt.inc(prompt_tokens)
        self._asked.inc(prompt_tokens)
        self._found.inc(cached_tokens)

    def first_token(self, since_arrival_s: float) -> None:
        self._first.observe(since_arrival_s)
        self._new.inc()

    def token(self, since_last_s: float) -> None:
        self._between.observe(since_last_s)
        self._new.inc()

    def ended(
        self, reason: EndReason, since_arrival_s: float, prompt_tokens: int, tokens: int
    ) -> None:
        self._ended[reason].inc()
        self._whole.observe(since_arrival_s)
        self._prompts.observe(prompt_tokens)
        self._news.observe(tokens)

    def compiled(self, programs: int) -> None:
        self._compiled.inc(programs)

    # -- metrics with our labels

    def _gauge(self, name: str, says: str) -> Gauge:
        made = Gauge(PREFIX + name, says, [*self._labels], registry=self.registry)
        return made.labels(**self._labels)

    def _counter(self, name: str, says: str) -> Counter:
        made = Counter(PREFIX + name, says, [*self._labels], registry=self.registry)
        return made.labels(**self._labels)

    def _histogram(self, name: str, says: str, buckets: Sequence[float]) -> Histogram:
        labels = [*self._labels]
        made = Histogram(PREFIX + name, says, labels, registry=self.registry, buckets=buckets)
        return made.labels(**self._labels)


def _sizes(most: int) -> list[float]:
    """1, 2, 5, 10 ... up to a number of tokens."""
    steps = (factor * 10**power for power in range(9) for factor in (1, 2, 5))
    return [float(size) for size in steps if size <= most]
