"""Batches for tests of training, and what plain torch makes of them: no XLA in this process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

IGNORED = -100


def random_batch(
    shape: tuple[int, int, int], vocab: int, seed: int = 0, *, packed: bool = True
) -> dict[str, np.ndarray]:
    """`[A, B, S]`: two documents a row, padding and labels left out; or one document a row."""
    generator = np.random.default_rng(seed)
    length = shape[2]
    ids = generator.integers(0, vocab, shape)
    first, second = (length * 2 // 5, length * 5 // 6) if packed else (length, length)
    place = np.arange(length)
    documents = np.broadcast_to(
        np.where(place < first, 0, np.where(place < second, 1, -1)), shape
    ).copy()
    positions = np.broadcast_to(
        np.where(place < first, place, np.where(place < second, place - first, place - second)),
        shape,
    ).copy()
    kept = (
        (generator.random(shape) < 0.8) & (documents >= 0) if packed else np.ones(shape, dtype=bool)
    )
    return {
        "ids": ids,
        "labels": np.where(kept, ids, IGNORED),
        "positions": positions,
        "documents": documents,
    }


def documents_of(batch: dict[str, np.ndarray]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each document's ids and labels."""
    ids, labels, documents = (
        torch.from_numpy(batch[name]).flatten(0, 1) for name in ("ids", "labels", "documents")
    )
    for row in range(ids.shape[0]):
        for document in sorted(set(documents[row].tolist()) - {-1}):
            inside = documents[row] == document
            yield ids[row][inside], labels[row][inside]


def mean_loss(model: Any, batch: dict[str, np.ndarray]) -> torch.Tensor:
    """Every document on its own, without packing: the mean over all target tokens."""
    total, count = torch.zeros((), dtype=next(model.parameters()).dtype), 0
    for ids, labels in documents_of(batch):
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(
            logits, labels[1:], ignore_index=IGNORED, reduction="sum"
        )
        count += int((labels[1:] != IGNORED).sum())
    return total / count


def gradients(model: Any, batch: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Of every trained parameter, in the model's dtype."""
    model.zero_grad()
    mean_loss(model, batch).backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def losses(
    model: Any,
    batches: list[dict[str, np.ndarray]],
    optimizer: torch.optim.Optimizer,
    max_norm: float | None = 1.0,
) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step of a plain loop."""
    found = []
    for batch in batches:
        optimizer.zero_grad()
        loss = mean_loss(model, batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(
            model.parameters(), float("inf") if max_norm is None else max_norm
        )
        optimizer.step()
        found.append((float(loss.detach()), float(norm)))
    return found


def without_decay(model: Any, decay: float) -> list[dict[str, Any]]:
    """Parameter groups: matrices decay, norms and biases don't."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    return [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
