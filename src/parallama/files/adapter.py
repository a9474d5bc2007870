"""A model with an adapter: a checkpoint whose tensors are merged with it while they are read.

`lora_B @ lora_A`, scaled, is added to those slices of a weight that are asked for. The base's files
are not touched, and no merged copy of a tensor is made.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, lines, listed
from ..model.spec import ModelSpec
from . import adapter_config, model_files, safetensors_header, tokenizer_files
from .adapter_config import PICKLED, WEIGHTS, AdapterConfig
from .checkpoint import Checkpoint
from .safetensors_header import StoredTensor
from .tensor_source import SafetensorsSource, Slices, TensorSource
from .weight_files import STORED_DTYPES
from .weight_reader import WeightReader

_PREFIX = "base_model.model."
_LORA = re.compile(
    r"(?P<module>.+)\.lora_(?:(?P<linear>[AB])(?:\.default)?\.weight"
    r"|embedding_(?P<embedding>[AB])(?:\.default)?)"
)
_WHOLE = re.compile(r"(?P<module>.+?)(?:\.base_layer|\.modules_to_save(?:\.default)?)?\.weight")
_ENDS = ("model.embed_tokens", "lm_head")
_PIECE = 1 << 20


@dataclass(frozen=True, kw_only=True)
class _Factors:
    """What is added to a weight `[O, E]`: `scale * lora_B @ lora_A`, of `[O, R]` and `[R, E]`.

    Of an embedding it is the transpose, of `[E, R]` and `[R, O]`.
    """

    first: TensorSource
    second: TensorSource
    scale: float
    is_embedding: bool

    def add(self, part: torch.Tensor, slices: Slices) -> None:
        """Add to some slices of the weight, a few rows at a time.

        In double precision, so that a slice comes out as it does within the whole.
        """
        rows, columns = slices
        if self.is_embedding:
            high = self.first.read((slice(0, self.first.shape[0]), rows)).T
            low = self.second.read((columns, slice(0, self.second.shape[1]))).T
        else:
            high = self.second.read((rows, slice(0, self.second.shape[1])))
            low = self.first.read((slice(0, self.first.shape[0]), columns))
        high, low = high.double() * self.scale, low.double()
        step = max(_PIECE // max(part.shape[1], 1), 1)
        for first in range(0, part.shape[0], step):
            here = slice(first, first + step)
            part[here] += (high[here] @ low).to(part.dtype)


class _Merged(TensorSource):
    """A weight with its adapter, of at least single precision."""

    def __init__(self, base: TensorSource, factors: _Factors) -> None:
        dtype = torch.promote_types(base.dtype, torch.float32)
        super().__init__(base.name, f"{base.file} with {WEIGHTS}", base.shape, dtype)
        self._base, self._factors = base, factors

    @property
    def stored_dtype(self) -> torch.dtype:
        return self._base.stored_dtype

    def read(self, slices: Slices | None = None) -> torch.Tensor:
        slices = slices or tuple(slice(0, size) for size in self.shape)
        read = self._base.read(slices)
        part = torch.empty(read.shape, dtype=self.dtype).copy_(read)
        self._factors.add(part, slices)
        factors = self._factors
        parts = (self._base, factors.first, factors.second)
        self.bytes_read = sum(source.bytes_read for source in parts)
        return part

    def release(self) -> None:
        self._base.release()


class _Replaced(SafetensorsSource):
    """A weight that an adapter holds whole, in place of the base's."""

    def __init__(self, base: TensorSource, stored: StoredTensor, reader: WeightReader) -> None:
        super().__init__(base.name, stored, reader)
        self._stored_dtype = base.stored_dtype

    @property
    def stored_dtype(self) -> torch.dtype:
        return self._stored_dtype


class AdaptedCheckpoint(Checkpoint):
    """A checkpoint with an adapter of PEFT's.

    Args:
        base: the model that it belongs to.
        folder: the adapter's; its tokenizer counts, if it has one.

    Attributes:
        tokenizer_folder: the adapter's, where it has a tokenizer of its own.

    Raises:
        CheckpointError: the adapter is of a kind that is not supported, damaged, or not of this
            model.
    """

    def __init__(self, base: Checkpoint, folder: Path) -> None:
        self.base, self.folder = base, folder
        self.location, self.config, self.generation = base.location, base.config, base.generation
        self.ignored: Mapping[str, str] = base.ignored
        self.spec = ModelSpec.from_config(base.config)
        about = adapter_config.read(folder)
        self._stored = _Stored(folder, self.spec, about)
        self.tokenizer_folder = (
            folder if "tokenizer.json" in tokenizer_files.files(folder) else None
        )

    def file_of(self, name: str) -> str:
        return WEIGHTS if name in self._stored.whole else self.base.file_of(name)

    def sources(self, spec: ModelSpec) -> Sequence[TensorSource]:
        reader, whole, factors = self._stored.reader(), self._stored.whole, self._stored.factors()
        found: list[TensorSource] = []
        for source in self.base.sources(spec):
            name = source.name
            if name in whole:
                source = _Replaced(source, whole[name], reader)
            found.append(_Merged(source, factors[name]) if name in factors else source)
        return found

    def tokenizer(self) -> Any | None:
        if self.tokenizer_folder is None:
            return self.base.tokenizer()
        return tokenizer_files.read(self.tokenizer_folder, self.spec.model_type)


