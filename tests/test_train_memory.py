"""What a training step takes on each device: predicted, and measured on devices and by XLA."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import train_data
from reference import TinyModels
from test_train_step import REPEATED, devices
from workers import Workers

WIDE = {
    "heads": 8,
    "kv_heads": 4,
    "head_dim": 32,
    "hidden": 256,
    "intermediate": 704,
    "vocab": 1024,
    "layers": 4,
}
SIZES = {"batch_size": 4, "seq_len": 128}


def working(auditors: Any, folder: str, mesh: str, **options: Any) -> tuple[int, int]:
    """Measured and predicted."""
    found = auditors("trained", folder, mesh, options=SIZES | options)
    assert found["passed"], found["findings"]
    return found["working_bytes"], found["predicted_working_bytes"]


def near(measured: int, predicted: int) -> bool:
    return 0.75 * predicted < measured < 1.25 * predicted


@pytest.mark.parametrize(
    "ways", [("none", "full"), pytest.param(("none", 2, "full"), marks=pytest.mark.slow)]
)
def test_activations_fall_with_rematerialization_as_predicted(
    auditors: Any, models: TinyModels, ways: tuple[Any, ...]
) -> None:
    folder = models(**WIDE).folder
    found = [working(auditors, folder, "1x1", remat=remat) for remat in ways]
    for (more, more_predicted), (less, less_predicted) in itertools.pairwise(found):
        assert less < more and near(more - less, more_predicted - less_predicted), found
    assert all(near(*each) for each in found), found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        ("1x1", {"grad_accum": 3}),  # one micro-step's activations, not three
        ("1x1", {"grad_accum": 2, "remat": "full"}),
        ("1x2", {"sequence_parallel": True, "remat": "full"}),
        ("2x2", {"fsdp": True}),
        ("2x2", {"fsdp": True, "grad_accum": 2}),
        ("2x2", {"lora": {"rank": 4}}),
    ],
)
def test_a_steps_working_memory_is_near_what_was_predicted(
    auditors: Any, models: TinyModels, mesh: str, options: dict[str, Any]
) -> None:
    found = working(auditors, models(**WIDE).folder, mesh, **options)
    assert near(*found), found


def check_growth(found: dict[str, int]) -> None:
    """Over ten steps the process grows by less than what one of them sets aside.

    Freed buffers that the next step's don't fit in would be added at every step.
    """
    assert found["activations"] > 100 << 20  # on each device
    assert found["growth"] < found["activations"], found


@pytest.mark.parametrize("mesh", [pytest.param("1x1", marks=pytest.mark.slow), "1x2"])
def test_the_process_does_not_grow_from_step_to_step(
    workers: Workers, models: TinyModels, mesh: str
) -> None:
    sizes = {"batch_size": 8, "seq_len": 256}
    batch = train_data.random_batch((1, 8, 256), WIDE["vocab"])
    check_growth(
        workers[devices(mesh)].call(
            "train_cases:grown",
            model=models(**WIDE).folder,
            mesh=mesh,
            options=sizes,
            arrays=batch,
            steps=20,
        )
    )


@pytest.mark.slow
def test_the_process_does_not_grow_where_a_buffer_is_a_gigabyte(
    workers: Workers, tmp_path: Path
) -> None:
    """With all blocks in one heap of glibc 2.36 it grew by 1.6 GB a step, at this size alone."""
    from parallama.bench.shapes import make

    make("l200", tmp_path / "l200")
    batch = train_data.random_batch((1, 4, 256), 30_000)
    sizes = {"batch_size": 4, "seq_len": 256}
    check_growth(
        workers[1].call(
            "train_cases:grown",
            model=str(tmp_path / "l200"),
            mesh="1x1",
            options=sizes,
            arrays=batch,
            steps=20,
        )
    )


def check_share(held: dict[str, Any], parts: int) -> None:
    """To the byte: of weights, gradients and both of AdamW's moments.

    Every device has its share of what is split, and all of what the plan says is whole.
    """
    wanted = held["split_bytes"] // parts + held["whole_bytes"]
    assert held["split_bytes"] % parts == 0 and held["whole_bytes"] < held["split_bytes"] / 100
    assert held["params"] == held["gradients"] == [wanted] * parts
    assert held["optimizer"] == [2 * wanted + 4] * parts
    assert (
        held["predicted"]["params"],
        held["predicted"]["optimizer"],
        held["predicted"]["gradients"],
    ) == (wanted, 2 * wanted + 4, wanted)


def test_with_fsdp_each_device_holds_its_share_to_the_byte(
    workers: Workers, models: TinyModels
) -> None:
    folder = models(**WIDE | {"layers": 1}).folder
    check_share(
        workers[8].call(
            "train_cases:held",
            model=folder,
            mesh="2x4",
            options={"batch_size": 2, "seq_len": 8, "fsdp": True},
        ),
        8,
    )


@pytest.mark.slow
def test_with_fsdp_each_device_holds_an_eighth_of_200_million_parameters(
    workers: Workers, tmp_path: Path
) -> None:
    from parallama.bench.shapes import make

    make("l200", tmp_path / "l200")
    check_share(
        workers[8].call(
            "train_cases:held",
            model=str(tmp_path / "l200"),
            mesh="2x4",
            options={"batch_size": 2, "seq_len": 8, "fsdp": True},
        ),
        8,
    )


def test_what_is_held_with_adapters_or_without_fsdp_is_predicted(
    workers: Workers, models: TinyModels
) -> None:
    folder = models(**REPEATED).folder
    for mesh, options in (
        ("1x4", {}),
        ("2x2", {"fsdp": True, "lora": {"rank": 2, "targets": ("q_proj", "o_proj")}}),
    ):
        held = workers[devices(mesh)].call(
            "train_cases:held",
            model=folder,
            mesh=mesh,
            options={"batch_size": 2, "seq_len": 8} | options,
        )
        for what in ("params", "optimizer", "gradients"):
            assert held[what] == [held["predicted"][what]] * 4, (mesh, what)
