"""Training that is killed, and goes on: it ends with the numbers of a run that never was killed.

Real processes, real signals.
"""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import train_models
from kill_cases import forked

from parallama.train import checkpoints
from parallama.train.logs import read_log

STEPS = 24
EVERY = 3
SAME = ("step", "loss", "lr", "grad_norm", "tokens", "target_tokens", "epoch")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return train_models.make(tmp_path_factory.mktemp("model"))


def options(model: str, out: Path, **keys: Any) -> list[str]:
    usual: dict[str, Any] = {
        "model": model,
        "data": "shipped:chat",
        "out": out,
        "steps": STEPS,
        "mesh": "1x2",
        "batch_size": 2,
        "grad_accum": 1,
        "seq_len": 160,
        "too_long": "truncate",
        "lr": 3e-3,
        "warmup_steps": 2,
        "save_every": EVERY,
        "cache": out.parent / "cache",
        "export": "false",
        "resume": "auto",
    }
    return [part for key, value in (usual | keys).items() for part in (f"--{key}", str(value))]


def logged(out: Path) -> list[list[Any]]:
    return [[entry[name] for name in SAME] for entry in read_log(out)]


def final(out: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The last checkpoint's tensors, and its files' hashes."""
    path = checkpoints.newest(out / "checkpoints")
    assert path is not None and path.name == checkpoints.name_of(STEPS)
    manifest = checkpoints.verify(path)
    return dict(checkpoints.read_tensors(path, manifest)), {
        name: entry.sha256 for name, entry in manifest.files.items()
    }


@pytest.fixture(scope="module")
def never_killed(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("never") / "run"
    log = out.parent / "output"
    assert forked("train", log, options=options(model, out, resume="no")) == 0, log.read_text()
    assert "late programs: 0" in log.read_text()
    assert [entry["step"] for entry in read_log(out)] == list(range(1, STEPS + 1))
    assert read_log(out)[-1]["loss"] < read_log(out)[0]["loss"] - 0.5
    return out


def killed_and_resumed(model: str, out: Path, kills: int, seed: int, operations: list[int]) -> int:
    """Kill a run until it has been killed so often; then let it end.

    By a timer at a random moment after some step, or before an operation of a save.
    """
    draw = random.Random(seed)
    log = out.parent / "output"
    done = 0
    for _ in range(kills):
        newest = checkpoints.newest(out / "checkpoints")
        step = int(newest.name[-8:]) if newest is not None else 0
        if step >= STEPS - EVERY:  # once more from nearer to the beginning
            for path in checkpoints.steps_in(out / "checkpoints")[: draw.randrange(1, 3)]:
                path.rename(out / "checkpoints" / f".old-{path.name}")
            newest = checkpoints.newest(out / "checkpoints")
            step = int(newest.name[-8:]) if newest is not None else 0
        saving = draw.choice(("true", "false"))
        how: dict[str, Any] = {
            "at_step": min(step + draw.randint(1, 2 * EVERY), STEPS - 1),
            "delay_s": draw.uniform(0.0001, 0.05),
        }
        if operations:
            how = {"kill_at": operations.pop()}
        code = forked("train", log, options=options(model, out, async_save=saving), **how)
        if code == 0:  # the run was at its end before the timer
            assert "at_step" in how
            continue
        assert code == -9, log.read_text()
        done += 1
        found = checkpoints.newest(out / "checkpoints")
        assert found is None or int(found.name[-8:]) >= step
    assert forked("train", log, options=options(model, out)) == 0, log.read_text()
    return done


def assert_same(out: Path, never_killed: Path) -> None:
    assert logged(out) == logged(never_killed)
    (ours, our_files), (theirs, their_files) = final(out), final(never_killed)
    assert ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )
    assert our_files == their_files


def test_killed_at_six_moments_a_run_ends_as_if_it_never_was(
    model: str, never_killed: Path, tmp_path: Path
) -> None:
    """Four kills are before operations of a save, one in each of its parts; others at random."""
    total = len(json.loads((never_killed / "operations").read_text()))
    draw = random.Random(1)
    operations = [draw.randrange(total // 16 * part) + 1 for part in (1, 2, 3, 4)]
    done = killed_and_resumed(model, tmp_path / "run", 6, 7, operations)
    assert done >= 5
    assert_same(tmp_path / "run", never_killed)


@pytest.mark.slow
def test_killed_at_fifty_moments_a_run_ends_as_if_it_never_was(
    model: str, never_killed: Path, tmp_path: Path
) -> None:
    done = killed_and_resumed(model, tmp_path / "run", 56, 11, [])
    assert done >= 50
    assert_same(tmp_path / "run", never_killed)


@pytest.mark.slow
def test_killed_before_every_operation_of_a_save_a_run_ends_as_if_it_never_was(
    model: str, never_killed: Path, tmp_path: Path
) -> None:
    every = json.loads((never_killed / "operations").read_text())
    last = len(every) - 1 - every[::-1].index(f"rename {checkpoints.name_of(2 * EVERY)}")
    for at in range(last + 8):  # the first two saves
        out = tmp_path / str(at) / "run"
        log = tmp_path / "output"
        out.parent.mkdir()
        assert forked("train", log, options=options(model, out), kill_at=at) == -9, log.read_text()
        assert forked("train", log, options=options(model, out)) == 0, log.read_text()
        assert_same(out, never_killed)


def test_on_sigterm_a_run_saves_at_the_next_step_and_goes_on_on_any_mesh(
    model: str, never_killed: Path, tmp_path: Path
) -> None:
    """1x8 (padded and repeated heads), then 2x4, then 1x1: the parameters are the same to the bit.

    The losses are those of the run on 1x2.
    """
    out, log = tmp_path / "run", tmp_path / "output"
    for mesh, more, at_step in (("1x8", {}, 7), ("2x4", {"fsdp": "true"}, 16)):
        code = forked(
            "train",
            log,
            options=options(model, out, mesh=mesh, **more),
            at_step=at_step,
            send=signal.SIGTERM,
        )
        assert code == 143, log.read_text()
        saved = checkpoints.newest(out / "checkpoints")
        assert saved is not None and saved.name == checkpoints.name_of(at_step)
    moved = tmp_path / "moved"
    assert saved is not None
    code = forked(
        "train", log, options=options(model, moved, mesh="1x1", steps=16, resume=str(saved))
    )
    assert code == 0, log.read_text()
    (before, after) = (
        dict(checkpoints.read_tensors(path, checkpoints.verify(path)))
        for path in (saved, moved / "checkpoints" / saved.name)
    )
    assert before.keys() == after.keys() and all(
        torch.equal(before[name], after[name]) for name in before
    )
    assert forked("train", log, options=options(model, out, mesh="1x1")) == 0, log.read_text()
    ours, theirs = read_log(out), read_log(never_killed)
    assert [entry["step"] for entry in ours] == [entry["step"] for entry in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert (
            mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
            and mine["tokens"] == other["tokens"]
        )


@pytest.mark.parametrize("what", ["stop", "skip"])
def test_a_loss_that_is_no_number_is_found_within_its_step_and_never_saved(
    model: str, tmp_path: Path, what: str
) -> None:
    """A learning rate of 1e30 makes weights whose loss is no number."""
    out, log = tmp_path / "run", tmp_path / "output"
    code = forked(
        "train",
        log,
        options=options(
            model, out, lr="1e30", steps=4, warmup_steps=0, save_every=1, on_nonfinite=what
        ),
    )
    said, entries = log.read_text(), read_log(out)
    first = next(entry["step"] for entry in entries if entry.get("skipped"))
    assert entries[first - 1]["loss"] is None or entries[first - 1]["grad_norm"] is None
    newest = checkpoints.newest(out / "checkpoints")
    assert newest is not None
    if what == "stop":
        assert code == 1 and len(entries) == first
        assert newest.name == checkpoints.name_of(first - 1)
        assert all(part in said for part in (f"step {first}", "on_nonfinite", str(newest)))
    else:
        assert code == 0 and [entry["step"] for entry in entries] == [1, 2, 3, 4]
        assert all(entry.get("skipped") for entry in entries[first - 1 :])
        assert newest.name == checkpoints.name_of(4)
    tensors = dict(checkpoints.read_tensors(newest, checkpoints.verify(newest)))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
    assert float(tensors["step"]) == first - 1
