"""What a benchmark's report says, as text: the cells of its tables and its footnotes. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .profile import KINDS
from .rows import PeerResult, Profile, Report, Row, Speed, Start

OURS = "parallama"
CASE_COLUMNS = 4
"""The first columns of a row say which case it is: what, mesh, batch, prompt."""
LEGEND = (
    "tokens/s: median (min-max), all rows of a batch together. Peers: our median over theirs, and "
    "their tokens/s; (2p): in two processes. MBU: bytes that a decode step must read, over the "
    "measured bandwidth. MFU: FLOPs of a prefill's products, over the measured GEMM."
)
START_HEADS = (
    "mesh",
    "import\ns",
    "load\ns",
    "trace\ns",
    "compile\ns",
    "first\ntoken\ns",
    "cold\nTTFT\ns",
    "warm\nTTFT\ns",
    "bytes per\ndevice",
    "peak\nRSS",
)
PROFILE_HEADS = ("what", "mesh", "batch", "prompt", "engine", "ms a\npass", *KINDS, "idle")
_NONE = "-"
_CASE_HEADS = ("what", "mesh", "batch", "prompt")
_OUR_HEADS = ("tokens/s\n(min-max)", "MBU or\nMFU", "host\nms/step")


class Notes:
    """Footnotes: each is said once, and numbered when it is first referred to."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def mark(self, note: str) -> str:
        """The reference to a note, as `[1]`."""
        return f"[{self._numbers.setdefault(note, len(self._numbers) + 1)}]"

    def items(self) -> Iterable[tuple[str, str]]:
        """Every reference with its note."""
        return ((f"[{number}]", note) for note, number in self._numbers.items())


class Bar(NamedTuple):
    """A bar of a chart: what was measured of an engine, or why nothing was."""

    name: str
    label: str
    speed: Speed | None
    missing: str = ""


def bars(row: Row) -> list[Bar]:
    """Ours, then the peers'."""
    return [
        Bar(OURS, OURS, row.tokens_per_s),
        *(
            Bar(clean(peer.peer), _named(peer), peer.tokens_per_s, _failure(peer))
            for peer in row.peers
        ),
    ]


def peers(report: Report) -> list[str]:
    """Every peer of any row, in the order in which they come."""
    return list(dict.fromkeys(clean(result.peer) for row in report.rows for result in row.peers))


def header(report: Report) -> list[tuple[str, str]]:
    """What was measured on what, as names and values."""
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    model = f"{clean(report.model)}, {report.dtype}, {report.backend} backend"
    return [
        ("model", f"{model}, {report.threads} threads"),
        ("machine", machine(report)),
        ("versions", clean(versions)),
        ("run", clean(f"{report.date}: {report.command}")),
    ]


def machine(report: Report) -> str:
    """The machine with its limits."""
    reads = report.machine.bandwidth_bytes_per_s / 1e9
    multiplies = report.machine.gemm_flops_per_s / 1e9
    return (
        f"{clean(report.machine.cpu)}, {report.threads} threads:"
        f" reads {reads:.1f} GB/s, GEMM {multiplies:.1f} GFLOP/s"
    )


def start_cells(start: Start) -> list[str]:
    """A line of the table below `START_HEADS`."""
    seconds = (
        start.import_s,
        start.load_s,
        start.trace_s,
        start.compile_s,
        start.first_token_s,
        start.cold_ttft_s,
        start.warm_ttft_s,
    )
    held = start.param_bytes_per_device
    low, high = _bytes(min(held, default=0)), _bytes(max(held, default=0))
    each = low if low == high else f"{low}\nto {high}"
    return [
        clean(start.mesh),
        *(f"{value:.2f}" for value in seconds),
        f"{len(held)} x {each}",
        _bytes(start.peak_rss_bytes),
    ]


def row_heads(report: Report) -> list[str]:
    """The columns of the table of speeds: the case, ours, and one for each peer."""
    return [*_CASE_HEADS, *_OUR_HEADS, *(peer.replace(" ", "\n") for peer in peers(report))]


def row_cells(row: Row, peers: Sequence[str], notes: Notes) -> list[str]:
    """A line of the table below `row_heads`; what it has to explain goes into `notes`."""
    if row.tokens_per_s is None:
        reason = clean(row.skipped or "") or "no reason given"
        speed = "skipped " + notes.mark(f"{row.what} {case(row)}: {reason}")
    else:
        low, high = number(row.tokens_per_s.min), number(row.tokens_per_s.max)
        speed = f"{number(row.tokens_per_s.median)} ({low}-{high})"
    shares = {"MBU": row.mbu, "MFU": row.mfu}
    used = [f"{name} {share:.1%}" for name, share in shares.items() if share is not None]
    host = _NONE if row.host_ms_per_step is None else f"{row.host_ms_per_step:.2f}"
    return [
        *_case_cells(row),
        speed,
        "\n".join(used) or _NONE,
        host,
        *(_peer_cell(row, peer, notes) for peer in peers),
    ]


def _peer_cell(row: Row, peer: str, notes: Notes) -> str:
    """All results of a peer on a row: several if it ran with several numbers of processes."""
    results = [result for result in row.peers if clean(result.peer) == peer]
    if results:
        return "\n".join(line for result in results for line in _result_lines(result, notes))
    itself = peer == f"{OURS} {row.mesh}"
    return _NONE if row.tokens_per_s is None or itself else "not run"


def _result_lines(result: PeerResult, notes: Notes) -> list[str]:
    if result.tokens_per_s is None:
        return [f"n/a {notes.mark(_failure(result))}"]
    ratio = _NONE if result.ratio is None else f"{result.ratio:.2f}x"
    speed = f"{ratio} {number(result.tokens_per_s.median)}"
    if result.processes > 1:
        speed += f" ({result.processes}p)"
    if result.same_tokens is None:
        speed += f" {notes.mark('its tokens were not compared with ours')}"
    found = [speed]
    if result.same_tokens is False:
        found.append("tokens differ")
    if result.error is not None:
        found.append(notes.mark(_failure(result)))
    return found


def profile_cells(row: Row) -> list[list[str]]:
    """The lines of a row's profiles, one an engine, below `PROFILE_HEADS`."""
    engines: list[tuple[str, Profile | None]] = [
        (OURS, row.profile),
        *((_named(peer), peer.profile) for peer in row.peers),
    ]
    return [
        [
            *_case_cells(row),
            name,
            number(taken.ms_per_pass),
            *(number(taken.core_ms_per_pass[kind]) for kind in (*KINDS, "idle")),
        ]
        for name, taken in engines
        if taken is not None
    ]


def case(row: Row, glue: str = ", ") -> str:
    """Mesh, batch and prompt in words."""
    return glue.join((clean(row.mesh), f"batch {row.batch}", f"prompt {row.prompt}"))


def number(value: float) -> str:
    """With three figures or more."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def clean(text: str) -> str:
    """On one line and without control characters: other programs' messages come with both."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def _case_cells(row: Row) -> list[str]:
    return [row.what, clean(row.mesh), str(row.batch), str(row.prompt)]


def _named(result: PeerResult) -> str:
    name = clean(result.peer)
    return f"{name}, {result.processes} processes" if result.processes > 1 else name


def _failure(result: PeerResult) -> str:
    return f"{_named(result)}: {clean(result.error or '') or 'no reason given'}"


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
