"""Memory of known accelerators, for each device that a program sees. Pure data.

GB of a data sheet are taken for 10^9 bytes, the smaller reading, unless it says GiB. It is the
chip's whole memory: the runtime and the programs take some of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ..errors import UsageError, lines

_GB, _GIB = 10**9, 2**30


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of device.

    Attributes:
        memory_bytes: of one device.
        what: one device, in words.
    """

    name: str
    memory_bytes: int
    what: str


def _table(*rows: tuple[str, int, str]) -> Mapping[str, Hardware]:
    return MappingProxyType(
        {name: Hardware(name=name, memory_bytes=size, what=what) for name, size, what in rows}
    )


HARDWARE: Mapping[str, Hardware] = _table(
    # cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e: HBM capacity per chip
    ("tpu-v4", 32 * _GIB, "a chip, HBM2"),
    ("tpu-v5e", 16 * _GB, "a chip, HBM2"),
    ("tpu-v5p", 95 * _GB, "a chip, HBM2e"),
    ("tpu-v6e", 32 * _GB, "a chip, HBM"),
    # docs.tenstorrent.com, "Version Compatibility Matrix": N150 (single chip) 12 GB,
    # N300 (dual chip) 24 GB (2 x 12 GB)
    ("n150", 12 * _GB, "a Wormhole chip, GDDR6; one a card"),
    ("n300", 12 * _GB, "a Wormhole chip, GDDR6; two a card"),
    # docs.tenstorrent.com, "Tenstorrent Blackhole PCI Express Cards": 32 GB of GDDR6 memory
    ("p150", 32 * _GB, "a Blackhole chip, GDDR6"),
    # NVIDIA's data sheets "A100 Tensor Core GPU", "H100 Tensor Core GPU" (SXM) and
    # "H200 Tensor Core GPU": GPU memory
    ("a100-40gb", 40 * _GB, "a GPU, HBM2"),
    ("a100-80gb", 80 * _GB, "a GPU, HBM2e"),
    ("h100-80gb", 80 * _GB, "a GPU, HBM3"),
    ("h200-141gb", 141 * _GB, "a GPU, HBM3e"),
)


def named(name: str) -> Hardware:
    """The hardware of a name.

    Raises:
        UsageError: it is not in the table.
    """
    if name.lower() not in HARDWARE:
        raise UsageError(
            lines(f"hardware {name!r} is unknown", f"expected one of {', '.join(HARDWARE)}")
        )
    return HARDWARE[name.lower()]
