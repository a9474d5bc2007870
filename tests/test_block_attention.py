"""The loop over the written part of a cache against attention written plainly, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from parallama.engine.torch_xla.block_attention import BLOCK, HIDDEN

OPTIMIZE = True  # of the workers' programs

ROWS, HEADS, GROUP, NEW, DIM = 2, 4, 2, 3, 8
LENGTH = BLOCK + 44  # the last block overlaps the one before it
STARTS = [[0, 0], [1, BLOCK], [LENGTH, 0], [BLOCK - 1, BLOCK + 1], [LENGTH - 1, 20]]


def plain(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int, window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one row `[K, M, D]`: attention, and which of its query rows `[M]` see anything."""
    place, position = torch.arange(LENGTH), start + torch.arange(GROUP * NEW) % NEW
    seen = (place < start)[None, :].expand(len(position), -1)
    if window is not None:
        seen = seen & (place[None, :] > position[:, None] - window)
    scores = (query.double() @ keys.double().transpose(1, 2)).masked_fill(~seen, -torch.inf)
    return torch.softmax(scores, -1) @ values.double(), seen.any(-1)


@pytest.mark.parametrize("mesh", ["1x1", "1x2", "2x2"])
@pytest.mark.parametrize("window", [None, 2, 40])
def test_one_program_attends_over_what_is_written_and_no_more(
    workers: Any, mesh: str, window: int | None
) -> None:
    torch.manual_seed(0)
    query = torch.randn(ROWS, HEADS, GROUP * NEW, DIM)
    keys, values = torch.randn(2, ROWS, HEADS, LENGTH, DIM)
    data, model = (int(size) for size in mesh.split("x"))
    parts = workers[data * model].call(
        "device_cases:attend",
        mesh=mesh,
        query=query,
        keys=keys,
        values=values,
        starts=STARTS,
        new=NEW,
        window=window,
    )
    for starts, (mixed, top, total) in zip(STARTS, parts, strict=True):
        for row, start in enumerate(starts):
            expected, sees = plain(query[row], keys[row], values[row], start, window)
            torch.testing.assert_close(
                (mixed[row] / total[row])[:, sees].double(), expected[:, sees], rtol=1e-5, atol=1e-6
            )
            assert bool((top[row][:, ~sees] == HIDDEN).all()) and bool(
                (top[row][:, sees] > HIDDEN).all()
            )


def test_row_maxima_are_those_of_floats_whatever_their_signs(workers: Any) -> None:
    torch.manual_seed(0)
    highest, smallest = torch.finfo(torch.float32).max, 1e-45
    special = [
        0.0,
        -0.0,
        smallest,
        -smallest,
        1.0,
        -1.0,
        highest,
        -highest,
        torch.inf,
        -torch.inf,
        HIDDEN,
    ]
    chosen = torch.tensor(special)[torch.randint(len(special), (40, 3))]
    for rows in (
        chosen,
        torch.randn(5, 300),
        torch.randn(5, 300).abs() * -1e30,
        torch.full((2, 17), -torch.inf),
    ):
        torch.testing.assert_close(
            workers[1].call("device_cases:row_maximum", rows=rows),
            rows.amax(-1, keepdim=True),
            rtol=0,
            atol=0,
        )
    with_nan = torch.tensor([[1.0, torch.nan, torch.inf]])
    assert bool(workers[1].call("device_cases:row_maximum", rows=with_nan).isnan())
