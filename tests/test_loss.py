"""The loss and its gradient are right over a large vocabulary, for a model sure of its tokens."""

from __future__ import annotations

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from workers import Workers

from parallama.engine.torch_xla.loss import next_token_loss, stretches

OPTIMIZE = True  # of the workers' programs


def sure(vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `[2, 5, V]` and ids.

    One id of each position has almost all of the probability, the others together 49,152 * e^-18.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab // 8, (2, 5), generator=generator)
    logits = 15 - 18 + 0.1 * torch.randn(2, 5, vocab, generator=generator)
    return logits.scatter_(2, ids.roll(-1, 1)[..., None], 15.0), ids


def exact(
    logits: torch.Tensor, ids: torch.Tensor, dtype: torch.dtype = torch.float64
) -> tuple[float, torch.Tensor]:
    """torch's own cross-entropy and its gradient."""
    given = logits.to(dtype, copy=True).requires_grad_()
    loss = torch.nn.functional.cross_entropy(given[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    assert given.grad is not None
    return float(loss.detach()), given.grad


@pytest.mark.parametrize(
    ("mesh", "devices", "vocab"),
    [("1x1", 1, 49152), ("1x2", 2, 49152), ("2x4", 8, 49152), ("1x2", 2, 49153)],
)
def test_the_tail_of_a_large_vocabulary_is_not_lost(
    workers: Workers, mesh: str, devices: int, vocab: int
) -> None:
    logits, ids = sure(vocab)
    found = workers[devices].call("loss_cases:on_devices", mesh=mesh, logits=logits, ids=ids)
    loss, gradient = exact(logits, ids)
    limit = 1e-3
    assert found["loss"] == pytest.approx(loss, rel=limit)
    assert reference.relative_l2(found["gradient"], gradient) < limit


def test_torchs_own_loss_in_float32_does_lose_it() -> None:
    """Should this fail, torch has become better, and the reference needs float64 no more."""
    logits, ids = sure(49152)
    assert reference.relative_l2(exact(logits, ids, torch.float32)[1], exact(logits, ids)[1]) > 1e-2
    ours = logits.clone().requires_grad_()
    next_token_loss(ours, ids).backward()
    assert ours.grad is not None and reference.relative_l2(ours.grad, exact(logits, ids)[1]) < 1e-3


@given(st.integers(1, 1 << 18), st.integers(1, 64))
def test_stretches_are_equal_and_none_crosses_devices(vocab: int, parts: int) -> None:
    count = stretches(vocab, parts)
    assert vocab % count == 0
    if vocab % parts == 0:
        assert count % parts == 0 and (count // parts) ** 2 <= vocab // parts


def test_vocabularies_of_known_models_are_cut_finely_enough() -> None:
    for vocab in (32000, 32768, 49152, 128256, 151936, 152064):
        for parts in (1, 2, 4, 8):
            assert vocab // stretches(vocab, parts) <= 2500
