"""Random-weight checkpoints of named shapes, to measure on.

Speed depends on sizes, not on what the weights say.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import CheckpointError, UsageError, lines

_COMMON = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
    "dtype": "float32",
}


def _shape(
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    intermediate: int,
    vocab: int,
    *,
    tied: bool,
) -> dict[str, object]:
    return {
        **_COMMON,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "intermediate_size": intermediate,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
    }


SHAPES: Mapping[str, dict[str, object]] = MappingProxyType(
    {
        "tiny": _shape(64, 2, 8, 4, 176, 512, tied=False),
        "smol135": _shape(576, 30, 9, 3, 1536, 49152, tied=True),
        "l200": _shape(1024, 12, 16, 8, 2816, 32000, tied=False),
        "l1b": _shape(2048, 16, 32, 8, 8192, 128256, tied=True),
        "l1b-bf16": _shape(2048, 16, 32, 8, 8192, 128256, tied=True) | {"dtype": "bfloat16"},
    }
)
"""Name to config.json: a toy, SmolLM2-135M's sizes, 200 M parameters, Llama-3.2-1B's sizes in
float32 and in bfloat16.
"""
_BFLOAT16_SHARD_BYTES = 550_000_000  # makes five files of l1b-bf16, for loading several is measured


def tokenizer_files(vocab: int) -> dict[str, str]:
    """A tokenizer with a word for each id, `w0 w1 w2 ...`, and a chat template.

    Servers need one. Every text of these words has as many tokens as words.
    """
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {f"w{number}": number for number in range(vocab)},
            "unk_token": "w0",
        },
    }
    return {
        "tokenizer.json": json.dumps(tokenizer) + "\n",
        "tokenizer_config.json": '{"tokenizer_class": "PreTrainedTokenizerFast"}\n',
        "chat_template.jinja": (
            "{% for message in messages %}{{ message['content'] }} {% endfor %}"
        ),
    }


def make(name: str, folder: Path, seed: int = 0) -> int:
    """Write a checkpoint of a named shape: config.json, safetensors, a tokenizer of made-up words.

    Args:
        folder: made if it isn't there; must be empty.

    Returns:
        The number of parameters.

    Raises:
        UsageError: no such shape.
        CheckpointError: the folder has something in it, or cannot be written.
    """
    if name not in SHAPES:
        raise UsageError(
            lines(f"shape {name!r} is unknown", f"expected one of {', '.join(SHAPES)}")
        )
    import torch

    from ..files.weight_writer import SHARD_BYTES, Kind, write
    from ..model.spec import ModelSpec
    from ..sharded.loading import DTYPES

    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise CheckpointError(
                lines(
                    f"folder {str(folder)!r} is not empty",
                    "expected a new one: nothing is written over",
                )
            )
        spec = ModelSpec.from_config(SHAPES[name])
        generator = torch.Generator().manual_seed(seed)
        dtype = DTYPES[str(SHAPES[name]["dtype"])]

        def tensor(shape: tuple[int, ...]) -> torch.Tensor:
            if len(shape) == 1:  # a norm's
                return torch.ones(shape)
            return torch.randn(shape, generator=generator) * 0.02

        kinds = {each: Kind(shape=shape, dtype=dtype) for each, shape in spec.parameters()}
        tensors = ((each, tensor(shape)) for each, shape in spec.parameters())
        shard_bytes = _BFLOAT16_SHARD_BYTES if dtype == torch.bfloat16 else SHARD_BYTES
        write(folder, tensors, kinds, shard_bytes)
        config = json.dumps(SHAPES[name], indent=1) + "\n"
        (folder / "config.json").write_text(config, encoding="utf-8")
        for file, text in tokenizer_files(spec.vocab).items():
            (folder / file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(
            lines(f"folder {str(folder)!r} cannot be written: {error.strerror}", "give another one")
        ) from None
    return sum(math.prod(shape) for _, shape in spec.parameters())
