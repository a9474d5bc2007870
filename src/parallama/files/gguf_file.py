"""A model in one GGUF file, whose tensors are dequantized one at a time.

transformers' GGUF reader parses the header, and turns blocks into numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, cause, lines, listed
from ..model.config_checks import check_generation
from ..model.spec import ModelSpec
from . import gguf_header, gguf_keys, gguf_rope, gguf_tokenizer
from .checkpoint import Checkpoint, config_from_dict
from .tensor_source import Slices, TensorSource
from .weight_reader import WeightReader

_INTERLEAVED = ("llama", "mistral")
"""Those whose converter interleaves the two halves of each query and key head."""
_UNKNOWN_TYPE = re.compile(r"holds tensors of ggml type (\d+)")
_PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
"""GGML's numbers of the types that hold plain values."""


class GgufFile(Checkpoint):
    """A `.gguf` checkpoint.

    Raises:
        CheckpointError: the file is not a GGUF of a supported model.
    """

    def __init__(self, path: Path) -> None:
        from transformers.integrations.gguf.reader import GgufHeader, read_gguf_metadata

        self.location = path
        with gguf_header.private_copy(path) as copy:
            try:
                metadata, _ = read_gguf_metadata(str(copy), (gguf_keys.TOKENS,))
                header = GgufHeader.from_file(str(copy))
            except Exception as error:  # a damaged header leads the reader anywhere
                raise _unread(path, cause(error, 1000).replace(str(copy), str(path))) from None
        self._tensors = {info.name: info for info in header.tensors}
        self._data_start: int = header.data_start
        self._reader = WeightReader(path)
        spans = [(info.offset, info.offset + info.nbytes, info.name) for info in header.tensors]
        _check_whole(path, header.data_start + max((end for _, end, _ in spans), default=0))
        _check_apart(path, spans)
        gguf_keys.check_supported(metadata, path.name)
        document = gguf_keys.described(metadata, self._tensors, self._rope_factors(), path.name)
        self.generation = gguf_keys.generation(metadata)
        self.ignored: Mapping[str, str] = gguf_keys.ignored(metadata)
        self._has_tokenizer = gguf_keys.has_tokenizer(metadata)
        self.config = config_from_dict(document | self.generation, path.name)
        self.spec = ModelSpec.from_config(self.config)
        check_generation(self.generation, path.name, self.spec.vocab)

    def _rope_factors(self) -> list[float] | None:
        """What the file's rotary frequencies are divided by, if it says so."""
        info = self._tensors.get(gguf_rope.FACTORS)
        if info is None:
            return None
        start = self._data_start + info.offset
        tensor = _GgufTensor(info.name, self.location.name, self._reader, info, start, heads=None)
        values: list[float] = tensor.read().float().flatten().tolist()
        return values

    def file_of(self, name: str) -> str:
        """The file itself: it holds all."""
        return self.location.name

    def sources(self, spec: ModelSpec) -> Sequence[TensorSource]:
        """Every parameter of `spec.parameters()`; see `Checkpoint.sources`.

        What was quantized is float32.
        """
        import gguf

        architecture = next(
            key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == spec.model_type
        )
        name_map = gguf.get_tensor_name_map(architecture, spec.layers)
        unread, found = set(self._tensors) - {gguf_rope.FACTORS}, []
        for name, shape in spec.parameters():
            theirs = name_map.get_name(name, try_suffixes=(".weight", ".bias"))
            if theirs not in self._tensors:
                raise CheckpointError(
                    lines(
                        f"{self.location.name}: missing tensor {theirs} ({name})",
                        "expected every parameter of the model",
                    )
                )
            unread.discard(theirs)
            info = self._tensors[theirs]
            self._check(info, shape)
            heads = _interleaved_heads(name, spec)
            start = self._data_start + info.offset
            found.append(
                _GgufTensor(name, self.location.name, self._reader, info, start, heads=heads)
            )
        if unread:
            raise CheckpointError(
                lines(
                    f"{self.location.name}: unexpected tensors {listed(sorted(unread))}",
                    f"expected only those of a {spec.model_type} model",
                )
            )
        return found

    def _check(self, info: Any, shape: tuple[int, ...]) -> None:
        from transformers.integrations.gguf.dequant import GGML_BLOCK

        which = f"{self.location.name}: tensor {info.name}"
        if tuple(info.shape) != shape:
            raise CheckpointError(
                lines(
                    f"{which} has shape {list(info.shape)}",
                    f"expected {list(shape)}, from the config",
                )
            )
        block, _ = GGML_BLOCK.get(info.ggml_type, (1, 0))
        if shape[-1] % block:
            raise CheckpointError(
                lines(
                    f"{which} has rows of {shape[-1]} numbers, quantized in blocks of {block}",
                    "expected rows of whole blocks",
                )
            )

    def tokenizer(self) -> Any | None:
        """The tokenizer that the file describes, or None if it holds none."""
        return gguf_tokenizer.read(self.location) if self._has_tokenizer else None


