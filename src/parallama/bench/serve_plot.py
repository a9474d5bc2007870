"""A benchmark of servers as a picture: throughputs as bars, latencies as distributions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .plot import COLOURS, picture, write
from .report_text import clean, number
from .serve_report import ServeReport

_THROUGHPUTS = {
    "output_throughput": "output tokens/s",
    "total_token_throughput": "all tokens/s",
}


def plot(report: ServeReport, path: Path) -> None:
    """Write a PNG: a panel of throughputs, then one for each latency.

    A latency's line shows which share of requests (of `itl`: of chunks) took no longer.

    Raises:
        UsageError: matplotlib isn't installed, or the path cannot be written.
    """
    metrics = list(report.workload.percentile_metrics)

    def draw(figure: Any) -> None:
        first, *others = figure.subplots(1, 1 + len(metrics), squeeze=False)[0]
        _draw_throughputs(first, report)
        for axes, metric in zip(others, metrics, strict=True):
            _draw_latencies(axes, report, metric)
        figure.legend(loc="outside lower center", ncols=4, frameon=False)

    asked = report.workload
    title = (
        f"{clean(report.results[0].model_id)}: {asked.num_prompts} requests, {asked.dataset_name}"
    )
    write(path, picture(draw, (3.2 * (1 + len(metrics)), 3.6), [title]))


def _draw_throughputs(axes: Any, report: ServeReport) -> None:
    width = 0.8 / len(report.results)
    for place, result in enumerate(report.results):
        for group, name in enumerate(_THROUGHPUTS):
            x = group + (place - (len(report.results) - 1) / 2) * width
            value = result.figures[name]
            axes.bar(x, value, width, color=_colour(place), edgecolor="white")
            axes.annotate(
                number(value),
                (x, value),
                (0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=7,
            )
    axes.set_xticks(range(len(_THROUGHPUTS)), list(_THROUGHPUTS.values()))
    axes.set_title("throughput", loc="left", fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_latencies(axes: Any, report: ServeReport, metric: str) -> None:
    for place, result in enumerate(report.results):
        values = [1e3 * value for value in result.seconds[metric]]
        label = clean(result.label) if metric == report.workload.percentile_metrics[0] else None
        if values:
            axes.ecdf(values, color=_colour(place), label=label)
    axes.set_title(metric, loc="left", fontweight="bold")
    axes.set_xlabel("ms")
    axes.set_ylim(0, 1)
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]
