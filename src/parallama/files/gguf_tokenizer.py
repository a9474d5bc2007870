"""The tokenizer that a GGUF file describes, by transformers' reader and llama.cpp's rules.

Where the file is silent or names a way of splitting texts that transformers' reader does not know,
that reader takes GPT-2's. llama.cpp does otherwise, and so do the models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import CheckpointError, cause, lines, shown
from ..notices import say_once
from . import gguf_header
from .bounded_tokenizer import bound

_AS_GPT2 = ("gpt-2", "mpt", "olmo", "phi-2", "jais", "mellum")
_DIGIT_BY_DIGIT = ("smollm", "starcoder", "refact", "command-r", "codeshell", "minerva-7b")
_WITH_BOS = (
    *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0"),
    *("lfm2", "tekken"),
)
"""Ways of splitting whose models begin every text with BOS, unless the file says otherwise."""


def read(path: Path) -> Any:
    """transformers' tokenizer of a file that holds a vocabulary.

    Raises:
        CheckpointError: it cannot be read, or texts are split in a way that is not known.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf.gguf_tokenizer_mapping import (
        convert_gguf_tokenizer,
        get_gguf_tokenizer,
    )

    with gguf_header.private_copy(path) as copy:
        try:
            architecture, described, config = get_gguf_tokenizer(str(copy))
            if described.get("pre_tokenizer_type") in _WITH_BOS:
                config.setdefault("add_bos_token", True)
            backend, more = convert_gguf_tokenizer(architecture, described)
            _split(backend, described, path)
            made = PreTrainedTokenizerFast(tokenizer_object=backend, **config, **more)
        except (KeyboardInterrupt, SystemExit, CheckpointError):
            raise
        except BaseException as error:  # anything, and Rust's panics are no `Exception`
            raise CheckpointError(
                lines(f"the tokenizer in {path.name} cannot be read: {cause(error)}")
            ) from None
    return bound(made, repr(path.name))


def _split(backend: Any, described: dict[str, Any], path: Path) -> None:
    """Split texts as the file says, where it says something that transformers' reader leaves."""
    from tokenizers import pre_tokenizers
    from transformers.integrations.gguf import gguf_tokenizer_mapping

    way = described.get("pre_tokenizer_type")
    known = (*gguf_tokenizer_mapping.GGUF_PRE_TOKENIZER_SPLITS, *_AS_GPT2)
    if described.get("tokenizer_type") != "gpt2" or way in known:
        return
    if way in (None, "default"):
        say_once(
            f"{path.name} does not say how texts are split (tokenizer.ggml.pre): they are split as "
            "GPT-2 does it; a file of a newer converter says it"
        )
    elif way in _DIGIT_BY_DIGIT:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    else:
        raise CheckpointError(
            lines(
                f"{path.name}: tokenizer.ggml.pre is {shown(way)}, a way of splitting texts that "
                "is not known",
                f"expected one of {', '.join(sorted({*known, *_DIGIT_BY_DIGIT}))}",
                "use the safetensors checkpoint",
            )
        )
