"""Known faults of what parallama stands on, when each applies, and what it means here. Pure."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from .versions import before


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault of this combination of versions, backend and processor.

    Attributes:
        name: short and stable.
        what: what is wrong, in whose software.
        means: what follows for the user, and what parallama does about it.
    """

    name: str
    what: str
    means: str


def known(
    *,
    backend: str,
    torch: str | None,
    torch_xla: str | None,
    transformers: str | None,
    partitioner: str,
    features: Collection[str],
) -> tuple[Fault, ...]:
    """The faults that apply.

    Args:
        backend: name of the backend.
        torch, torch_xla, transformers: installed versions; None if missing.
        partitioner: `gspmd` or `shardy`.
        features: what the host's processor can do; see `host.FEATURES`.
    """
    found = []

    def add(name: str, what: str, means: str) -> None:
        found.append(Fault(name=name, what=what, means=means))

    if before(torch, "2.10"):
        add(
            "CVE-2026-24747",
            f"torch {torch}: torch.load(weights_only=True) can be made to run code",
            "parallama never unpickles: checkpoints are safetensors or GGUF. Don't torch.load "
            "files that you don't trust yourself",
        )
    if before(transformers, "5.3"):
        add(
            "CVE-2026-4372",
            f"transformers {transformers}: a config.json can make it run a repository's code",
            "use transformers 5.3 or later",
        )
    if partitioner == "gspmd":
        add(
            "gspmd",
            f"torch_xla {torch_xla} is the stock one: it partitions with GSPMD and has no switch "
            "for Shardy",
            "what doesn't divide is gathered or padded silently; parallama lays heads out so that "
            "all divides",
        )
    if partitioner == "gspmd" and backend == "tt":
        add(
            "tt-stock-torch-xla",
            "Tenstorrent's compiler expects Shardy annotations, which the stock torch_xla doesn't "
            "make",
            "use Tenstorrent's fork of torch_xla for meshes of several chips",
        )
    if backend == "tt":
        add(
            "tt-spmd-1x1",
            "Tenstorrent: some programs fail in SPMD mode on one chip (tt-xla issue 1639)",
            "parallama leaves SPMD off on a 1x1 mesh",
        )
    if backend in ("cpu", "tpu"):
        state = "is written but cannot be read back"
        if backend == "tpu":
            state = "is reported not to work"
        add(
            "compile-cache",
            f"torch_xla's persistent compile cache {state} on {backend}",
            "every process compiles its programs anew",
        )
    if backend == "cpu":
        best = [feature for feature in ("amx_bf16", "avx512_bf16", "bf16") if feature in features]
        has = "and this processor has no bf16 instructions either"
        if best:
            has = f"though this processor has {', '.join(best)}"
        add(
            "cpu-bf16",
            f"this build of XLA multiplies bfloat16 on the CPU without native instructions, {has}",
            "--dtype auto takes float32 on the cpu backend; bfloat16 halves memory and is slower",
        )
        add(
            "cpu-one-process",
            "torch_xla's CPU client has no collectives between processes",
            "virtual devices live in one process; several hosts cannot be rehearsed on the CPU",
        )
    add(
        "memory-info",
        "torch_xla tells no device memory for SPMD devices",
        "bytes per device that parallama prints are summed over the shards that are placed there",
    )
    return tuple(found)
