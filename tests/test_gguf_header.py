"""A GGUF whose counts, lengths or names are absurd is refused before a reader believes it."""

import os
import struct
from pathlib import Path

import pytest
from messages import check_raised

from parallama.errors import CheckpointError
from parallama.files.gguf_header import check


def text(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def entry(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: bytes, *dims: int, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, 0, offset)


def gguf(
    entries: list[bytes],
    tensors: list[bytes],
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    return (
        struct.pack("<4sIQQ", b"GGUF", version, *(counts or (len(tensors), len(entries))))
        + b"".join(entries)
        + b"".join(tensors)
    )


ARCHITECTURE = entry(b"general.architecture", 8, text(b"llama"))


def test_a_header_of_every_kind_of_value_passes(tmp_path):
    widths = {0: 1, 1: 1, 7: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 10: 8, 11: 8, 12: 8}
    entries = [
        ARCHITECTURE,
        *(entry(b"k%d" % kind, kind, bytes(width)) for kind, width in widths.items()),
    ]
    entries += [
        entry(b"texts", 9, struct.pack("<IQ", 8, 2) + text(b"a") + text(b"bc")),
        entry(b"ints", 9, struct.pack("<IQ3I", 4, 3, 1, 2, 3)),
    ]
    (tmp_path / "model.gguf").write_bytes(
        gguf(entries, [tensor(b"a", 4, 2), tensor(b"b", 4, offset=32)])
    )
    check(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "does not start with GGUF"),
        (gguf([], [], version=1), "of version 1"),
        (gguf([], [], counts=(1 << 63, 0)), f"{1 << 63} tensors"),
        (gguf([], [], counts=(0, 1 << 40)), f"{1 << 40} metadata entries"),
        (gguf([], [], counts=(1, 0)), "cut short"),
        (gguf([ARCHITECTURE, ARCHITECTURE], []), "'general.architecture' stands there twice"),
        (gguf([], [tensor(b"a", 2), tensor(b"a", 2)]), "tensor 'a' stands there twice"),
        (gguf([], [tensor(b"a", *[1] * 9)]), "9 dims of tensor 'a'"),
        (gguf([], [tensor(b"a", 1 << 40, 1 << 40)]), "tensor 'a' has the shape"),
        (gguf([], [tensor(b"a", 0)]), "tensor 'a' has the shape [0]"),
        (gguf([entry(b"a", 99, b"")], []), "value of type 99"),
        (gguf([entry(b"a", 9, struct.pack("<IQ", 0, 1 << 60))], []), "elements in an array"),
        (gguf([entry(b"a", 9, struct.pack("<IQ", 12, 1 << 20))], []), "goes on to byte"),
        (gguf([entry(b"a", 9, struct.pack("<IQ", 9, 1))], []), "array of type 9"),
        (gguf([entry(b"a", 9, struct.pack("<IQQ", 8, 1, 1 << 62))], []), "too long"),
        (gguf([entry(b"a", 8, struct.pack("<Q", 1 << 62))], []), "bytes in a text"),
        (gguf([struct.pack("<Q", 1 << 20)], []), "goes on to byte"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_absurd_header_is_an_error_that_says_why(tmp_path, content, part):
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        check(tmp_path / "model.gguf")
    check_raised(caught.value, 3, "model.gguf", part, "GGUF version 2 or 3")


def test_a_fifo_is_an_error_and_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match="no regular file"):
        check(tmp_path / "model.gguf")
