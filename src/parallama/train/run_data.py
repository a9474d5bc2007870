"""The data of a run: its corpus, and the rows of its validations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import tokens
from .corpus import Corpus
from .packing import Row, Rows, empty_row
from .settings import TrainSettings
from .watch import Watch


@dataclass(frozen=True, kw_only=True)
class RunData:
    """Tokenized data.

    Attributes:
        eval_rows: the first rows of the validation data, in whole batches, the same every time;
            none without validation.
    """

    corpus: Corpus
    eval_rows: list[Row]


def prepare_data(settings: TrainSettings, tokenizer: Any, vocab: int, watch: Watch) -> RunData:
    """Tokenize the data of a run, or find them in the cache.

    Raises:
        UsageError, RunError: see `tokens.prepare`; or a token is not one of the model's.
    """
    corpus = _corpus("data", settings.sources, settings, tokenizer, vocab, watch)
    if not settings.eval_sources:
        return RunData(corpus=corpus, eval_rows=[])
    held_out = _corpus("eval_data", settings.eval_sources, settings, tokenizer, vocab, watch)
    sequences = settings.grad_accum * settings.batch_size
    rows = Rows(held_out, settings.seq_len, packing=settings.packing, shuffle=False)
    taken = rows.take(min(len(rows), settings.eval_batches * sequences))
    padding = [empty_row(settings.seq_len)] * (-len(taken) % sequences)
    return RunData(corpus=corpus, eval_rows=taken + padding)


def _corpus(
    what: str,
    sources: Sequence[str],
    settings: TrainSettings,
    tokenizer: Any,
    vocab: int,
    watch: Watch,
) -> Corpus:
    corpus = tokens.prepare(
        sources,
        tokenizer,
        seq_len=settings.seq_len,
        too_long=settings.too_long,
        split_answers=settings.split_answers,
        bad_rows=settings.bad_rows,
        cache=Path(settings.cache),
        progress=watch.of(f"tokenizing {what}"),
    )
    corpus.check(vocab)
    counts = corpus.counts
    left_out = {
        "dropped as too long": counts.dropped,
        "truncated": counts.truncated,
        "rows dropped as bad": counts.bad,
    }
    watch.say(
        f"{what}: {len(corpus.lengths):,} documents, {corpus.token_count:,} tokens, "
        f"{corpus.trained_count:,} of them trained on"
        + "".join(f", {count:,} {how}" for how, count in left_out.items() if count)
    )
    if counts.rewritten:
        watch.say(
            f"{what}: {counts.rewritten:,} answers are not trained on: the chat template writes "
            "them differently once others follow (split_answers makes a sample of each)"
        )
    for note in counts.notes:
        watch.say(f"{what}: {note}")
    return corpus
