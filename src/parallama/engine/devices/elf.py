"""Reading a shared library's header and exported symbols without loading it. Pure.

Only what the dynamic loader itself reads: section headers may have been stripped. The layouts are
those of the System V ABI ("Object Files", "Dynamic Linking") and, for `DT_GNU_HASH`, of the GNU
dynamic linker.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

MAGIC = b"\x7fELF"
SHARED = 3  # ET_DYN
MACHINES = {
    3: "x86",
    8: "MIPS",
    20: "PowerPC",
    21: "PowerPC64",
    40: "ARM",
    62: "x86-64",
    183: "AArch64",
    243: "RISC-V",
    258: "LoongArch",
}
TYPES = {1: "an object file", 2: "a program", 3: "a shared library", 4: "a core dump"}
_LOAD, _DYNAMIC = 1, 2  # program header types
_HASH, _STRTAB, _SYMTAB, _GNU_HASH = 4, 5, 6, 0x6FFFFEF5  # tags of the dynamic section
_SYMBOL = 24  # bytes of a symbol table's entry
_BOUND = (1, 2)  # global or weak


class ElfError(ValueError):
    """A file that is no ELF file, or one that is damaged; the text says what is wrong with it."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """What an ELF file is, and for which machine.

    Attributes:
        bits: 32 or 64.
        little_endian: byte order.
        type: a key of `TYPES`.
        machine: a key of `MACHINES`, or one that has no name here.
    """

    bits: int
    little_endian: bool
    type: int
    machine: int

    @property
    def platform(self) -> str:
        """The machine in words: `x86-64`, `AArch64`, `32-bit ARM`."""
        name = MACHINES.get(self.machine, f"machine {self.machine}")
        order = "" if self.little_endian else "big-endian "
        return f"{order}{name}" if self.bits == 64 else f"{order}32-bit {name}"


def read_header(path: Path) -> Header:
    """The header of an ELF file.

    Raises:
        ElfError: the file is no ELF file.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(20)
    if not start:
        raise ElfError("the file is empty")
    if start[:4] != MAGIC:
        raise ElfError(f"it is no ELF file: it starts with {start[:8]!r}")
    if len(start) < 20:
        raise ElfError(f"it ends after {len(start)} bytes")
    little = start[5] != 2
    type_, machine = struct.unpack_from("<HH" if little else ">HH", start, 16)
    return Header(
        bits=32 if start[4] == 1 else 64, little_endian=little, type=type_, machine=machine
    )


def exports(path: Path, name: str) -> bool:
    """Whether a 64-bit little-endian shared library defines this dynamic symbol.

    Raises:
        ElfError: a table is outside of the file, or missing.
        OSError: it cannot be read.
    """
    header = read_header(path)
    if (header.bits, header.little_endian) != (64, True):
        raise ElfError(f"it is built for {header.platform}")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _Library(data).defines(name.encode())
        except (struct.error, IndexError, OverflowError):
            raise ElfError("a table is outside of the file, which may be cut short") from None


class _Library:
    """The dynamic section's tables, at their places in the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        (offset,) = struct.unpack_from("<Q", data, 32)
        size, count = struct.unpack_from("<HH", data, 54)
        headers = [struct.unpack_from("<IIQQQQ", data, offset + i * size) for i in range(count)]
        # Of each loaded part: first address, size in the file, place in the file.
        self._parts = [
            (address, filesz, place)
            for kind, _, place, address, _, filesz in headers
            if kind == _LOAD
        ]
        dynamic = [(place, filesz) for kind, _, place, _, _, filesz in headers if kind == _DYNAMIC]
        if not dynamic:
            raise ElfError("it has no dynamic section")
        self._tags: dict[int, int] = {}
        place, filesz = dynamic[0]
        for entry in range(place, place + filesz, 16):
            tag, value = struct.unpack_from("<QQ", data, entry)
            if tag == 0:
                break
            self._tags[tag] = value
        has_symbols = {_STRTAB, _SYMTAB} <= self._tags.keys()
        if not (has_symbols and {_HASH, _GNU_HASH} & self._tags.keys()):
            raise ElfError("its dynamic section has no symbol table")
        self._symbols = self._place(self._tags[_SYMTAB])
        self._names = self._place(self._tags[_STRTAB])

    def _place(self, address: int) -> int:
        for first, size, place in self._parts:
            if first <= address < first + size:
                return address - first + place
        raise ElfError(f"address {address:#x} is in none of its parts")

    def defines(self, name: bytes) -> bool:
        """Look a symbol up as the loader does, through the hash table."""
        chain = self._gnu_chain(name) if _GNU_HASH in self._tags else self._chain(name)
        return any(self._is(index, name) for index in chain)

    def _is(self, index: int, name: bytes) -> bool:
        named, info, _, section = struct.unpack_from(
            "<IBBH", self._data, self._symbols + index * _SYMBOL
        )
        place = self._names + named
        defined = info >> 4 in _BOUND and section != 0  # of section 0 is what the library asks for
        return defined and self._data[place : place + len(name) + 1] == name + b"\0"

    def _gnu_chain(self, name: bytes) -> list[int]:
        table = self._place(self._tags[_GNU_HASH])
        buckets, first, bloom, _ = struct.unpack_from("<IIII", self._data, table)
        wanted = 5381
        for byte in name:
            wanted = (wanted * 33 + byte) & 0xFFFFFFFF
        if buckets == 0:
            return []
        at = table + 16 + bloom * 8
        (index,) = struct.unpack_from("<I", self._data, at + wanted % buckets * 4)
        found = []
        while index >= first:
            (hashed,) = struct.unpack_from("<I", self._data, at + (buckets + index - first) * 4)
            if hashed | 1 == wanted | 1:
                found.append(index)
            if hashed & 1:
                break
            index += 1
        return found

    def _chain(self, name: bytes) -> list[int]:
        table = self._place(self._tags[_HASH])
        buckets, count = struct.unpack_from("<II", self._data, table)
        wanted = 0
        for byte in name:
            wanted = (wanted << 4) + byte
            wanted = (wanted ^ (wanted & 0xF0000000) >> 24) & 0x0FFFFFFF
        if buckets == 0:
            return []
        (index,) = struct.unpack_from("<I", self._data, table + 8 + wanted % buckets * 4)
        found: list[int] = []
        while index != 0:
            if index >= count or len(found) > count:
                raise ElfError("its symbol table runs in a circle")
            found.append(index)
            (index,) = struct.unpack_from("<I", self._data, table + 8 + (buckets + index) * 4)
        return found
