"""`adapter_config.json` of PEFT: which base an adapter belongs to, and how it is scaled. Pure.

What would change the result and is not supported is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, lines, shown
from . import model_files
from .weight_files import INDEX

NAME = model_files.ADAPTER
WEIGHTS, PICKLED = "adapter_model.safetensors", "adapter_model.bin"
_MERGE = "merge it with peft's merge_and_unload, and save_pretrained the result"
_NOTHING: tuple[Any, ...] = (None, False, [], {}, "")
_UNSUPPORTED = (
    *("use_dora", "use_qalora", "lora_bias", "fan_in_fan_out", "layer_replication"),
    *("trainable_token_indices", "target_parameters", "alora_invocation_tokens"),
    *("megatron_config", "arrow_config"),
)
"""Keys of LoRA's variants: with any of them a weight and its adapter make something else."""
_KNOWN_USES = ("use_rslora", "use_cache")
_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "true", "false")
"""Ways to begin an adapter that leave the base's weights as they are."""
_PATTERN = re.compile(r"(?:[\w.^$\-|()\[\]]|\\[.d]|(?:\.|\\d)[*+])+")
_MOST_REPEATS = 4


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What an adapter says of itself.

    Attributes:
        base: name of the model that it belongs to, if it says so.
        rank, alpha: of every module but those that `ranks` and `alphas` match.
        rank_scaled: the product is scaled by alpha / sqrt(rank), as rsLoRA does.
        ranks, alphas: pattern of a module's name -> its own.
    """

    base: str | None
    rank: int
    alpha: float
    rank_scaled: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]

    def rank_of(self, module: str) -> int:
        """The rank of a module's adapter."""
        key = _matching(self.ranks, module)
        return self.rank if key is None else self.ranks[key]

    def scale_of(self, module: str) -> float:
        """What the product of a module's adapter is scaled by."""
        key = _matching(self.alphas, module)
        alpha = self.alpha if key is None else self.alphas[key]
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.rank_scaled else rank)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and no model.

    Raises:
        CheckpointError: it holds both.
    """
    if model_files.find(folder, NAME) is None:
        return False
    others = [path.name for path in folder.glob("*.safetensors") if path.name != WEIGHTS]
    if others or (folder / INDEX).exists():
        raise CheckpointError(
            lines(
                f"folder {str(folder)!r} holds an adapter ({NAME}) and a model",
                "expected one of them",
                "move the adapter into a folder of its own, and give it with --adapter",
            )
        )
    return True


def base_of(folder: Path) -> str:
    """The name of an adapter's base: a hub id, a path, or a path from the adapter's own folder.

    Raises:
        CheckpointError: the adapter says none; or see `read`.
    """
    named = read(folder).base
    if named is None:
        raise CheckpointError(
            lines(
                f"folder {str(folder)!r} holds an adapter: {NAME} says no base_model_name_or_path",
                "expected the model that it belongs to",
                with_base(folder),
            )
        )
    try:
        beside = (folder / named).is_dir() and not Path(named).exists()
    except (OSError, ValueError):
        beside = False
    return str(folder / named) if beside else named


def with_base(folder: Path) -> str:
    """What to do where an adapter's base is not where it says."""
    return f"name the base: parallama generate BASE --adapter {folder}"


def read(folder: Path) -> AdapterConfig:
    """What the adapter in a folder says of itself.

    Raises:
        CheckpointError: it cannot be read, or is of a kind that is not supported.
    """
    document = model_files.read_json(model_files.require(folder, NAME))
    if not isinstance(document, dict):
        raise CheckpointError(
            lines(f"{NAME} holds a {type(document).__name__}", "expected a JSON object")
        )
    _check_supported(document)
    base = document.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise _wrong("base_model_name_or_path", base, "the name of a model")
    return AdapterConfig(
        base=base or None,
        rank=_rank(document.get("r", 8), "r"),
        alpha=_alpha(document.get("lora_alpha", 8), "lora_alpha"),
        rank_scaled=document.get("use_rslora") is True,
        ranks={
            key: _rank(value, f"rank_pattern.{key}")
            for key, value in _patterns(document, "rank_pattern").items()
        },
        alphas={
            key: _alpha(value, f"alpha_pattern.{key}")
            for key, value in _patterns(document, "alpha_pattern").items()
        },
    )


def _check_supported(document: Mapping[str, Any]) -> None:
    kind = document.get("peft_type")
    if kind is None and "lora_parameters" in document:
        raise CheckpointError(
            lines(
                f"{NAME}: it is of mlx-lm: it has lora_parameters, and no peft_type",
                "expected one of PEFT's",
                "let mlx_lm.fuse write the merged model",
            )
        )
    if kind != "LORA":
        raise _wrong("peft_type", kind, "LORA", _MERGE)
    for key, value in document.items():
        is_variant = key in _UNSUPPORTED or (key.startswith("use_") and key not in _KNOWN_USES)
        if is_variant and value not in _NOTHING:
            raise _wrong(key, value, "plain LoRA or rsLoRA", _MERGE)
    if document.get("bias", "none") != "none":
        raise _wrong("bias", document["bias"], "none: biases are not taken from adapters", _MERGE)
    init = document.get("init_lora_weights", True)
    if not isinstance(init, (str, bool, type(None))) or init not in _INITS:
        raise _wrong(
            "init_lora_weights", init, "one that leaves the base's weights as they are", _MERGE
        )
    if document.get("use_rslora") not in (None, True, False):
        raise _wrong("use_rslora", document["use_rslora"], "true or false")


def _patterns(document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    patterns = document.get(key) or {}
    if not isinstance(patterns, dict):
        raise _wrong(key, patterns, "an object from a module's name to a number")
    for pattern in patterns:
        repeats = len(re.findall(r"[*+]", pattern))
        if not _PATTERN.fullmatch(pattern) or repeats > _MOST_REPEATS or not _compiles(pattern):
            raise _wrong(key, pattern, "names of modules, or simple patterns of them")
    return patterns


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _matching(patterns: Mapping[str, Any], module: str) -> str | None:
    """The first pattern that a module's name ends with, as PEFT looks for it."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), None)


def _rank(value: Any, key: str) -> int:
    if type(value) is not int or not 1 <= value <= 1 << 20:
        raise _wrong(key, value, "a whole number of at least 1")
    return value


def _alpha(value: Any, key: str) -> float:
    if type(value) not in (int, float) or not abs(value) <= 1e9:
        raise _wrong(key, value, "a number")
    return float(value)


def _wrong(key: str, value: Any, expected: str, remedy: str = "") -> CheckpointError:
    return CheckpointError(
        lines(f"{NAME}: {key} is {shown(value, 60)}", f"expected {expected}", remedy)
    )
