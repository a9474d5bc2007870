"""Memory of known accelerators, for each device that a program sees. Pure data.

GB of a data sheet are taken for 10^9 bytes, the smaller reading, unless it says GiB. It is the
chip's whole memory: the runtime and the programs take some of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

GB, GIB = 10**9, 2**30


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of device.

    Attributes:
        name: of the table, or as a user calls it.
        memory_bytes: of one device.
        what: one device, in words.
        sizing_only: no backend of ours runs on it.
        flops: products of bfloat16, a second; null if it isn't known.
        memory_bytes_per_s: how fast a device reads its memory; null if it isn't known.
        link_bytes_per_s: from a device to all others, one way; null if it isn't known.
    """

    name: str
    memory_bytes: int
    what: str
    sizing_only: bool = False
    flops: float | None = None
    memory_bytes_per_s: float | None = None
    link_bytes_per_s: float | None = None


_Rows = tuple[tuple[str, int, str], ...]


_TPU: _Rows = (
    # docs.cloud.google.com/tpu/docs/v2, /v3: HBM per chip of two cores, each a device
    ("tpu-v2", 8 * GIB, "a core, HBM; two a chip"),
    ("tpu-v3", 16 * GIB, "a core, HBM; two a chip"),
    # docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e: HBM capacity per chip
    ("tpu-v4", 32 * GIB, "a chip, HBM2"),
    ("tpu-v5e", 16 * GB, "a chip, HBM2"),
    ("tpu-v5p", 95 * GB, "a chip, HBM2e"),
    ("tpu-v6e", 32 * GB, "a chip, HBM"),
    # docs.cloud.google.com/tpu/docs/tpu7x: 192 GiB a chip of two chiplets, each a device
    ("tpu-v7x", 96 * GB, "a chiplet, HBM3e; two a chip"),
)
_TT: _Rows = (
    # docs.tenstorrent.com, "Version Compatibility Matrix": N150 (single chip) 12 GB,
    # N300 (dual chip) 24 GB (2 x 12 GB)
    ("n150", 12 * GB, "a Wormhole chip, GDDR6; one a card"),
    ("n300", 12 * GB, "a Wormhole chip, GDDR6; two a card"),
    # docs.tenstorrent.com, "Wormhole Galaxy": 32 chips of 12 GB
    ("galaxy", 12 * GB, "a Wormhole chip, GDDR6; 32 a box"),
    # docs.tenstorrent.com, "Tenstorrent Blackhole PCI Express Cards": P100a 28 GB, P150 32 GB,
    # P300 64 GB (2 x 32 GB) of GDDR6 memory
    ("p100a", 28 * GB, "a Blackhole chip, GDDR6"),
    ("p150", 32 * GB, "a Blackhole chip, GDDR6"),
    ("p300", 32 * GB, "a Blackhole chip, GDDR6; two a card"),
)
_NVIDIA: _Rows = (
    # NVIDIA's data sheets of each, "GPU memory"; of SXM unless the name says otherwise
    ("t4", 16 * GB, "a GPU, GDDR6"),
    ("v100-16gb", 16 * GB, "a GPU, HBM2"),
    ("v100-32gb", 32 * GB, "a GPU, HBM2"),
    ("rtx-3090", 24 * GB, "a GPU, GDDR6X"),
    ("rtx-4090", 24 * GB, "a GPU, GDDR6X"),
    ("rtx-5090", 32 * GB, "a GPU, GDDR7"),
    ("rtx-a6000", 48 * GB, "a GPU, GDDR6"),
    ("rtx-pro-6000", 96 * GB, "a GPU, GDDR7"),
    ("a10", 24 * GB, "a GPU, GDDR6; a10g is the same"),
    ("l4", 24 * GB, "a GPU, GDDR6"),
    ("l40s", 48 * GB, "a GPU, GDDR6"),
    ("a100-40gb", 40 * GB, "a GPU, HBM2"),
    ("a100-80gb", 80 * GB, "a GPU, HBM2e"),
    ("h100-80gb", 80 * GB, "a GPU, HBM3"),
    ("h100-nvl", 94 * GB, "a GPU, HBM3"),
    ("h200-141gb", 141 * GB, "a GPU, HBM3e"),
    # "NVIDIA DGX B200" (1,440 GB of 8 GPUs), "NVIDIA DGX B300" (2.3 TB of 8 GPUs)
    ("b200-180gb", 180 * GB, "a GPU, HBM3e"),
    ("b300-288gb", 288 * GB, "a GPU, HBM3e"),
)
_OTHERS: _Rows = (
    # AMD's data sheets "Instinct MI250X" (128 GB of two dies, each a device), "MI300X", "MI325X",
    # "MI355X"
    ("mi250x", 64 * GB, "a die, HBM2e; two a card"),
    ("mi300x", 192 * GB, "a GPU, HBM3"),
    ("mi325x", 256 * GB, "a GPU, HBM3e"),
    ("mi355x", 288 * GB, "a GPU, HBM3e"),
    # Intel's white papers "Gaudi 2" and "Gaudi 3": HBM capacity
    ("gaudi2", 96 * GB, "an accelerator, HBM2e"),
    ("gaudi3", 128 * GB, "an accelerator, HBM2e"),
    # awsdocs-neuron.readthedocs-hosted.com, "Trainium Architecture" and "Inferentia2 Architecture":
    # 32 GiB a chip of two cores, each a device
    ("trn1", 16 * GIB, "a NeuronCore-v2, HBM; two a chip"),
    ("inf2", 16 * GIB, "a NeuronCore-v2, HBM; two a chip"),
    # the same, "Trainium2 Architecture" (96 GiB) and "Trainium3 Architecture" (144 GiB): eight
    # cores a chip, of which two make a device unless told otherwise
    ("trn2", 24 * GIB, "two NeuronCores-v3, HBM3; eight a chip"),
    ("trn3", 36 * GIB, "two NeuronCores-v4, HBM3e; eight a chip"),
)


def _hardware(rows: _Rows, *, sizing_only: bool) -> dict[str, Hardware]:
    return {
        name: Hardware(name=name, memory_bytes=size, what=what, sizing_only=sizing_only)
        for name, size, what in rows
    }


HARDWARE: Mapping[str, Hardware] = MappingProxyType(
    _hardware(_TPU + _TT, sizing_only=False) | _hardware(_NVIDIA + _OTHERS, sizing_only=True)
)
