"""Tiny random models, and what plain transformers says about them: no XLA in this process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING


@dataclass(frozen=True)
class Tiny:
    """A model in memory (fp32, on the host) and the same in a folder."""

    model: Any
    folder: str

    @property
    def vocab(self) -> int:
        return self.model.config.vocab_size


class TinyModels:
    """Makes tiny models and remembers them."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: dict[str, Tiny] = {}

    def __call__(self, **sizes: Any) -> Tiny:
        key = repr(sorted(sizes.items()))
        if key not in self._made:
            folder = self._root / str(len(self._made))
            model = make_model(**sizes)
            model.save_pretrained(folder)
            self._made[key] = Tiny(model, str(folder))
        return self._made[key]


def make_model(
    *,
    family: str = "llama",
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    hidden: int | None = None,
    intermediate: int = 37,
    vocab: int = 101,
    layers: int = 2,
    positions: int = 2048,
    tied: bool = False,
    seed: int = 0,
    **more: Any,
) -> Any:
    """A causal LM whose random weights, biases and norms are large enough to show in the logits."""
    config = CONFIG_MAPPING[family](
        hidden_size=heads * -(-32 // heads) if hidden is None else hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate,
        vocab_size=vocab,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        **more,
    )
    config._attn_implementation = "eager"
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(1 + 0.2 * noise)
            elif "embed_tokens" in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(1.2 * noise * parameter.shape[1] ** -0.5)
    return model


def random_ids(batch: int, length: int, vocab: int, seed: int = 0) -> torch.Tensor:
    """`[batch, length]` token ids."""
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def random_prompts(lengths: Sequence[int], vocab: int, seed: int = 0) -> list[list[int]]:
    """A ragged batch."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab, (length,), generator=generator).tolist() for length in lengths]


def logits(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """`[B, S, V]` fp32."""
    with torch.no_grad():
        return model(ids, attention_mask=mask, use_cache=False).logits.float()


def greedy(model: Any, prompt: Sequence[int], steps: int) -> tuple[list[int], list[float]]:
    """transformers' own greedy continuation of one row, and each token's log-probability."""
    out = model.generate(
        torch.tensor([list(prompt)]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=steps,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens = out.sequences[0, len(prompt) :].tolist()
    return tokens, [
        float(torch.log_softmax(step[0].float(), -1)[token])
        for step, token in zip(out.logits, tokens, strict=True)
    ]


def greedy_batch(
    model: Any, prompts: Sequence[Sequence[int]], steps: int
) -> list[tuple[list[int], list[float]]]:
    """transformers' own greedy continuation of a batch, padded on the left: as `greedy`."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=steps,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens = out.sequences[:, longest:]
    logprobs = torch.stack([torch.log_softmax(step.float(), -1) for step in out.logits], 1).gather(
        2, tokens[..., None]
    )[..., 0]
    return list(zip(tokens.tolist(), logprobs.tolist(), strict=True))


def greedy_turns(model: Any, turns: Sequence[Sequence[int]], steps: int) -> list[list[int]]:
    """transformers' own greedy answers of a conversation in which the cache is kept.

    Each turn's tokens are run behind what is cached, and so is the answer.
    """
    answers, cache, waiting = [], None, []
    for turn in turns:
        waiting = [*waiting, *turn]
        answer = []
        for _ in range(steps):
            with torch.no_grad():
                out = model(torch.tensor([waiting]), past_key_values=cache, use_cache=True)
            cache, waiting = out.past_key_values, [int(out.logits[0, -1].argmax())]
            answer += waiting
        answers.append(answer)
    return answers


def relative_l2(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def pcc(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Pearson correlation of all elements."""
    return float(
        torch.corrcoef(torch.stack([got.double().flatten(), wanted.double().flatten()]))[0, 1]
    )
