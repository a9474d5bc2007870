"""Evaluating between steps: with programs that were made before the first step, and none later."""

from __future__ import annotations

import pytest
import train_data
from reference import TinyModels
from test_train_step import PADDED, devices
from workers import Workers


@pytest.mark.parametrize(
    "mesh", ["1x2", *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in ("1x1", "2x2"))]
)
def test_evaluation_compiled_before_the_first_step_sees_what_every_step_made(
    workers: Workers, models: TinyModels, mesh: str
) -> None:
    tiny = models(**PADDED | {"layers": 1})
    batch = train_data.random_batch((1, 2, 12), tiny.vocab)
    found = workers[devices(mesh)].call(
        "train_cases:evaluated_between_steps",
        model=tiny.folder,
        mesh=mesh,
        options={"batch_size": 2, "seq_len": 12},
        arrays=batch,
        lr=1e-2,
    )
    assert found["evaluated"][:3] == pytest.approx(found["stepped"], rel=1e-6)
    assert found["evaluated"][3] < found["stepped"][2] < found["stepped"][0]
    assert found["late"] == 0
