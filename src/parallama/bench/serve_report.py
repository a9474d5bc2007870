"""What a benchmark of servers measured: the JSON of `bench --serve`, and its cells. Pure."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..remote_server import CHAT
from .report_text import clean, number
from .serve_metrics import STATISTICS
from .serve_options import Workload, named

_TITLES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "inter-token latency",
    "e2el": "end to end",
}
_COUNTS = (
    ("completed", "requests that succeeded"),
    ("failed", "requests that failed"),
    ("duration", "duration, s"),
    ("total_input_tokens", "input tokens"),
    ("total_output_tokens", "output tokens"),
    ("request_throughput", "requests/s"),
    ("request_goodput", "good requests/s"),
    ("output_throughput", "output tokens/s"),
    ("total_token_throughput", "all tokens/s"),
    ("max_concurrent_requests", "requests at a time, at most"),
    ("steady_decoding_requests", "rows that decode together, at most"),
    ("steady_output_throughput", "output tokens/s with so many"),
)


@dataclass(frozen=True, kw_only=True)
class ServeResult:
    """What one server did with the workload.

    Attributes:
        label: `parallama`, `transformers` or an address.
        model_id: what requests called the model.
        figures: see `serve_metrics.figures`.
        seconds: every value of each metric, for the chart.
        details: see `serve_metrics.details`; empty unless asked for.
    """

    label: str
    model_id: str
    figures: Mapping[str, Any]
    seconds: Mapping[str, Sequence[float]]
    details: Mapping[str, Any] = field(default_factory=dict)

    def ratios(self, other: ServeResult) -> dict[str, float]:
        """This server's throughputs, means and percentiles over the other's, where both are."""
        return {
            name: value / other.figures[name]
            for name, value in self.figures.items()
            if (name.endswith("_throughput") or name.endswith("_ms"))
            and not name.startswith("std_")
            and other.figures.get(name)
        }


@dataclass(frozen=True, kw_only=True)
class ServeReport:
    """One run of `parallama bench --serve`.

    Attributes:
        tokenizer_id: whose tokenizer made and counted the prompts.
        results: of the server that was asked for, then of its peers.
    """

    command: str
    date: datetime.datetime
    workload: Workload
    tokenizer_id: str
    machine: Mapping[str, Any]
    results: Sequence[ServeResult]

    def to_dict(self) -> dict[str, Any]:
        """The document of `--json`: what `vllm bench serve` writes, and what peers did."""
        first, *peers = self.results
        asked = self.workload
        kind = "openai-chat" if asked.endpoint == CHAT else "openai"
        ramp = {
            "ramp_up_strategy": asked.ramp_up_strategy,
            "ramp_up_start_rps": asked.ramp_up_start_rps,
            "ramp_up_end_rps": asked.ramp_up_end_rps,
        }
        return {
            "date": self.date.strftime("%Y%m%d-%H%M%S"),
            "endpoint_type": kind,
            "backend": kind,
            "label": first.label,
            "model_id": first.model_id,
            "tokenizer_id": self.tokenizer_id,
            "num_prompts": asked.num_prompts,
            "request_rate": _finite(asked.request_rate),
            "burstiness": _finite(asked.burstiness),
            "max_concurrency": asked.max_concurrency,
            **(ramp if asked.ramp_up_strategy else {}),
            **first.figures,
            **first.details,
            "command": self.command,
            "dataset_name": asked.dataset_name,
            "seed": asked.seed,
            "machine": dict(self.machine),
            "peers": {
                peer.label: {
                    "model_id": peer.model_id,
                    **peer.figures,
                    **peer.details,
                    "ratios": first.ratios(peer),
                }
                for peer in peers
            },
        }


def header(report: ServeReport) -> list[tuple[str, str]]:
    """What was measured, as names and values."""
    asked = report.workload
    rate = "all at once" if math.isinf(asked.request_rate) else f"{asked.request_rate:g} a second"
    if asked.ramp_up_strategy:
        rate = f"{asked.ramp_up_start_rps:g} to {asked.ramp_up_end_rps:g} a second"
    most = "" if asked.max_concurrency is None else f", at most {asked.max_concurrency} at a time"
    about = f"{asked.num_prompts} requests, {rate}{most}; {asked.dataset_name}, {asked.endpoint}"
    machine = ", ".join(f"{name} {value}" for name, value in report.machine.items())
    return [
        ("model", clean(report.results[0].model_id)),
        ("workload", about),
        ("machine", clean(machine)),
        ("run", clean(f"{report.date:%Y-%m-%d}: {report.command}")),
    ]


def heads(report: ServeReport) -> list[str]:
    """The columns: what, each server, and behind a peer our figure over its."""
    first, *peers = [clean(result.label) for result in report.results]
    return ["", first, *(head for peer in peers for head in (peer, "ratio"))]


def cells(report: ServeReport) -> list[list[str]]:
    """The lines of the table."""
    first, *peers = report.results
    rows = [(name, title) for name, title in _COUNTS if first.figures[name] is not None]
    statistics = [*STATISTICS, *named(report.workload.metric_percentiles)]
    for metric in report.workload.percentile_metrics:
        rows += [(f"{name}_{metric}_ms", f"{_TITLES[metric]}, ms, {name}") for name in statistics]
    ratios = [first.ratios(peer) for peer in peers]
    return [
        [
            title,
            _number(first.figures[name]),
            *(
                cell
                for peer, ratio in zip(peers, ratios, strict=True)
                for cell in (
                    _number(peer.figures[name]),
                    f"{ratio[name]:.2f}x" if name in ratio else "-",
                )
            ),
        ]
        for name, title in rows
    ]


def notes(report: ServeReport) -> list[str]:
    """What figures do not say: why requests failed, and how tokens were counted."""
    said = []
    for result in report.results:
        label = clean(result.label)
        said += [
            f"{label}: {failure['count']} failed: {clean(failure['error'])}"
            for failure in result.figures["failures"]
        ]
        if result.figures["token_counts"] == "chunks":
            said.append(f"{label} doesn't count tokens: each chunk with text is taken for one")
    return said


def _finite(value: float) -> float | str:
    return "inf" if math.isinf(value) else value


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else number(value)