class _GgufTensor(TensorSource):
    """A tensor of the file: the whole of it is read when a part of it is first asked for.

    Args:
        reader: of the file.
        info: what transformers' reader says of it.
        start: its first byte.
        heads: of a query or key weight whose rotary pairs are interleaved.
    """

    def __init__(
        self,
        name: str,
        file: str,
        reader: WeightReader,
        info: Any,
        start: int,
        *,
        heads: int | None,
    ) -> None:
        super().__init__(name, file, tuple(info.shape), _PLAIN.get(info.ggml_type, torch.float32))
        self._reader, self._start = reader, start
        self._type, self._stored_bytes = info.ggml_type, info.nbytes
        self._heads = heads
        self._whole: torch.Tensor | None = None

    def read(self, slices: Slices | None = None) -> torch.Tensor:
        if self._whole is None:
            self._whole = self._dequantized()
        return self._whole if slices is None else self._whole[slices]

    def release(self) -> None:
        self._whole = None

    def _dequantized(self) -> torch.Tensor:
        from transformers.integrations.gguf.dequant import dequantize

        stored = torch.empty(self._stored_bytes, dtype=torch.uint8)
        self._reader.fill(stored.numpy().data, self._start)
        self.bytes_read += self._stored_bytes
        plain = _PLAIN.get(self._type)
        values = dequantize(stored, self._type) if plain is None else stored.view(plain)
        values = values.reshape(self.shape)
        return values if self._heads is None else _split_halves(values, self._heads)


def _interleaved_heads(name: str, spec: ModelSpec) -> int | None:
    """Heads of a weight whose rotary pairs are interleaved in the file."""
    if spec.model_type not in _INTERLEAVED:
        return None
    if "q_proj" in name:
        return spec.query_heads
    return spec.kv_heads if "k_proj" in name else None


def _split_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's interleaving of each head's rows.

    Rotary pairs `(2i, 2i + 1)` become `(i, i + D / 2)`.
    """
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape).contiguous()


def _unread(path: Path, text: str) -> CheckpointError:
    """What transformers' reader refused a file for."""
    kind = _UNKNOWN_TYPE.search(text)
    if kind is None:
        first = f"{path.name} is not a GGUF file that can be read: {text[:200]}"
        return CheckpointError(lines(first, "expected GGUF version 2 or 3"))
    import gguf
    from transformers.integrations.gguf.dequant import GGML_NAME

    known = {int(each): each.name for each in gguf.GGMLQuantizationType}
    name = known.get(int(kind[1]), f"number {kind[1]}")
    return CheckpointError(
        lines(
            f"{path.name} holds tensors of the type {name}, which is not supported",
            f"expected F32, F16, BF16, {', '.join(GGML_NAME.values())}",
            "take the file with another quantization, or the safetensors checkpoint",
        )
    )


def _check_whole(path: Path, end: int) -> None:
    size = path.stat().st_size
    if end > size:
        raise CheckpointError(
            lines(f"{path.name} is cut short: {size} bytes", f"expected {end}; download it again")
        )


def _check_apart(path: Path, spans: list[tuple[int, int, str]]) -> None:
    """Raise `CheckpointError` if two tensors share bytes."""
    for (_, end, name), (start, _, other) in pairwise(sorted(spans)):
        if start < end:
            raise CheckpointError(
                lines(
                    f"{path.name}: tensor {other} overlaps {name}",
                    "expected every tensor to have bytes of its own",
                )
            )
