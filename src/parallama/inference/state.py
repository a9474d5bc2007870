"""What a session puts on the devices: caches, the state of a batch, and the arguments of steps."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..engine.interface import DeviceTensor, Steps
from ..engine.row_sampling import HIDDEN, RowSampling
from ..engine.steps import CACHE_AXES, SLOT_STATE, SPAN, STATE_AXES, StepKey, cache_names
from ..errors import UsageError, lines
from ..plan.placement import Plan
from ..sharded.layout import Layout
from .choosing import Choosing, TokenBias

MOST_EOS = 16


def put(steps: Steps, host: Mapping[str, torch.Tensor]) -> dict[str, DeviceTensor]:
    """Named host tensors on the devices, each split as `STATE_AXES` says."""
    return {name: steps.mesh.put(tensor, STATE_AXES[name]) for name, tensor in host.items()}


def put_span(steps: Steps, longest: int) -> dict[str, DeviceTensor]:
    """How many positions the longest row has, for steps that ask for it."""
    if not steps.follows_span:
        return {}
    return put(steps, {SPAN: torch.tensor([longest], dtype=torch.int32)})


def text_arguments(
    steps: Steps, ids: torch.Tensor, targets: torch.Tensor | None, *, longest: int
) -> dict[str, DeviceTensor]:
    """Arguments of a step that runs texts at once: for their logits, or to score `targets`.

    Args:
        ids, targets: `[B, S]`.
        longest: tokens of the longest row.
    """
    host = {"ids": ids, "start": torch.zeros(len(ids), dtype=torch.int32)}
    if targets is not None:
        host["targets"] = targets
    return put(steps, host) | put_span(steps, longest)


def empty_cache(steps: Steps, batch: int, length: int) -> dict[str, DeviceTensor]:
    """Zeroed key and value buffers, `[B, K, T, D]` each, by name."""
    plan, shape = steps.plan, steps.mesh.shape
    local = (
        batch // shape.data,
        plan.head_layout.slots // shape.model,
        length,
        plan.model.head_dim,
    )
    return {
        name: steps.mesh.put_shards(lambda _: torch.zeros(local, dtype=steps.dtype), CACHE_AXES)
        for name in cache_names(plan.model.layers)
    }


def blank_state(steps: Steps, batch: int, live: int) -> dict[str, DeviceTensor]:
    """The state of a batch before its prefill; rows from `live` on are idle, and done."""
    host = {
        "token": torch.zeros(batch, dtype=torch.long),
        "logprob": torch.zeros(batch),
        "position": torch.zeros(batch, dtype=torch.int32),
        "done": torch.arange(batch) >= live,
    }
    host["counts"] = torch.zeros(batch, steps.plan.vocab, dtype=torch.int32)
    return put(steps, host) | put_span(steps, 1)


def constants(
    steps: Steps, rows: Sequence[RowSampling], eos: Sequence[int]
) -> dict[str, DeviceTensor]:
    """What stays the same for a whole run: sampling parameters, and the ids that end a row.

    Raises:
        UsageError: there are more than `MOST_EOS` of these ids.
    """
    if len(eos) > MOST_EOS:
        raise UsageError(lines(f"{len(eos)} end-of-text ids", f"expected at most {MOST_EOS}"))
    ends = torch.tensor([*eos, *[-1] * (MOST_EOS - len(eos))], dtype=torch.long)
    return put(steps, host_params(rows) | {"eos": ends})


def slot_arguments(steps: Steps, key: StepKey) -> dict[str, DeviceTensor]:
    """Arguments of a step on slots beside the cache, when nothing runs yet."""
    given = blank_slots(steps, key.batch)
    shards = steps.mesh.shape.data
    if key.kind == "slot_copy":
        none = torch.zeros(shards, dtype=torch.int32)
        return given | put(steps, {"source": none, "target": none})
    params = slot_params([Choosing()] * key.batch, [False] * key.batch)
    given |= no_bias(steps, key.batch if key.kind == "slot_decode" else shards)
    if key.kind == "slot_decode":
        return given | put(steps, params | {"live": torch.zeros(key.batch, dtype=torch.bool)})
    empty = [SlotChunk()] * shards
    chunks = put_slot_chunks(steps, empty, key.new, scored=key.scored)
    return given | put(steps, params) | chunks


def no_bias(steps: Steps, rows: int) -> dict[str, DeviceTensor]:
    """The `bias` of rows that have none."""
    return put(steps, {"bias": torch.zeros(rows, steps.plan.vocab)})


def blank_slots(steps: Steps, slots: int) -> dict[str, DeviceTensor]:
    """The state of slots that hold nothing."""
    state = blank_state(steps, slots, slots)
    return {name: tensor for name, tensor in state.items() if name in SLOT_STATE}


@dataclass(frozen=True)
class SlotChunk:
    """A chunk of a prompt for a slot of one data shard; nothing for any slot by default.

    Attributes:
        slot: its number on its shard.
        ids: the chunk's tokens.
        start: position of the first of them.
        final: the prompt ends with it.
        span: positions of the whole prompt.
        prompt: all its tokens, with its last chunk.
        targets: the tokens that follow those of the chunk, as far as the prompt has them.
    """

    slot: int = 0
    ids: Sequence[int] = ()
    start: int = 0
    final: bool = False
    span: int = 1
    prompt: Sequence[int] = ()
    targets: Sequence[int] = ()


def put_slot_chunks(
    steps: Steps, chunks: Sequence[SlotChunk], size: int, *, scored: bool
) -> dict[str, DeviceTensor]:
    """Arguments of `slot_prefill`, of one chunk for each data shard."""

    def tokens(name: str) -> torch.Tensor:
        ids = torch.zeros(len(chunks), size, dtype=torch.long)
        for row, chunk in enumerate(chunks):
            given = getattr(chunk, name)
            ids[row, : len(given)] = torch.tensor(given, dtype=torch.long)
        return ids

    def column(name: str) -> torch.Tensor:
        return torch.tensor([getattr(chunk, name) for chunk in chunks], dtype=torch.int32)

    host = {
        "ids": tokens("ids"),
        "slot": column("slot"),
        "start": column("start"),
        "count": torch.tensor([len(chunk.ids) for chunk in chunks], dtype=torch.int32),
        "final": column("final").bool(),
        "prompted": prompt_counts([chunk.prompt for chunk in chunks], steps.plan.vocab),
    }
    if scored:
        host["targets"] = tokens("targets")
    given = put(steps, host)
    if steps.follows_span:
        given[SPAN] = steps.mesh.put(column("span"), STATE_AXES["slot"])
    return given


def host_params(rows: Sequence[RowSampling]) -> dict[str, torch.Tensor]:
    """The rows' sampling parameters as `[B]` host tensors, by the names that steps know."""

    def floats(name: str) -> torch.Tensor:
        return torch.tensor([float(getattr(row, name)) for row in rows], dtype=torch.float32)

    return {
        "temperature": floats("temperature"),
        "top_k": torch.tensor([min(row.top_k, 2**31 - 1) for row in rows], dtype=torch.int32),
        "top_p": floats("top_p"),
        "min_p": floats("min_p"),
        "penalty": floats("repetition_penalty"),
        "presence": floats("presence_penalty"),
        "frequency": floats("frequency_penalty"),
        "seed": torch.tensor([row.seed_word for row in rows], dtype=torch.int32),
    }


