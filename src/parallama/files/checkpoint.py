"""Checkpoints as folders of safetensors, and what every checkpoint has.

Nothing is unpickled, and no code of a checkpoint is run: the config is read as JSON, and must name
a model type that this package knows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

import torch

from ..errors import CheckpointError, cause, lines, shown
from ..model.config_checks import check_config, check_generation, declared
from ..model.spec import ModelSpec
from ..notices import say_once
from . import model_files, tokenizer_files
from .tensor_source import TensorSource, safetensors_sources
from .weight_files import WeightFiles, check_second_head, survey


class Checkpoint(Protocol):
    """A source of one model's config, tokenizer and tensors.

    Attributes:
        ignored: tensors and files that are not read -> why.
    """

    location: Path
    config: Any
    generation: dict[str, Any]
    ignored: Mapping[str, str]

    def sources(self, spec: ModelSpec) -> Sequence[TensorSource]:
        """Every parameter of `spec.parameters()`, once, not yet read.

        Raises:
            CheckpointError: a tensor is missing or unexpected, with its name.
        """
        ...

    def tensors(self, spec: ModelSpec) -> Iterator[tuple[str, torch.Tensor]]:
        """The same by name, whole and on the host."""
        for source in self.sources(spec):
            yield source.name, source.read()

    def file_of(self, name: str) -> str:
        """The name of the file that holds a parameter."""
        ...

    def tokenizer(self) -> Any | None:
        """The tokenizer, or None if there is none."""
        ...


def config_from_dict(document: Any, origin: str) -> Any:
    """A transformers config object from the contents of a config.json.

    No code but transformers' own is looked at.

    Raises:
        CheckpointError: not a supported model, or values that transformers refuses.
    """
    if not isinstance(document, dict):
        raise CheckpointError(
            lines(f"{origin} holds a {type(document).__name__}", "expected a JSON object")
        )
    spec = ModelSpec.from_config(document, origin)
    check_config(document, origin, spec.vocab)
    from transformers import CONFIG_MAPPING

    made = CONFIG_MAPPING[document["model_type"]]
    try:
        config = made.from_dict(declared(document, {field.name for field in fields(made)}))
    except Exception as error:  # transformers validates with several exception types
        raise CheckpointError(lines(f"{origin}: transformers refuses it: {cause(error)}")) from None
    # Not every family declares it, and some leave it open and then fail on it.
    config.head_dim = spec.head_dim
    from transformers.activations import ACT2FN

    if config.hidden_act not in ACT2FN:
        raise CheckpointError(
            lines(
                f"{origin}: hidden_act {shown(config.hidden_act)} is unknown",
                "expected an activation of transformers, as silu",
            )
        )
    return config


class SafetensorsFolder(Checkpoint):
    """A folder as transformers saves it: config.json, safetensors files, a tokenizer."""

    def __init__(self, folder: Path) -> None:
        self.location = folder
        self.config = config_from_dict(model_files.read_config(folder), "config.json")
        self.spec = ModelSpec.from_config(self.config)
        generation = model_files.find(folder, "generation_config.json")
        self.generation: dict[str, Any] = {}
        if generation is not None:
            self.generation = model_files.read_json(generation)
        check_generation(self.generation, "generation_config.json", self.spec.vocab)
        self.weights: WeightFiles = survey(folder, self.spec)
        self.ignored: Mapping[str, str] = self.weights.ignored
        for name, why in self.ignored.items():
            if name.endswith("."):
                say_once(f"{name} of every tensor's name is left out: {why}")

    def file_of(self, name: str) -> str:
        return self.weights.parameters[name].file.name

    def sources(self, spec: ModelSpec) -> Sequence[TensorSource]:
        assert spec == self.spec, "the spec is that of the checkpoint's own config"
        check_second_head(self.weights)
        return safetensors_sources(self.weights.parameters)

    def tokenizer(self) -> Any | None:
        return tokenizer_files.read(self.location, self.spec.model_type)