class _Stored:
    """The tensors of an adapter's file, each with its place in the model.

    Attributes:
        whole: parameters that it holds whole.
    """

    def __init__(self, folder: Path, spec: ModelSpec, about: AdapterConfig) -> None:
        self._spec, self._about = spec, about
        self._shapes = dict(spec.parameters())
        path = model_files.find(folder, WEIGHTS)
        if path is None:
            pickled = model_files.find(folder, PICKLED) is not None
            raise CheckpointError(
                lines(
                    f"adapter {str(folder)!r} has no {WEIGHTS}"
                    + (f", only {PICKLED}" if pickled else ""),
                    "expected one: nothing is unpickled",
                    "load it with peft, and save_pretrained it" if pickled else "",
                )
            )
        self._path = path
        self._pairs: dict[str, dict[str, StoredTensor]] = {}
        self._embeddings: set[str] = set()
        self.whole: dict[str, StoredTensor] = {}
        for stored in safetensors_header.read(path, 8 * len(self._shapes) + 256).values():
            self._place(stored)
        if not self._pairs and not self.whole:
            raise _wrong("it holds no tensor", "pairs of lora_A and lora_B")
        for module, pair in self._pairs.items():
            self._check_pair(module, pair)

    def _place(self, stored: StoredTensor) -> None:
        name = stored.name.removeprefix(_PREFIX)
        if stored.dtype not in STORED_DTYPES:
            raise _wrong(
                f"tensor {stored.name} is of dtype {stored.dtype}", listed([*STORED_DTYPES])
            )
        if "magnitude" in name:
            raise _wrong(f"tensor {stored.name} is DoRA's", "plain LoRA or rsLoRA")
        lora, whole = _LORA.fullmatch(name), _WHOLE.fullmatch(name)
        if lora is not None:
            module = self._module(lora["module"], stored)
            self._pairs.setdefault(module, {})[lora["linear"] or lora["embedding"]] = stored
            if lora["embedding"] is not None:
                self._embeddings.add(module)
        elif whole is not None:
            module = self._module(whole["module"], stored)
            shape = self._shapes[f"{module}.weight"]
            if stored.shape != shape:
                raise _wrong(
                    f"tensor {stored.name} is {[*stored.shape]}", f"{[*shape]}, as in the model"
                )
            self.whole[f"{module}.weight"] = stored
        else:
            raise _wrong(f"tensor {stored.name} is none that is known", "lora_A, lora_B, or weight")

    def _module(self, module: str, stored: StoredTensor) -> str:
        """The model's name of a module. An adapter of the model without head begins within it."""
        if f"{module}.weight" not in self._shapes and f"model.{module}.weight" in self._shapes:
            module = f"model.{module}"
        if self._spec.tied and module in _ENDS:
            raise _wrong(
                f"tensor {stored.name} changes one of {listed([*_ENDS])}, "
                "and the model has one weight for both",
                "an adapter of other modules, or a base with tie_word_embeddings false",
            )
        if f"{module}.weight" not in self._shapes:
            raise _wrong(
                f"tensor {stored.name} is of module {module!r}",
                "one of the model's: is this the adapter's base?",
            )
        return module

    def _check_pair(self, module: str, pair: Mapping[str, StoredTensor]) -> None:
        shape, rank = self._shapes[f"{module}.weight"], self._about.rank_of(module)
        missing = {"A", "B"} - pair.keys()
        if missing:
            raise _wrong(f"module {module!r} has no lora_{missing.pop()}", "lora_A and lora_B")
        first, second = pair["A"].shape, pair["B"].shape
        outputs, inputs = shape if len(shape) == 2 else (0, 0)
        wanted = ((rank, inputs), (outputs, rank))
        if module in self._embeddings:
            wanted = ((rank, outputs), (inputs, rank))
        if (first, second) != wanted:
            raise _wrong(
                f"module {module!r} has lora_A {[*first]} and lora_B {[*second]}",
                f"rank {rank} beside a weight {[*shape]}: is this the adapter's base?",
            )

    def reader(self) -> WeightReader:
        """Of the adapter's file."""
        return WeightReader(self._path)

    def factors(self) -> dict[str, _Factors]:
        """What is added, by parameter."""
        reader = self.reader()
        return {
            f"{module}.weight": _Factors(
                first=SafetensorsSource(f"{module}.lora_A", pair["A"], reader),
                second=SafetensorsSource(f"{module}.lora_B", pair["B"], reader),
                scale=self._about.scale_of(module),
                is_embedding=module in self._embeddings,
            )
            for module, pair in self._pairs.items()
        }


def _wrong(what: str, expected: str) -> CheckpointError:
    return CheckpointError(lines(f"{WEIGHTS}: {what}", f"expected {expected}"))


def open_adapter(
    folder: Path, find: Callable[[str], Checkpoint], base: str | None = None
) -> AdaptedCheckpoint:
    """The adapter in a folder with its base.

    Args:
        find: opens a model by its name.
        base: name of the base; what the adapter says if None.

    Raises:
        CheckpointError: the base cannot be found; or see `AdaptedCheckpoint`.
    """
    if base is not None:
        return AdaptedCheckpoint(find(base), folder)
    named = adapter_config.base_of(folder)
    try:
        found = find(named)
    except CheckpointError as error:
        raise CheckpointError(
            lines(
                f"folder {str(folder)!r} holds an adapter of {named!r}, which cannot be had: "
                f"{str(error).splitlines()[0]}",
                f"expected the base model where {adapter_config.NAME} says",
                adapter_config.with_base(folder),
            )
        ) from None
    return AdaptedCheckpoint(found, folder)
