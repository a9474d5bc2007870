"""Makes PJRT plugins for the tests, which give a table of a chosen version, or misbehave.

They are tiny x86-64 shared libraries, made byte by byte, since a compiler need not be there. One
loaded part holds everything; the dynamic section names a symbol table, its hash table and the
relocations of the table's function pointers.
"""

from __future__ import annotations

import struct
from pathlib import Path

CODE = {
    "null": b"\x31\xc0\xc3",  # xor eax, eax; ret
    "crash": b"\x8b\x04\x25\x00\x00\x00\x00\xc3",  # mov eax, [0]; ret
    "hang": b"\xeb\xfe",  # jmp to itself
    "exit": b"\xb8\xe7\x00\x00\x00\x31\xff\x0f\x05",  # exit_group(0)
}
FUNCTIONS = 115  # as many as PJRT API 0.75 has


def make(
    path: Path,
    version: tuple[int, int] = (0, 75),
    *,
    get: str = "table",
    calls: str = "null pointers",
    symbol: str = "GetPjrtApi",
    needs: str = "",
) -> Path:
    """Write a plugin.

    Args:
        get: what `GetPjrtApi` does: `table`, or a key of `CODE`.
        calls: what every function of the table does: `null pointers` (a call crashes), or a key
            of `CODE`.
        symbol: the exported function's name.
        needs: a library that the loader must load first.
    """
    names = b"\0" + symbol.encode() + b"\0" + needs.encode() + b"\0"
    hash_at = 64 + 2 * 56
    symbols_at = hash_at + 4 * (2 + 1 + 2)
    symbols_at += -symbols_at % 8
    names_at = symbols_at + 2 * 24
    get_at = (names_at + len(names) + 15) & ~15
    call_at = get_at + 32
    table_at = call_at + 32
    rela_at = table_at + 40 + 8 * FUNCTIONS
    count = 0 if calls == "null pointers" else FUNCTIONS
    dynamic_at = rela_at + 24 * count
    tags = [
        (4, hash_at),
        (5, names_at),
        (6, symbols_at),
        (10, len(names)),
        (11, 24),
        (7, rela_at),
        (8, 24 * count),
        (9, 24),
        *([(1, len(symbol) + 2)] if needs else []),
        (0, 0),
    ]
    size = dynamic_at + 16 * len(tags)
    data = bytearray(size)
    data[:64] = struct.pack(
        "<4sBBBB8xHHIQQQIHHHHHH", b"\x7fELF", 2, 1, 1, 0, 3, 62, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0
    )
    struct.pack_into("<IIQQQQQQ", data, 64, 1, 7, 0, 0, 0, size, size, 0x1000)
    struct.pack_into(
        "<IIQQQQQQ",
        data,
        120,
        2,
        6,
        dynamic_at,
        dynamic_at,
        dynamic_at,
        16 * len(tags),
        16 * len(tags),
        8,
    )
    struct.pack_into(
        "<5I", data, hash_at, 1, 2, 1, 0, 0
    )  # one bucket, two symbols: the chain starts at 1
    struct.pack_into("<IBBHQQ", data, symbols_at + 24, 1, 0x12, 0, 1, get_at, 16)
    data[names_at : names_at + len(names)] = names
    code = (
        b"\x48\x8d\x05" + struct.pack("<i", table_at - (get_at + 7)) + b"\xc3"
        if get == "table"
        else CODE[get]
    )  # lea rax, [rip + table]; ret
    data[get_at : get_at + len(code)] = code
    struct.pack_into("<QQQQii", data, table_at, 40 + 8 * FUNCTIONS, 0, 24, 0, *version)
    if count:
        data[call_at : call_at + len(CODE[calls])] = CODE[calls]
    for number in range(count):
        struct.pack_into(
            "<QQq", data, rela_at + 24 * number, table_at + 40 + 8 * number, 8, call_at
        )  # R_X86_64_RELATIVE
    for number, tag in enumerate(tags):
        struct.pack_into("<QQ", data, dynamic_at + 16 * number, *tag)
    path.write_bytes(data)
    return path
