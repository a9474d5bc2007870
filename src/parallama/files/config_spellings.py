"""A config.json for every release of transformers: what they spell differently, in both ways. Pure.

transformers 5 writes `rope_parameters` and `dtype`. Earlier ones, vLLM of their time and the
converter of llama.cpp look for `rope_theta`, `rope_scaling` and `torch_dtype`, and fall back
silently.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_CLASS_OF_5, _CLASS = "TokenizersBackend", "PreTrainedTokenizerFast"
"""A tokenizer that its tokenizer.json describes: transformers 5 knows both names."""
_FIRST_SCALINGS = ("linear", "dynamic")


def rope_in_both(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a config.json that say these rotary settings.

    Args:
        settings: transformers 5's, complete: theta and type are among them.
    """
    scaling: dict[str, Any] | None = {
        key: value for key, value in settings.items() if key not in ("rope_theta", "type")
    }
    assert scaling is not None
    if scaling["rope_type"] == "default":
        scaling = None
    elif scaling["rope_type"] in _FIRST_SCALINGS and scaling.keys() == {"rope_type", "factor"}:
        # Releases that know no other type want these two keys and nothing else.
        scaling = {"type": scaling["rope_type"], "factor": scaling["factor"]}
    return {
        "rope_parameters": {key: value for key, value in settings.items() if key != "type"},
        "rope_theta": settings["rope_theta"],
        "rope_scaling": scaling,
    }


def dtype_in_both(document: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a config.json that say its dtype; none where it says none."""
    dtype = document.get("dtype") or document.get("torch_dtype")
    return {} if dtype is None else {"dtype": dtype, "torch_dtype": dtype}


def tokenizer_in_both(document: Mapping[str, Any], template: str | None) -> dict[str, Any] | None:
    """A tokenizer_config.json that transformers 4 reads, too; None if it is one already.

    Args:
        template: the text of chat_template.jinja, for which early releases don't look.
    """
    if document.get("tokenizer_class") != _CLASS_OF_5:
        return None
    changed = {**document, "tokenizer_class": _CLASS}
    changed.pop("backend", None)
    if isinstance(changed.get("extra_special_tokens"), list):
        changed["additional_special_tokens"] = changed.pop("extra_special_tokens")
    if template is not None:
        changed["chat_template"] = template
    return changed
