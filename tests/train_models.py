"""A model so small that training takes seconds, with a tokenizer and a chat template of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
VOCAB = 320


def tokenizer() -> Any:
    """Byte-level BPE of 320 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from parallama.prove.shipped_text import shipped

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|im_end|>", "<|im_start|>"]
    made.train_from_iterator(
        [shipped()],
        trainers.BpeTrainer(
            vocab_size=VOCAB,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|im_end|>", chat_template=TEMPLATE
    )


def make(folder: Path, **sizes: Any) -> str:
    """A folder with a random model of 3 query heads and 1 KV head, which only 1x3 divides."""
    from reference import make_model

    model = make_model(
        **(
            {
                "heads": 3,
                "kv_heads": 1,
                "hidden": 24,
                "intermediate": 40,
                "layers": 1,
                "vocab": VOCAB,
                "tied": True,
            }
            | sizes
        )
    )
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)
