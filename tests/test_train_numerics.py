"""What a training step computes besides AdamW in float32: SGD, dropout of adapters, bfloat16."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import train_data
from reference import TinyModels, relative_l2
from test_plan import TINY
from test_train_step import PADDED, devices
from workers import Workers

from parallama.plan.make_plan import make_plan
from parallama.plan.mesh_shape import MeshShape
from parallama.train.layout import training_plan
from parallama.train.options import LoraOptions
from parallama.train.torch_xla.lora import Dropout

OPTIMIZE = True  # of the workers' programs

ONE_LAYER = PADDED | {"layers": 1}


@pytest.mark.parametrize(
    ("mesh", "momentum", "decay"),
    [
        ("1x2", 0.9, 0.1),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("2x2", 0.0, 0.1), ("1x1", 0.5, 0.0))
        ),
    ],
)
def test_sgd_is_torchs(
    workers: Workers, models: TinyModels, mesh: str, momentum: float, decay: float
) -> None:
    tiny = models(**ONE_LAYER)
    options = {
        "batch_size": 2,
        "seq_len": 12,
        "optimizer": "sgd",
        "momentum": momentum,
        "weight_decay": decay,
    }
    batches = [train_data.random_batch((1, 2, 12), tiny.vocab, seed) for seed in range(8)]
    found = workers[devices(mesh)].call(
        "train_cases:run",
        model=tiny.folder,
        mesh=mesh,
        options=options,
        batches=batches,
        lr=0.1,
        final=True,
    )
    plain = copy.deepcopy(tiny.model)
    optimizer = torch.optim.SGD(train_data.without_decay(plain, decay), lr=0.1, momentum=momentum)
    wanted = train_data.losses(plain, batches, optimizer)
    assert found["losses"] == pytest.approx([loss for loss, _ in wanted], rel=1e-5)
    for name, parameter in plain.named_parameters():
        moved = parameter.detach() - dict(tiny.model.named_parameters())[name].detach()
        assert (
            relative_l2(
                found["parameters"][name] - dict(tiny.model.named_parameters())[name].detach(),
                moved,
            )
            < 1e-4
        ), name


LORA = {
    "rank": 4,
    "alpha": 16.0,
    "targets": ("q_proj", "v_proj", "o_proj", "down_proj"),
    "dropout": 0.3,
}


def test_dropout_of_adapters_is_the_same_for_a_seed_on_every_mesh_and_off_in_evaluation(
    workers: Workers, models: TinyModels
) -> None:
    """Also where layers are run again for their backward pass, and with micro-steps."""
    tiny = models(**ONE_LAYER)
    batches = [train_data.random_batch((2, 2, 12), tiny.vocab, seed) for seed in range(4)]

    def run(
        mesh: str, case: str = "run", seed: int = 1, dropout: float = LORA["dropout"], **more: Any
    ) -> dict[str, Any]:
        options = {
            "batch_size": 2,
            "seq_len": 12,
            "grad_accum": 2,
            "lora": LORA | {"dropout": dropout},
        } | more
        return workers[devices(mesh)].call(
            f"train_cases:{case}",
            model=tiny.folder,
            mesh=mesh,
            options=options,
            batches=batches,
            lr=3e-2,
            seed=seed,
        )

    first = run("1x2", "dropped")
    assert first["losses"][0] == pytest.approx(
        first["evaluated_before"], rel=1e-5
    )  # adapters begin as zero: what is dropped doesn't show
    for mesh, more in (("1x2", {}), ("2x2", {"fsdp": True, "remat": "full"}), ("1x3", {})):
        again = run(mesh, **more)
        assert again["losses"] == (
            first["losses"] if mesh == "1x2" else pytest.approx(first["losses"], rel=1e-5)
        ), mesh
    for other in (run("1x2", dropout=0.0), run("1x2", seed=2)):
        assert (
            max(
                abs(mine / theirs - 1)
                for mine, theirs in zip(other["losses"], first["losses"], strict=True)
            )
            > 1e-3
        )
    # A trainer without dropout evaluates to the same with the trained adapters; a step doesn't.
    assert first["evaluated"] == first["evaluated_without_dropout"]
    assert abs(first["stepped"] / first["evaluated"] - 1) > 1e-3


def test_dropout_keeps_the_expectation_and_draws_anew_for_every_step_module_and_place() -> None:
    plan = make_plan(TINY, MeshShape())
    made = training_plan(plan, fsdp=False, lora=LoraOptions(targets=("q_proj", "v_proj")))
    here = torch.zeros(1, dtype=torch.int64)

    def kept(
        count: int, module: str = "model.layers.0.self_attn.q_proj", seed: int = 0
    ) -> np.ndarray:
        out = Dropout(0.3, seed, torch.tensor([float(count)]), here, here, made)(
            torch.ones(8, 64, TINY.hidden), module
        )
        assert set(out.unique().tolist()) == {0.0, float(torch.tensor(1.0) / (1 - 0.3))}
        return out.numpy()

    drawn = np.stack([kept(count) for count in range(16)])
    assert drawn.mean() == pytest.approx(1, abs=5 * (0.3 / 0.7 / drawn.size) ** 0.5)
    for axes in (
        (1, 2, 3),
        (0, 2, 3),
        (0, 1, 3),
        (0, 1, 2),
    ):  # of every step, row, position and feature
        means = drawn.mean(axis=axes)
        assert abs(means - 1).max() < 5 * (0.3 / 0.7 * means.size / drawn.size) ** 0.5
    others = [kept(1), kept(0, "model.layers.0.self_attn.v_proj"), kept(0, seed=1)]
    for other in (
        *others,
        np.roll(drawn[0], 1, axis=0),
        np.roll(drawn[0], 1, axis=1),
        np.roll(drawn[0], 1, axis=2),
    ):
        assert (
            abs(np.corrcoef((drawn[0] > 0).ravel(), (other > 0).ravel())[0, 1])
            < 5 / drawn[0].size ** 0.5
        )


@pytest.mark.parametrize(
    ("mesh", "more"),
    [
        ("2x2", {"fsdp": True, "sequence_parallel": True, "remat": "full"}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("1x1", {}), ("1x3", {"grad_accum": 2}), ("2x4", {"fsdp": True}))
        ),
    ],
)
def test_losses_in_bfloat16_are_near_those_in_float32(
    workers: Workers, models: TinyModels, mesh: str, more: dict[str, Any]
) -> None:
    tiny = models(**PADDED)
    micro_steps = more.get("grad_accum", 1)
    batches = [train_data.random_batch((micro_steps, 4, 12), tiny.vocab, 0) for _ in range(8)]
    options = {"batch_size": 4, "seq_len": 12} | more
    found = {
        dtype: workers[devices(mesh)].call(
            "train_cases:run",
            model=tiny.folder,
            mesh=mesh,
            options=options | {"dtype": dtype},
            batches=batches,
            lr=3e-3,
        )
        for dtype in ("float32", "bfloat16")
    }
    exact, rounded = (np.array(found[dtype]["losses"]) for dtype in ("float32", "bfloat16"))
    assert exact[-1] < exact[0] - 1 and (exact != rounded).all()
    assert abs(rounded / exact - 1).max() < 0.02
    assert found["bfloat16"]["norms"] == pytest.approx(found["float32"]["norms"], rel=0.05)
