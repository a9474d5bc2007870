"""HLO of a product that XLA:CPU gives to oneDNN, as the bytes of an `HloModuleProto`. Pure.

The messages are those of openxla/xla, `xla/service/hlo.proto`.
"""

# XLA:CPU has a fusion that a oneDNN graph computes. It makes one itself only under a flag that
# holds for every product of the process, and then also of products that oneDNN refuses once they
# run. Written into the program as it stands after that pass, the fusion is for this product alone.
# torch-xla's builder has no fusions, so the module is written out.

from __future__ import annotations

from collections.abc import Iterable, Sequence

Shape = tuple[int, ...]

_F32 = 11  # of PrimitiveType in xla_data.proto
_KIND = '{"fusion_config":{"kind":"__onednn_fusion"}}'


def product(left: Shape, right: Shape) -> bytes:
    """The module of `[..., O, E]` x `[..., E, N]` -> `[..., O, N]`, all fp32.

    Leading dims are the same, and tensors are stored row by row: all that oneDNN takes of XLA.
    """
    batch = left[:-2]
    assert right[:-2] == batch and right[-2] == left[-1], (left, right)
    out = (*batch, left[-2], right[-1])
    shapes = (left, right)
    # A number is given once, to computations and instructions alike, and a name ends with it.
    fused, entry = 7, 8
    contracted = _packed(1, [len(batch) + 1]) + _packed(2, [len(batch)])
    dims = contracted + _packed(3, range(len(batch))) + _packed(4, range(len(batch)))
    dot = _instruction("product", "dot", 3, out, _field(30, dims) + _packed(36, [1, 2]))
    config = _field(11, "kCustom") + _packed(36, [4, 5]) + _packed(38, [fused]) + _field(43, _KIND)
    fusion = _instruction("onednn", "fusion", 6, out, config)
    inner = _computation("product", fused, [*_parameters(shapes, 1), dot], 3, shapes, out)
    outer = _computation("entry", entry, [*_parameters(shapes, 4), fusion], 6, shapes, out)
    return b"".join(
        [
            _field(1, "parallama_product"),
            _field(2, f"entry.{entry}"),
            _field(3, inner),
            _field(3, outer),
            _field(4, _program_shape(shapes, out)),
            _field(6, entry),
        ]
    )


def _parameters(shapes: Sequence[Shape], first: int) -> list[bytes]:
    return [
        _instruction("given", "parameter", first + place, shape, _field(9, place))
        for place, shape in enumerate(shapes)
    ]


def _computation(
    name: str,
    number: int,
    instructions: Iterable[bytes],
    root: int,
    shapes: Sequence[Shape],
    out: Shape,
) -> bytes:
    body = b"".join(_field(2, instruction) for instruction in instructions)
    end = _field(4, _program_shape(shapes, out)) + _field(5, number) + _field(6, root)
    return _field(1, f"{name}.{number}") + body + end


def _instruction(name: str, opcode: str, number: int, shape: Shape, more: bytes) -> bytes:
    named = _field(1, f"{name}.{number}") + _field(2, opcode)
    return named + _field(3, _shape(shape)) + _field(35, number) + more


def _program_shape(shapes: Sequence[Shape], out: Shape) -> bytes:
    names = b"".join(_field(3, f"given{place}") for place in range(len(shapes)))
    return b"".join(_field(1, _shape(shape)) for shape in shapes) + _field(2, _shape(out)) + names


def _shape(dims: Shape) -> bytes:
    row_major = _packed(1, reversed(range(len(dims))))
    return _field(2, _F32) + _packed(3, dims) + _field(5, row_major)


def _field(number: int, value: int | str | bytes) -> bytes:
    """One field of a protobuf message: https://protobuf.dev/programming-guides/encoding."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    content = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _packed(number: int, values: Iterable[int]) -> bytes:
    return _field(number, b"".join(map(_varint, values)))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
