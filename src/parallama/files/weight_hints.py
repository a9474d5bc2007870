"""What may be done about weights that are not as the config says, in a line of a message. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..errors import listed

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_NUMBERED = re.compile(r"(.*-)(\d{5})-of-(\d{5})\.safetensors")


def of_missing(missing: Sequence[str], files: Sequence[str]) -> str:
    """About tensors that none of these files holds."""
    if [*missing] == [HEAD]:
        return (
            "set tie_word_embeddings to true in config.json if the head shares the embedding's "
            "weight"
        )
    numbered = [found for name in files if (found := _NUMBERED.fullmatch(name)) is not None]
    for first in numbered[:1]:
        count = int(first[3])
        there = {int(found[2]) for found in numbered}
        lost = [number for number in range(1, min(count, 10_000) + 1) if number not in there]
        if lost:
            of = [f"{first[1]}{number:05}-of-{first[3]}.safetensors" for number in lost]
            return f"download {listed(of, 2)}, too"
    return ""


def of_shape(name: str, found: Sequence[int], expected: Sequence[int]) -> str:
    """About a tensor of another shape."""
    if 0 in found:
        return (
            "DeepSpeed's ZeRO-3 leaves such tensors: save the model with its "
            "zero_to_fp32.py, or with stage3_gather_16bit_weights_on_model_save"
        )
    if name in (EMBEDDING, HEAD) and len(found) == 2 and found[1] == expected[1]:
        return f"set vocab_size to {found[0]} in config.json if its tokens were changed"
    return ""
