"""Prompts for a benchmark of servers: random, with shared prefixes, as ShareGPT's, of a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from .. import text_files
from ..errors import UsageError, lines
from ..files.find import find
from .serve_options import Workload

SHAREGPT_MEAN_TOKENS, SHAREGPT_SIGMA = (161.31, 337.99), 1.0
"""Log-normal lengths of prompts and answers like ShareGPT's.

The means are those of the paper on vLLM (Kwon et al., 2023, figure 11). The spread is ours.
"""
LEAST_TOKENS, MOST_PROMPT, MOST_TOGETHER = 4, 1024, 2048
"""Shorter and longer conversations of ShareGPT are left out, as `vllm bench serve` does."""
CUSTOM_TOKENS = 256
"""Of an answer, where a line of a custom file doesn't say how many."""
_TRIES = 8
Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What one request asks for.

    Attributes:
        tokens: of the text, counted by the tokenizer.
        output_tokens: most of the answer.
    """

    text: str
    tokens: int
    output_tokens: int


class TextMaker:
    """Makes texts of so many tokens.

    Args:
        tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any, rng: np.random.Generator) -> None:
        self._tokenizer, self._rng = tokenizer, rng
        special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
        self._ids = np.array([each for each in range(len(tokenizer)) if each not in special])
        self.added = len(tokenizer("")["input_ids"])
        """Tokens that the tokenizer puts around a text."""

    def ids(self, count: int) -> list[int]:
        """Random tokens."""
        return [int(each) for each in self._rng.choice(self._ids, count)]

    def text(self, ids: Sequence[int]) -> str:
        """A text of as many tokens as these are, and these themselves where it can be.

        A text of random tokens may be split otherwise than it was put together.
        """
        wanted, kept = len(ids), list(ids)
        for _ in range(_TRIES):
            text: str = self._tokenizer.decode(kept)
            kept = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(kept) == wanted:
                return text
            kept = kept[:wanted] + self.ids(max(0, wanted - len(kept)))
        return str(self._tokenizer.decode(kept))

    def count(self, text: str) -> int:
        """Tokens of a text, those that the tokenizer adds among them."""
        return len(self._tokenizer(text)["input_ids"])


def tokenizer_of(name: str) -> Any:
    """The tokenizer of a model.

    Raises:
        UsageError: it has none.
    """
    found = find(name).tokenizer()
    if found is None:
        raise UsageError(lines(f"model {name!r} has no tokenizer", "give one with --tokenizer"))
    return found


def prompts(workload: Workload, tokenizer: Any) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts that are measured, and those of the warm-ups.

    Raises:
        UsageError: the data set's file cannot be read, or holds too few conversations.
    """
    rng = np.random.default_rng(workload.seed)
    make = TextMaker(tokenizer, rng)
    count = workload.num_prompts + workload.num_warmups
    if workload.dataset_path is not None:
        read = _custom if workload.dataset_name == "custom" else _of_sharegpt
        made = read(workload, make, rng, count)
    else:
        kind: dict[str, Callable[..., list[Prompt]]] = {
            "random": _random,
            "prefix_repetition": _prefix_repetition,
            "sharegpt": _like_sharegpt,
        }
        made = kind[workload.dataset_name](workload, make, rng, count)
    return made[: workload.num_prompts], made[workload.num_prompts :]


def _prompt(make: TextMaker, ids: Sequence[int], output_tokens: int) -> Prompt:
    text = make.text(ids)
    return Prompt(text=text, tokens=make.count(text), output_tokens=output_tokens)


def _random(
    workload: Workload, make: TextMaker, rng: np.random.Generator, count: int
) -> list[Prompt]:
    """Random lengths within a share of those asked for, behind one shared prefix."""

    def lengths(mean: int) -> list[int]:
        share = workload.random_range_ratio
        low, high = int(mean * (1 - share)), int(mean * (1 + share))
        return [max(1, int(each)) for each in rng.integers(low, high + 1, count)]

    inputs, outputs = lengths(workload.random_input_len), lengths(workload.random_output_len)
    prefix = make.ids(workload.random_prefix_len)
    return [
        _prompt(make, [*prefix, *make.ids(max(1, tokens - make.added))], limit)
        for tokens, limit in zip(inputs, outputs, strict=True)
    ]


def _prefix_repetition(
    workload: Workload, make: TextMaker, rng: np.random.Generator, count: int
) -> list[Prompt]:
    """As many prompts behind each of some prefixes, in random order or prefix after prefix."""
    many = workload.prefix_repetition_num_prefixes
    prefixes = [make.ids(workload.prefix_repetition_prefix_len) for _ in range(many)]
    chosen = _shuffled(workload, rng, sorted(number % many for number in range(count)))
    return [
        _prompt(
            make,
            [*prefixes[number], *make.ids(workload.prefix_repetition_suffix_len)],
            workload.prefix_repetition_output_len,
        )
        for number in chosen
    ]


def _like_sharegpt(
    workload: Workload, make: TextMaker, rng: np.random.Generator, count: int
) -> list[Prompt]:
    """Random tokens of lengths that are spread as ShareGPT's are."""
    found: list[Prompt] = []
    while len(found) < count:
        tokens, answer = (
            round(rng.lognormal(np.log(mean) - SHAREGPT_SIGMA**2 / 2, SHAREGPT_SIGMA))
            for mean in SHAREGPT_MEAN_TOKENS
        )
        if _is_kept(tokens, answer):
            limit = workload.sharegpt_output_len or answer
            found.append(_prompt(make, make.ids(max(1, tokens - make.added)), limit))
    return found


