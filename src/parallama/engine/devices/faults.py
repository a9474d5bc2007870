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
    if before(torch, "2.10"):
        found.append(
            Fault(
                name="CVE-2026-24747",
                what=f"torch {torch}: torch.load(weights_only=True) can be made to run code",
                means="parallama never unpickles: checkpoints are safetensors or GGUF. Don't torch.load files that you don't trust yourself",
            )
        )
    if before(transformers, "5.3"):
        found.append(
            Fault(
                name="CVE-2026-4372",
                what=f"transformers {transformers}: a config.json can make it run a repository's code",
                means="use transformers 5.3 or later",
            )
        )
    if partitioner == "gspmd":
        found.append(
            Fault(
                name="gspmd",
                what=f"torch_xla {torch_xla} is the stock one: it partitions with GSPMD and has no switch for Shardy",
                means="what doesn't divide is gathered or padded silently; parallama lays heads out so that all divides",
            )
        )
        if backend == "tt":
            found.append(
                Fault(
                    name="tt-stock-torch-xla",
                    what="Tenstorrent's compiler expects Shardy annotations, which the stock torch_xla doesn't make",
                    means="use Tenstorrent's fork of torch_xla for meshes of several chips",
                )
            )
    if backend == "tt":
        found.append(
            Fault(
                name="tt-spmd-1x1",
                what="Tenstorrent: some programs fail in SPMD mode on one chip (tt-xla issue 1639)",
                means="parallama leaves SPMD off on a 1x1 mesh",
            )
        )
    if backend in ("cpu", "tpu"):
        where = (
            "is written but cannot be read back" if backend == "cpu" else "is reported not to work"
        )
        found.append(
            Fault(
                name="compile-cache",
                what=f"torch_xla's persistent compile cache {where} on {backend}",
                means="every process compiles its programs anew",
            )
        )
    if backend == "cpu":
        best = [feature for feature in ("amx_bf16", "avx512_bf16", "bf16") if feature in features]
        has = (
            f"though this processor has {', '.join(best)}"
            if best
            else "and this processor has no bf16 instructions either"
        )
        found.append(
            Fault(
                name="cpu-bf16",
                what=f"this build of XLA multiplies bfloat16 on the CPU without native instructions, {has}",
                means="--dtype auto takes float32 on the cpu backend; bfloat16 halves memory and is slower",
            )
        )
        found.append(
            Fault(
                name="cpu-one-process",
                what="torch_xla's CPU client has no collectives between processes",
                means="virtual devices live in one process; several hosts cannot be rehearsed on the CPU",
            )
        )
    found.append(
        Fault(
            name="memory-info",
            what="torch_xla tells no device memory for SPMD devices",
            means="bytes per device that parallama prints are summed over the shards that lie there",
        )
    )
    return tuple(found)
