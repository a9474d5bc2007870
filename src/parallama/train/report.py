"""A run's log for people: a summary, and loss and speed drawn into a PNG or HTML file. No torch."""

from __future__ import annotations

import html
import importlib.util
import io
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError, lines
from .logs import Entry, read_log

SUFFIXES = (".html", ".png")
# Okabe and Ito's palette, which colour-blind people can tell apart.
_OWN, _OTHER = "#0072B2", "#D55E00"
_STYLE = (
    "body{font:14px sans-serif;max-width:1000px;margin:2em auto}"
    "th{text-align:left;padding-right:2em}"
    "svg{width:100%;height:auto}"
    "p{white-space:pre-wrap}"
)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a run came to.

    Attributes:
        steps: that the log has.
        first_loss, last_loss, least_loss: of training steps.
        eval_loss, eval_perplexity: of the last validation.
        tokens: that were seen.
        tokens_per_s, step_time_s, mfu: medians over all steps.
        skipped: steps left out for a loss or gradient that was no number.
        bytes_per_device: weights, optimizer state and the rest.
    """

    steps: int
    first_loss: float | None
    last_loss: float | None
    least_loss: float | None
    eval_loss: float | None
    eval_perplexity: float | None
    tokens: int
    tokens_per_s: float
    step_time_s: float
    mfu: float | None
    skipped: int
    bytes_per_device: list[int]


def summarize(entries: Sequence[Entry]) -> Summary:
    """A run's figures."""
    losses = [value for _, value in _series(entries, "loss")]
    validations = [entry for entry in entries if "eval_loss" in entry]
    mfus = [value for _, value in _series(entries, "mfu")]
    return Summary(
        steps=entries[-1]["step"],
        first_loss=losses[0] if losses else None,
        last_loss=losses[-1] if losses else None,
        least_loss=min(losses, default=None),
        eval_loss=validations[-1]["eval_loss"] if validations else None,
        eval_perplexity=validations[-1]["eval_perplexity"] if validations else None,
        tokens=sum(entry.get("tokens", 0) for entry in entries),
        tokens_per_s=statistics.median(entry["tokens_per_s"] for entry in entries),
        step_time_s=statistics.median(entry.get("step_time_s", 0.0) for entry in entries),
        mfu=statistics.median(mfus) if mfus else None,
        skipped=sum(bool(entry.get("skipped")) for entry in entries),
        bytes_per_device=entries[-1].get("bytes_per_device", []),
    )


def document(run: Path) -> dict[str, Any]:
    """A run's figures for a machine."""
    return {"run": str(run)} | asdict(summarize(read_log(run)))


def check_target(path: Path) -> None:
    """Raise `UsageError` where `write` couldn't."""
    if path.suffix not in SUFFIXES:
        raise UsageError(
            lines(
                f"--plot {path} is of no known kind",
                f"expected a name ending in {' or '.join(SUFFIXES)}",
            )
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(lines("--plot needs matplotlib", "run: pip install 'parallama[bench]'"))
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UsageError(
            lines(f"--plot {path} cannot be written", "expected a file in a folder that exists")
        )


def write(run: Path, path: Path) -> None:
    """Draw a run's loss, learning rate, gradient norm and speed.

    Raises:
        UsageError: there is no log, or the file can't be written.
    """
    check_target(path)
    entries = read_log(run)
    if path.suffix == ".png":
        content = _picture(run, entries, "png")
    else:
        content = _page(run, entries).encode()
    try:
        path.write_bytes(content)
    except OSError as error:
        raise UsageError(
            lines(
                f"--plot {path} cannot be written: {error.strerror}",
                "expected a file in a folder that exists",
            )
        ) from None


def figures(summary: Summary) -> list[tuple[str, str]]:
    """Names and values to show."""
    skipped = f" ({summary.skipped} skipped)" if summary.skipped else ""
    loss = (
        f"{_number(summary.first_loss)} to {_number(summary.last_loss)}, "
        f"least {_number(summary.least_loss)}"
    )
    validation = "none"
    if summary.eval_loss is not None:
        perplexity = _number(summary.eval_perplexity)
        validation = f"loss {_number(summary.eval_loss)}, perplexity {perplexity}"
    speed = f"{summary.tokens_per_s:,.0f} tokens/s, {summary.step_time_s:.3f} s a step (medians)"
    sizes = summary.bytes_per_device
    held = "-"
    if sizes:
        devices = f"{len(sizes)} device{'s' if len(sizes) > 1 else ''}"
        held = f"{max(sizes):,} on each of {devices}"
    return [
        ("steps", f"{summary.steps:,}{skipped}"),
        ("loss", loss),
        ("validation", validation),
        ("tokens", f"{summary.tokens:,}"),
        ("speed", speed),
        ("MFU", "-" if summary.mfu is None else f"{summary.mfu:.1%}"),
        ("bytes", held),
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}"


def _series(entries: Sequence[Entry], name: str) -> list[tuple[int, float]]:
    return [
        (entry["step"], float(entry[name]))
        for entry in entries
        if isinstance(entry.get(name), (int, float))
    ]


def _picture(run: Path, entries: Sequence[Entry], kind: str) -> bytes:
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    content = io.BytesIO()
    # The user's matplotlibrc must not change the picture, and a `$` in a name is no formula.
    with matplotlib.style.context(
        ["default", {"text.parse_math": False, "font.size": 9.0, "svg.hashsalt": "parallama"}],
        after_reset=True,
    ):
        figure: Any = Figure(figsize=(10.0, 7.0), layout="constrained")
        FigureCanvasAgg(figure)
        loss, rate, norm, speed = figure.subplots(2, 2, sharex=True).flatten()
        for axes, name, title in (
            (loss, "loss", "loss (nats a token)"),
            (rate, "lr", "learning rate"),
            (norm, "grad_norm", "gradient norm"),
            (speed, "tokens_per_s", "tokens/s"),
        ):
            axes.plot(
                *_columns(entries, name),
                color=_OWN,
                linewidth=1.2,
                marker="." if len(entries) < 50 else "",
                label="training",
            )
            axes.set_title(title)
            axes.grid(alpha=0.3)
        if _series(entries, "eval_loss"):
            loss.plot(
                *_columns(entries, "eval_loss"),
                color=_OTHER,
                marker="o",
                markersize=4,
                label="validation",
            )
            loss.legend(frameon=False)
        speed.set_ylim(bottom=0)
        for axes in (norm, speed):
            axes.set_xlabel("step")
        figure.suptitle(str(run))
        figure.savefig(
            content, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None
        )
    return content.getvalue()


def _columns(entries: Sequence[Entry], name: str) -> tuple[list[int], list[float]]:
    series = _series(entries, name)
    return [step for step, _ in series], [value for _, value in series]


def _page(run: Path, entries: Sequence[Entry]) -> str:
    """One HTML file that needs no other."""
    drawing = _picture(run, entries, "svg").decode()
    drawing = drawing[drawing.index("<svg") :]
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in figures(summarize(entries))
    )
    samples = "".join(_samples(entry) for entry in entries if entry.get("samples"))
    title = html.escape(str(run))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{title}</title><style>{_STYLE}</style></head>"
        f"<body><h1>{title}</h1><table>{rows}</table>{drawing}"
        f"{'<h2>Samples</h2>' + samples if samples else ''}</body></html>\n"
    )


def _samples(entry: Entry) -> str:
    """The samples of one step."""
    texts = "".join(
        f"<p><b>{html.escape(each['prompt'])}</b>{html.escape(each['text'])}</p>"
        for each in entry["samples"]
    )
    return f"<h3>step {entry['step']}</h3>{texts}"
