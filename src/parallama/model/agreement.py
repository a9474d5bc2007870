"""What two keys of a config.json say of the same thing must agree. Pure.

Releases of transformers write the same setting under several names, and programs that edit a config
change one of them. Each reader then believes another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError, lines, shown
from .families import FAMILIES, Family

_SAVED_BY_FSDP = "fsdp"
_ROPES = ("rope_scaling", "rope_parameters")
_ORIGINAL = "original_max_position_embeddings"


def check_agreement(values: Mapping[str, Any], family: Family, origin: str) -> None:
    """Refuse a config that contradicts itself.

    Args:
        values: the config.json; its model type is that of the family.
        origin: what to call it in a message.

    Raises:
        CheckpointError: with both keys and their values.
    """
    _check_architecture(values, family, origin)
    _check_same({key: _dtype(values.get(key)) for key in ("dtype", "torch_dtype")}, origin)
    ropes = {key: values[key] for key in _ROPES if isinstance(values.get(key), Mapping)}
    for inner in sorted({name for rope in ropes.values() for name in rope}):
        name = "rope_type" if inner == "type" else inner
        said = {
            f"{key}.{written}": rope.get(written)
            for key, rope in ropes.items()
            for written in ((name, "type") if name == "rope_type" else (name,))
        }
        if name in ("rope_theta", _ORIGINAL):
            said[name] = values.get(name)
        _check_same(said, origin)


def _check_architecture(values: Mapping[str, Any], family: Family, origin: str) -> None:
    """`architectures` names the class whose weights these are: the family's causal LM, or nothing.

    A base model's weights are whole where the head shares the embedding's.
    """
    named = values.get("architectures")
    if named is None or named == []:
        return
    expected = [family.architecture]
    if values.get("tie_word_embeddings", family.defaults.get("tie_word_embeddings")) is True:
        expected.append(family.architecture.replace("ForCausalLM", "Model"))
    is_list = isinstance(named, list) and all(isinstance(name, str) for name in named)
    if not is_list:
        raise CheckpointError(
            lines(f"{origin}: architectures is {shown(named)}", "expected a list of names")
        )
    plain = {name.lower().removeprefix(_SAVED_BY_FSDP) for name in named}
    if not plain & {name.lower() for name in expected}:
        others = [kind for kind, each in FAMILIES.items() if each.architecture in named]
        told = f"set model_type to {others[0]!r}" if others else f"set it to {expected[:1]}"
        raise CheckpointError(
            lines(
                f"{origin}: architectures is {shown(named)}, and model_type is "
                f"{shown(values['model_type'])}",
                f"expected {' or '.join(expected)}, the language model of this type",
                f"{told} if that is what the weights are",
            )
        )


def _dtype(value: Any) -> Any:
    return value.removeprefix("torch.") if isinstance(value, str) else value


def _check_same(said: Mapping[str, Any], origin: str) -> None:
    """Refuse two different values; null says nothing."""
    given = {key: value for key, value in said.items() if value is not None}
    first = next(iter(given.items()), None)
    for key, value in given.items():
        if first is not None and value != first[1]:
            raise CheckpointError(
                lines(
                    f"{origin}: {first[0]} is {shown(first[1])}, and {key} is {shown(value)}",
                    "expected the same: both say it of the same thing",
                    "keep the right one",
                )
            )
