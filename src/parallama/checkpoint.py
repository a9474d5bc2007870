"""Checkpoints as folders of safetensors, and what every checkpoint has.

Nothing is unpickled, and no code of a checkpoint is run: the config is read as JSON and must name a model type that this package knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from .errors import CheckpointError, cause, lines, listed, shown
from .locate import read_json
from .spec import ROPE_TYPES, ModelSpec

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_STORED = ("F32", "BF16", "F16", "F64")


class Checkpoint(Protocol):
    """A source of one model's config, tokenizer and tensors."""

    location: Path
    config: Any
    generation: dict[str, Any]

    def tensors(self, spec: ModelSpec) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter of `spec.parameters()`, once, by transformers' name.

        Raises:
            CheckpointError: a tensor is missing or unexpected, with its name.
        """
        ...

    def tokenizer(self) -> Any | None:
        """The tokenizer, or None if there is none."""
        ...


def config_from_dict(document: Any, origin: str) -> Any:
    """A transformers config object from the contents of a config.json; no code but transformers' own is looked at.

    Raises:
        CheckpointError: not a supported model, or values that transformers refuses.
    """
    if not isinstance(document, dict):
        raise CheckpointError(lines(f"{origin} holds a {type(document).__name__}", "expected a JSON object"))
    ModelSpec.from_config(document)
    from transformers import CONFIG_MAPPING

    try:
        config = CONFIG_MAPPING[document["model_type"]].from_dict({key: value for key, value in document.items() if key != "auto_map"})
    except Exception as error:  # transformers validates with several exception types
        raise CheckpointError(lines(f"{origin}: transformers refuses it: {cause(error)}")) from None
    if document.get("quantization_config") is not None:
        raise CheckpointError(lines(f"{origin} has a quantization_config", "expected plain weights: float32, bfloat16 or float16"))
    from transformers.activations import ACT2FN

    if config.hidden_act not in ACT2FN:
        raise CheckpointError(
            lines(f"{origin}: hidden_act {shown(config.hidden_act)} is unknown", "expected an activation of transformers, as silu")
        )
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise CheckpointError(lines(f"{origin}: rope type {kind!r} is not supported", f"expected one of {', '.join(ROPE_TYPES)}"))
    return config


class SafetensorsFolder:
    """A folder as transformers saves it: config.json, one or several safetensors files, a tokenizer."""

    def __init__(self, folder: Path) -> None:
        self.location = folder
        if not (folder / "config.json").is_file():
            raise CheckpointError(lines(f"folder {str(folder)!r} has no config.json", "expected a model folder as transformers saves it"))
        self.config = config_from_dict(read_json(folder / "config.json"), "config.json")
        generation = folder / "generation_config.json"
        self.generation: dict[str, Any] = read_json(generation) if generation.is_file() else {}
        if not isinstance(self.generation, dict):
            raise CheckpointError(lines(f"generation_config.json holds a {type(self.generation).__name__}", "expected a JSON object"))
        self._files = self._find_files()

    def _find_files(self) -> list[Path]:
        index = self.location / "model.safetensors.index.json"
        if index.is_file():
            weight_map = read_json(index)
            weight_map = weight_map.get("weight_map") if isinstance(weight_map, dict) else None
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise CheckpointError(lines(f"{index.name} has no weight_map of names to files"))
            files = []
            for name in sorted(set(weight_map.values())):
                if Path(name).name != name or not name.endswith(".safetensors"):
                    raise CheckpointError(
                        lines(f"{index.name} names the file {name!r}", "expected a *.safetensors file in the same folder")
                    )
                if not (self.location / name).is_file():
                    raise CheckpointError(lines(f"{index.name} names {name!r}, which is missing"))
                files.append(self.location / name)
            return files
        files = sorted(self.location.glob("*.safetensors"))
        if not files:
            pickles = sorted(path.name for pattern in _PICKLES for path in self.location.glob(pattern))
            if pickles:
                raise CheckpointError(
                    lines(
                        f"folder {str(self.location)!r} has only pickle weights: {listed(pickles, 2)}",
                        "expected *.safetensors: pickles can run code and are never loaded",
                        "convert it with transformers' save_pretrained",
                    )
                )
            raise CheckpointError(
                lines(f"folder {str(self.location)!r} has no *.safetensors file", "expected model.safetensors, or several with an index")
            )
        return files

    def tensors(self, spec: ModelSpec) -> Iterator[tuple[str, torch.Tensor]]:
        from safetensors import SafetensorError, safe_open

        wanted = dict(spec.parameters())
        seen: set[str] = set()
        for file in self._files:
            try:
                with safe_open(file, framework="pt") as handle:
                    for name in handle.keys():  # noqa: SIM118 - safe_open has no iterator
                        if _ignored(name, spec):
                            continue
                        if name not in wanted:
                            raise CheckpointError(
                                lines(
                                    f"{file.name}: unexpected tensor {name}",
                                    f"expected only those of a {spec.model_type} model with this config",
                                )
                            )
                        if name in seen:
                            raise CheckpointError(lines(f"{file.name}: tensor {name} stands in two files"))
                        seen.add(name)
                        shape = tuple(handle.get_slice(name).get_shape())
                        if shape != wanted[name]:
                            raise CheckpointError(
                                lines(
                                    f"{file.name}: tensor {name} has shape {list(shape)}", f"expected {list(wanted[name])}, from the config"
                                )
                            )
                        kind = handle.get_slice(name).get_dtype()
                        if kind not in _STORED:
                            raise CheckpointError(
                                lines(f"{file.name}: tensor {name} is of dtype {kind}", f"expected one of {', '.join(_STORED)}")
                            )
                        yield name, handle.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    lines(f"{file.name} is damaged: {cause(error)}", "expected a whole safetensors file; download it again")
                ) from None
        missing = [name for name in wanted if name not in seen]
        if missing:
            raise CheckpointError(lines(f"missing tensors: {listed(missing)}", f"expected {len(wanted)} in {len(self._files)} file(s)"))

    def tokenizer(self) -> Any | None:
        if not any((self.location / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
            return None
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(str(self.location), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # tokenizers raise bare Exception
            raise CheckpointError(lines(f"the tokenizer in {str(self.location)!r} cannot be read: {cause(error)}")) from None


def _ignored(name: str, spec: ModelSpec) -> bool:
    """Tensors that a checkpoint may hold and a model doesn't need: a tied head stored twice, rotary tables of old Llamas (they follow from
    the config)."""
    return name.endswith("rotary_emb.inv_freq") or (spec.tied and name == "lm_head.weight")
