"""Names of tensors as wrappers leave them: torch.compile, data parallelism, FSDP, adapters. Pure.

Who saves the state of a wrapped model gets the wrapper's prefix in every name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

_BASE = "model."
_EMBEDDING = "model.embed_tokens.weight"
# Part of a name -> the wrapper that puts it there, and what to save instead.
_WRAPPERS: tuple[tuple[str, str, str], ...] = (
    (r"_orig_mod\.", "torch.compile", "model._orig_mod.save_pretrained(...)"),
    (r"_fsdp_wrapped_module\.", "FSDP", "the model within its FULL_STATE_DICT"),
    (r"_checkpoint_wrapped_module\.", "checkpoint_wrapper", "the model before it is wrapped"),
    (r"_forward_module\.", "Lightning Fabric", "model.module.save_pretrained(...)"),
    (r"^pretrained_model\.|^v_head\.", "TRL's value head", "model.pretrained_model"),
    (
        r"\.lora_[AB]\.|\.lora_(embedding|magnitude)|^base_model\.|\.base_layer\.|modules_to_save",
        "PEFT",
        "model.merge_and_unload().save_pretrained(...)",
    ),
    (
        r"\.(qweight|qzeros|g_idx|SCB|absmax|quant_map|weight_scale(_inv)?|input_scale)$",
        "a quantized model",
        "it with plain weights: bfloat16, float16 or float32",
    ),
    (r"language_model\.", "a model of images and text", "its language model"),
    (r"^module\.", "DistributedDataParallel or DeepSpeed", "model.module.save_pretrained(...)"),
    (r"^(layers\.\d|embed_tokens\.|norm\.)", "a model without a head", "the ...ForCausalLM model"),
    (r"^(tok_embeddings|layers\.\d+\.attention)", "Meta's or Mistral's own format", "convert it"),
    (r"^transformer\.|^gpt_neox\.", "another family", "a model of this family"),
)


def wrapper(name: str) -> tuple[str, str] | None:
    """The wrapper that a tensor's name looks like, and what to save instead."""
    for pattern, who, instead in _WRAPPERS:
        if re.search(pattern, name):
            return who, instead
    return None


def plain(
    stored: Collection[str], wanted: Collection[str], is_free: Callable[[str], bool]
) -> tuple[dict[str, str], dict[str, str]]:
    """The names that transformers' model has for stored ones.

    They differ where all names share a prefix, or all lack `model.`, and are exactly the model's
    otherwise.

    Args:
        stored: names in the files.
        wanted: names of the model's parameters.
        is_free: whether a name may be there or not.

    Returns:
        Stored name to plain name; and what was left out of every name -> why.
    """

    def are_the_models(names: Collection[str]) -> bool:
        return set(wanted) <= {*names} and all(name in wanted or is_free(name) for name in names)

    ending = next((name for name in stored if name.endswith(_EMBEDDING)), _EMBEDDING)
    prefix = ending.removesuffix(_EMBEDDING)
    if prefix and all(name.startswith(prefix) for name in stored):
        names = {name: name.removeprefix(prefix) for name in stored}
        if are_the_models(names.values()):
            found = wrapper(prefix)
            of = f", which {found[0]} puts there" if found else ""
            return names, {prefix: f"a prefix of every tensor's name{of}"}
    names = {name: f"{_BASE}{name}" for name in stored}
    if are_the_models(names.values()):
        return names, {}
    return {name: name for name in stored}, {}