def _of_sharegpt(
    workload: Workload, make: TextMaker, rng: np.random.Generator, count: int
) -> list[Prompt]:
    """The first message of each conversation, with its answer's length."""
    path = Path(str(workload.dataset_path))
    try:
        document = json.loads(text_files.read(path))
        turns = [each["conversations"] for each in document if len(each["conversations"]) >= 2]
        pairs = [(str(said[0]["value"]), str(said[1]["value"])) for said in turns]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UsageError(
            lines(
                f"--dataset-path {str(path)!r} cannot be read: {type(error).__name__}",
                'expected ShareGPT\'s form: [{"conversations": [{"value": "..."}, ...]}, ...]',
            )
        ) from None
    found: list[Prompt] = []
    for text, answer in _shuffled(workload, rng, pairs):
        tokens, limit = make.count(text), make.count(answer) - make.added
        if _is_kept(tokens, limit):
            limit = workload.sharegpt_output_len or limit
            found.append(Prompt(text=text, tokens=tokens, output_tokens=limit))
        if len(found) == count:
            return found
    raise UsageError(
        lines(
            f"--dataset-path {str(path)!r} holds {len(found)} conversations of fitting lengths",
            f"expected {count}, for --num-prompts and --num-warmups",
        )
    )


def _custom(
    workload: Workload, make: TextMaker, rng: np.random.Generator, count: int
) -> list[Prompt]:
    """Of each line its prompt, and how long the answer is to be."""
    path, given = Path(str(workload.dataset_path)), workload.custom_output_len
    try:
        said = [json.loads(line) for line in text_files.read(path).splitlines() if line.strip()]
        pairs = [
            (str(each["prompt"]), given or int(each.get("output_tokens", CUSTOM_TOKENS)))
            for each in said
        ]
        if any(limit < 1 for _, limit in pairs):
            raise ValueError
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise UsageError(
            lines(
                f"--dataset-path {str(path)!r} cannot be read: {type(error).__name__}",
                'expected JSON lines: {"prompt": "...", "output_tokens": 64}',
            )
        ) from None
    if len(pairs) < count:
        raise UsageError(
            lines(
                f"--dataset-path {str(path)!r} holds {len(pairs)} prompts",
                f"expected {count}, for --num-prompts and --num-warmups",
            )
        )
    return [
        Prompt(text=text, tokens=make.count(text), output_tokens=limit)
        for text, limit in _shuffled(workload, rng, pairs)[:count]
    ]


def _shuffled(workload: Workload, rng: np.random.Generator, items: list[Item]) -> list[Item]:
    if workload.disable_shuffle:
        return items
    return [items[number] for number in rng.permutation(len(items))]


def _is_kept(tokens: int, answer: int) -> bool:
    return (
        min(tokens, answer) >= LEAST_TOKENS
        and tokens <= MOST_PROMPT
        and tokens + answer <= MOST_TOGETHER
    )