def bias_row(bias: TokenBias, hidden: Collection[int], vocab: int) -> torch.Tensor:
    """What is added to a request's logits, `[V]`, with some tokens hidden besides."""
    row = torch.zeros(vocab)
    if bias.allowed is not None:
        row.fill_(HIDDEN)[list(bias.allowed)] = 0.0
    row[list(bias.added)] += torch.tensor(list(bias.added.values()))
    row[list(hidden)] = HIDDEN
    return row


def slot_params(rows: Sequence[Choosing], live: Sequence[bool]) -> dict[str, torch.Tensor]:
    """What `steps.SLOT_PARAMS` names, as host tensors of all slots.

    Args:
        live: whose prompts have ended, so that they score none of its tokens.
    """
    tops = [
        row.tops if lives else max(row.tops, row.scored or 0)
        for row, lives in zip(rows, live, strict=True)
    ]
    return host_params([row.sampling for row in rows]) | {
        "biased": torch.tensor([row.bias is not None for row in rows]),
        "tops": torch.tensor(tops, dtype=torch.int32),
    }


def prompt_counts(prompts: Sequence[Sequence[int]], vocab: int) -> torch.Tensor:
    """`counts` of rows that have chosen nothing yet."""
    counts = torch.zeros(len(prompts), vocab, dtype=torch.int32)
    for row, prompt in enumerate(prompts):
        counts[row, list(prompt)] = 1
    return counts


def prompt_chunk(
    news: Sequence[Sequence[int]], starts: Sequence[int], size: int, index: int
) -> dict[str, torch.Tensor]:
    """Host arguments of one chunk of a prefill.

    Rows are filled up with id 0, at positions that are written again before anything sees them.

    Args:
        news: each row's new tokens.
        starts: the position of the first of them.
        size: tokens of a chunk.
        index: which chunk.
    """
    ids = torch.zeros(len(news), size, dtype=torch.long)
    first, parts = index * size, [new[index * size : (index + 1) * size] for new in news]
    begins, final = [], []
    for row, (new, start, part) in enumerate(zip(news, starts, parts, strict=True)):
        ids[row, : len(part)] = torch.tensor(part, dtype=torch.long)
        begins.append(start + (first if part else len(new)))
        final.append(bool(part) and len(new) <= first + size)
    return {
        "ids": ids,
        "start": torch.tensor(begins, dtype=torch.int32),
        "count": torch.tensor([len(part) for part in parts], dtype=torch.int32),
        "final": torch.tensor(final),
    }


def layout_of(name: str, shape: tuple[int, ...], plan: Plan) -> Layout:
    """How a tensor of the state is laid out; only heads and vocabulary depend on the plan.

    Args:
        shape: of the tensor on any mesh.
    """
    blocks = None
    if name.startswith("cache."):
        blocks = plan.cache_blocks()
    elif name in ("counts", "logits"):
        blocks = plan.vocab_blocks()
    if blocks is not None:
        shape = (shape[0], blocks.size, *shape[2:])
    axes = STATE_AXES.get(name, CACHE_AXES)
    return Layout(mesh=plan.mesh, shape=shape, axes=axes, blocks=blocks)
