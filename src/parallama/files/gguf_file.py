"""A model in one GGUF file: transformers' own GGUF reader parses it, tensors are dequantized one at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, cause, lines, listed
from ..model.families import FAMILIES
from ..model.spec import ModelSpec
from . import gguf_header
from .checkpoint import Checkpoint, config_from_dict
from .tensor_source import Slices, TensorSource

_ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
"""What is known of the converter: which names, which order of rows."""
# Architectures whose converter interleaves the two halves of each query and key head.
# GGML's numbers of the types that hold plain values.
_PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
_INTERLEAVED = ("llama", "mistral")


class GgufFile(Checkpoint):
    """A `.gguf` checkpoint.

    Raises:
        CheckpointError: the file is not a GGUF of a supported model.
    """

    def __init__(self, path: Path) -> None:
        from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
        from transformers.integrations.gguf.reader import (
            GgufHeader,
            load_gguf_state_dict,
            read_gguf_metadata,
        )

        self.location = path
        gguf_header.check(path)
        self.ignored: Mapping[str, str] = {}
        try:
            metadata, _ = read_gguf_metadata(str(path))
            header = GgufHeader.from_file(str(path))
            end = header.data_start + max(
                (info.offset + info.nbytes for info in header.tensors), default=0
            )
            self._tensors: dict[str, Any] = load_gguf_state_dict(header)
            self._shapes = {info.name: info.shape for info in header.tensors}
        except Exception as error:  # a damaged header leads the reader anywhere
            raise CheckpointError(
                lines(
                    f"{path.name} is not a GGUF file that can be read: {cause(error)}",
                    "expected GGUF version 2 or 3",
                )
            ) from None
        if end > path.stat().st_size:
            raise CheckpointError(
                lines(
                    f"{path.name} is cut short: {path.stat().st_size} bytes",
                    f"expected {end}; download it again",
                )
            )
        _check_apart(
            path, [(info.offset, info.offset + info.nbytes, info.name) for info in header.tensors]
        )
        architecture = header.architecture
        if architecture in FAMILIES and architecture not in _ARCHITECTURES:
            raise CheckpointError(
                lines(
                    f"{path.name} holds a {architecture} model, which is not supported as GGUF",
                    f"expected one of {', '.join(_ARCHITECTURES)}",
                    "use the safetensors checkpoint",
                )
            )
        names = GGUF_CONFIG_MAPPING.get(architecture, {})
        prefix = f"{architecture}."
        document = {
            names[key.removeprefix(prefix)]: value
            for key, value in metadata.items()
            if key.startswith(prefix) and names.get(key.removeprefix(prefix))
        }
        scaling = metadata.get(f"{prefix}rope.scaling.type", "none")
        if scaling != "none" or "rope_freqs.weight" in self._tensors:
            raise CheckpointError(
                lines(
                    f"{path.name} scales its rotary frequencies",
                    "expected plain ones: GGUF does not say enough to rebuild them",
                    "use the safetensors checkpoint",
                )
            )
        document |= {
            "model_type": architecture,
            "tie_word_embeddings": "output.weight" not in self._tensors,
        }
        document.setdefault("vocab_size", metadata.get("tokenizer.ggml.tokens"))
        self.generation: dict[str, Any] = {
            theirs: metadata[f"tokenizer.ggml.{ours}"]
            for theirs, ours in (("eos_token_id", "eos_token_id"), ("bos_token_id", "bos_token_id"))
            if f"tokenizer.ggml.{ours}" in metadata
        }
        self.config = config_from_dict(document | self.generation, path.name)
        self.spec = ModelSpec.from_config(self.config)

    def file_of(self, name: str) -> str:
        """The file itself: it holds all."""
        return self.location.name

    def sources(self, spec: ModelSpec) -> Sequence[TensorSource]:
        """Every parameter of `spec.parameters()`, fp32 where it was quantized; see `Checkpoint.sources`."""
        import gguf

        architecture = next(
            key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == spec.model_type
        )
        name_map = gguf.get_tensor_name_map(architecture, spec.layers)
        unread, found = set(self._tensors), []
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
            self._check(theirs, shape)
            interleaved = spec.model_type in _INTERLEAVED and ("q_proj" in name or "k_proj" in name)
            heads = (
                (spec.query_heads if "q_proj" in name else spec.kv_heads) if interleaved else None
            )
            found.append(_GgufTensor(name, self.location.name, shape, self._tensors[theirs], heads))
        if unread:
            raise CheckpointError(
                lines(
                    f"{self.location.name}: unexpected tensors {listed(sorted(unread))}",
                    f"expected only those of a {spec.model_type} model",
                )
            )
        return found

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        found = tuple(self._shapes[name])
        if found != shape:
            raise CheckpointError(
                lines(
                    f"{self.location.name}: tensor {name} has shape {list(found)}",
                    f"expected {list(shape)}, from the config",
                )
            )

    def tokenizer(self) -> Any | None:
        """The tokenizer that the file describes."""
        from transformers import PreTrainedTokenizerFast
        from transformers.integrations.gguf.gguf_tokenizer_mapping import (
            convert_gguf_tokenizer,
            get_gguf_tokenizer,
        )

        try:
            architecture, described, config = get_gguf_tokenizer(str(self.location))
            backend, more = convert_gguf_tokenizer(architecture, described)
            return PreTrainedTokenizerFast(tokenizer_object=backend, **config, **more)
        except Exception as error:  # the converter raises whatever a damaged vocabulary leads it to
            raise CheckpointError(
                lines(f"the tokenizer in {self.location.name} cannot be read: {cause(error)}")
            ) from None


class _GgufTensor(TensorSource):
    """A tensor of the file: the whole of it is dequantized when a part of it is first asked for.

    Args:
        stored: as transformers' reader gives it.
        heads: of a query or key weight whose rotary pairs are interleaved.
    """

    def __init__(
        self, name: str, file: str, shape: tuple[int, ...], stored: Any, heads: int | None
    ) -> None:
        super().__init__(name, file, shape, _PLAIN.get(stored.ggml_type, torch.float32))
        self._stored = stored
        self._heads = heads
        self._whole: torch.Tensor | None = None

    def read(self, slices: Slices | None = None) -> torch.Tensor:
        if self._whole is None:
            self._whole = self._dequantized()
        return self._whole if slices is None else self._whole[slices]

    def release(self) -> None:
        self._whole = None

    def _dequantized(self) -> torch.Tensor:
        from transformers.integrations.gguf.dequant import GGML_BLOCK, dequantize

        values = self._stored[...]
        self.bytes_read += values.nbytes
        if self._stored.ggml_type in GGML_BLOCK:
            values = dequantize(values, self._stored.ggml_type)
        values = values.reshape(self.shape)
        return values if self._heads is None else _split_halves(values, self._heads)


def _split_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's interleaving: rotary pairs `(2i, 2i + 1)` become `(i, i + D / 2)` of each head."""
    half = weight.shape[0] // heads // 2
    return (
        weight.reshape(heads, half, 2, *weight.shape[1:])
        .transpose(1, 2)
        .reshape(weight.shape)
        .contiguous()
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
