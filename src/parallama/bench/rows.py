"""What a benchmark measured, as plain data: the JSON of `parallama bench --json`. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

What = Literal["prefill", "decode"]


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Tokens a second of all rows of a batch together, over some repetitions.

    Attributes:
        samples: how many repetitions (prefill) or steps (decode).
    """

    median: float
    min: float
    max: float
    samples: int

    @classmethod
    def of(cls, tokens: int, seconds: Sequence[float]) -> Speed:
        """From the seconds that each repetition took for so many tokens."""
        return cls(
            median=tokens / statistics.median(seconds),
            min=tokens / max(seconds),
            max=tokens / min(seconds),
            samples=len(seconds),
        )


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Where the time of a prefill or of a decode step goes.

    Sampled in passes of its own, after the measured ones.

    Attributes:
        samples: on all cores.
        ms_per_pass: wall clock, while sampled.
        core_ms_per_pass: of all cores together, by what they do (see `profile.Kind`), and `idle`.
    """

    samples: int
    ms_per_pass: float
    core_ms_per_pass: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class PeerResult:
    """What a peer did with the same weights, tokens, dtype and cores; it took turns with ours.

    Attributes:
        error: why it could not run the case, or None.
        ratio: our median over the peer's.
        same_tokens: whether it chose the same greedy tokens.
    """

    peer: str
    processes: int
    tokens_per_s: Speed | None = None
    ratio: float | None = None
    same_tokens: bool | None = None
    peak_rss_bytes: int | None = None
    profile: Profile | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One thing measured.

    Attributes:
        what: `prefill` (until the first token is on the host) or `decode` (one step after another,
            each token on the host).
        mesh: data x model.
        batch: rows.
        prompt: tokens of each row's prompt; decode starts behind it.
        mbu: model bandwidth utilisation of decode: bytes of weights and cache that a step must
            read, over what the machine reads in that time. The machine's is the median of readings
            in every round of the case.
        mfu: model FLOPs utilisation of prefill: FLOPs of its products, over what the machine's
            matrix product does in that time, taken alike.
        host_ms_per_step: of a decode step outside of the executable and of waiting for it.
        profile: where the time goes, if that was asked for.
        skipped: why the case was not run, or None.
    """

    what: What
    mesh: str
    batch: int
    prompt: int
    tokens_per_s: Speed | None = None
    mbu: float | None = None
    mfu: float | None = None
    host_ms_per_step: float | None = None
    peak_rss_bytes: int | None = None
    peers: tuple[PeerResult, ...] = ()
    profile: Profile | None = None
    skipped: str | None = None


@dataclass(frozen=True, kw_only=True)
class Start:
    """From nothing to a first token on one mesh, in a new process.

    Seconds are of wall clock; the parts stand in the order in which they begin.

    Attributes:
        import_s: Python's imports and starting the devices.
        load_s: reading the checkpoint onto the devices.
        load_bytes_read: of the checkpoint.
        load_baseline_rss_bytes, load_peak_rss_bytes: memory of the process before loading, and at
            most until its end.
        trace_s: tracing the programs.
        compile_s: XLA compiling them, where nothing else was going on.
        first_token_s: the prefill itself, the first time.
        cold_ttft_s: from the process's start to the first token.
        warm_ttft_s: the same prefill again.
    """

    mesh: str
    import_s: float
    load_s: float
    trace_s: float
    compile_s: float
    first_token_s: float
    cold_ttft_s: float
    warm_ttft_s: float
    programs: int
    load_bytes_read: int
    load_baseline_rss_bytes: int
    load_peak_rss_bytes: int
    param_bytes_per_device: tuple[int, ...]
    peak_rss_bytes: int


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine's limits, measured in the same run: the best of all readings.

    A row's `mbu` and `mfu` are held against the readings of its own rounds.

    Attributes:
        bandwidth_bytes_per_s: reading memory, all threads.
        gemm_flops_per_s: a large fp32 matrix product, all threads.
    """

    cpu: str
    bandwidth_bytes_per_s: float
    gemm_flops_per_s: float


@dataclass(frozen=True, kw_only=True)
class About:
    """What every report of a benchmark says besides its rows."""

    command: str
    date: str
    model: str
    dtype: str
    backend: str
    threads: int
    machine: Machine
    versions: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Report(About):
    """Everything one run of `parallama bench` measured."""

    starts: tuple[Start, ...]
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """The document of `--json`.

        Each row repeats versions and threads, so that rows of several runs can be put together.
        """
        document = asdict(self)
        for row in document["rows"]:
            row |= {"versions": self.versions, "threads": self.threads}
        return document
