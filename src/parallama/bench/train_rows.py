"""What `parallama bench --train` measured, as plain data and as markdown. Pure."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .markdown_table import markdown_table
from .profile import KINDS
from .rows import About, Profile, Speed


@dataclass(frozen=True, kw_only=True)
class TrainPeer:
    """What a peer did; it took turns with ours.

    Attributes:
        ratio: our median over the peer's.
        losses: of each step, from the first.
        same_losses: all are ours, to 1e-4.
        error: why it could not, or None.
    """

    peer: str
    tokens_per_s: Speed | None = None
    ratio: float | None = None
    losses: tuple[float, ...] = ()
    same_losses: bool | None = None
    bytes_per_device: dict[str, list[int]] | None = None
    peak_rss_bytes: int | None = None
    profile: Profile | None = None
    error: str | None = None

    def cell(self) -> str:
        """In the table: our ratio over it, and its speed."""
        if self.tokens_per_s is None:
            return f"n/a: {self.error}"
        remark = "" if self.same_losses else ", losses differ"
        return f"{self.ratio:.2f}x {self.tokens_per_s.median:.1f}{remark}"


@dataclass(frozen=True, kw_only=True)
class TrainRow:
    """Steps on one mesh.

    Attributes:
        tokens_per_s: tokens of a step's batch over the seconds of the whole step: forward,
            backward, clipping, update.
        step_s: median.
        mfu: FLOPs of the products of a forward and a backward pass, over what the machine's matrix
            product does in that time.
        start_s: loading, tracing and compiling.
    """

    what: str = "train"
    mesh: str
    batch: int
    seq_len: int
    tokens_per_s: Speed
    step_s: float
    mfu: float
    losses: tuple[float, ...]
    start_s: float
    bytes_per_device: dict[str, list[int]]
    peak_rss_bytes: int
    peers: tuple[TrainPeer, ...]
    profile: Profile | None = None

    def cells(self) -> list[str]:
        """Our columns of the table."""
        speed = self.tokens_per_s
        held = sum(max(sizes) for sizes in self.bytes_per_device.values())
        return [
            self.what,
            self.mesh,
            f"{self.batch}x{self.seq_len}",
            f"{speed.median:.1f} ({speed.min:.1f}-{speed.max:.1f})",
            f"{self.step_s:.2f}",
            f"{self.mfu:.1%}",
            f"{held / 1e9:.2f} GB",
            f"{self.peak_rss_bytes / 1e9:.2f} GB",
        ]

    def profiles(self) -> list[tuple[str, Profile]]:
        """Ours and the peers', by name, where they were taken."""
        taken = [("parallama", self.profile), *((peer.peer, peer.profile) for peer in self.peers)]
        return [(name, profile) for name, profile in taken if profile is not None]


_HEADS = (
    "what",
    "mesh",
    "batch",
    "tokens/s (min-max)",
    "step, s",
    "MFU",
    "bytes a device",
    "peak RSS",
)


@dataclass(frozen=True, kw_only=True)
class TrainReport(About):
    """What was measured. The keys of `--json`."""

    rows: tuple[TrainRow, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        """For people."""
        gemm = f"{self.machine.gemm_flops_per_s / 1e9:.0f} GFLOP/s"
        head = (
            f"{self.model} in {self.dtype}, {self.threads} threads;"
            f" a 2048 x 2048 product: {gemm} ({self.machine.cpu})"
        )
        return "\n\n".join(part for part in (head, self.table(), self.profiles()) if part)

    def table(self) -> str:
        """The rows as GitHub markdown."""
        peers = list(dict.fromkeys(peer.peer for row in self.rows for peer in row.peers))
        rows = []
        for row in self.rows:
            beside = {peer.peer: peer.cell() for peer in row.peers}
            rows.append([*row.cells(), *(beside.get(peer, "-") for peer in peers)])
        return markdown_table([*_HEADS, *peers], rows, left=2)

    def profiles(self) -> str:
        """Where a step's core-milliseconds go, as GitHub markdown; empty if none was sampled."""
        columns = (*KINDS, "idle")
        rows = [
            [
                row.what,
                row.mesh,
                name,
                f"{taken.ms_per_pass:,.0f}",
                *(f"{taken.core_ms_per_pass[each]:,.0f}" for each in columns),
            ]
            for row in self.rows
            for name, taken in row.profiles()
        ]
        heads = ["what", "mesh", "engine", "ms a step", *columns]
        return markdown_table(heads, rows, left=3) if rows else ""
