"""Runs that go on with other settings, are measured in epochs, or don't begin at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import train_models
from checkpoint_cases import snapshot
from kill_cases import forked
from messages import check_raised, says

from parallama.errors import UsageError
from parallama.files.disk import RunLock
from parallama.train import checkpoints, resume
from parallama.train import settings as settings_of
from parallama.train.logs import read_log

STEPS = 20
USUAL: dict[str, Any] = {
    "model": "smollm2",
    "data": "shipped:chat",
    "out": "run",
    "steps": STEPS,
    "lr": 5e-4,
}


def checkpoint(folder: Path, step: int, **keys: Any) -> Path:
    """A checkpoint of a run with these settings."""
    settings = settings_of.make(USUAL | keys)
    about = {
        "settings": settings.to_dict(),
        "schedule": vars(settings.learning_rate(settings.steps or STEPS)),
    }
    made = snapshot(step)
    manifest = made.manifest.model_copy(update=about)
    written = checkpoints.Snapshot(manifest=manifest, parts=made.parts)
    return checkpoints.write(folder, written, keep_last=2)


def found(folder: Path, step: int, then: dict[str, Any], now: dict[str, Any]) -> resume.Resumed:
    path = checkpoint(folder, step, **then)
    settings = settings_of.make(USUAL | then | now | {"resume": str(path), "out": str(folder)})
    resumed = resume.find(settings, folder, lambda _line: None)
    assert resumed is not None
    return resumed


LORA = {"lora": {"rank": 4, "alpha": 8.0}}
CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "more steps of a run that was ended": ({}, {"steps": 40}),
    "fewer steps": ({}, {"steps": 15}),
    "learning rate": ({}, {"lr": 1e-3}),
    "schedule": ({}, {"schedule": "linear"}),
    "warm-up": ({}, {"warmup_steps": 3}),
    "floor": ({}, {"min_lr_ratio": 0.1}),
    "batch": ({}, {"batch_size": 8}),
    "micro-steps": ({}, {"grad_accum": 2}),
    "length": ({}, {"seq_len": 256}),
    "packing": ({}, {"packing": False}),
    "seed": ({}, {"seed": 7}),
    "optimizer": ({}, {"optimizer": "sgd"}),
    "decay": ({}, {"weight_decay": 0.1}),
    "dtype": ({}, {"dtype": "bfloat16"}),
    "samples": ({}, {"split_answers": True}),
    "the model beside adapters": (LORA, {"model": "elsewhere"}),
}


@pytest.mark.parametrize(("then", "now"), CHANGES.values(), ids=CHANGES)
def test_what_changes_the_steps_of_a_resumed_run_is_named_with_both_values(
    then: dict[str, Any], now: dict[str, Any], tmp_path: Path
) -> None:
    ((key, value),) = now.items()
    was = settings_of.make(USUAL | then).to_dict()[key]
    with pytest.raises(UsageError) as caught:
        found(tmp_path, 10, then, now)
    check_raised(
        caught.value, 2, "step-00000010", f"{key} is {value!r}, was {was!r}", "resume_with_changes"
    )
    assert found(tmp_path, 10, then, now | {"resume_with_changes": True}).manifest.step == 10


def test_all_changes_stand_in_one_message(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        found(tmp_path, 10, {}, {"lr": 1e-3, "seed": 7, "steps": 30, "batch_size": 8})
    check_raised(caught.value, 2, "lr is 0.001, was 0.0005", "seed is 7, was 0", "steps is 30")
    assert says(caught.value, "batch_size is 8, was 4")


def test_adapters_of_another_shape_are_refused_whatever_is_allowed(tmp_path: Path) -> None:
    others = ((LORA, {"lora": {"rank": 8, "alpha": 8.0}}), (LORA, {"lora": None}), ({}, LORA))
    for number, (then, now) in enumerate(others):
        with pytest.raises(UsageError) as caught:
            found(tmp_path / str(number), 10, then, now | {"resume_with_changes": True})
        check_raised(caught.value, 2, "adapters", "lora", "exported model")
    with pytest.raises(UsageError) as caught:
        found(tmp_path, 10, LORA, {"lora": {"rank": 4, "alpha": 16.0}})
    check_raised(caught.value, 2, "lora.alpha is 16.0, was 8.0", "resume_with_changes")


FREE: dict[str, dict[str, Any]] = {
    "mesh": {"mesh": "2x4"},
    "fsdp": {"fsdp": True},
    "remat": {"remat": "full"},
    "saving": {"save_every": 1, "keep_last": 5},
    "validation": {"eval_data": "shipped:text", "eval_every": 1},
    "a model that was moved": {"model": "elsewhere"},
    "data that were moved": {"data": "elsewhere.jsonl"},
}


@pytest.mark.parametrize("now", FREE.values(), ids=FREE)
def test_what_does_not_change_the_steps_of_a_run_may_change(
    now: dict[str, Any], tmp_path: Path
) -> None:
    assert found(tmp_path, 10, {}, now).manifest.step == 10


def test_other_data_are_refused_or_begin_anew(tmp_path: Path) -> None:
    """Moved files are the same data; others at the same place are not."""
    said: list[str] = []
    settings = settings_of.make(USUAL)
    resumed = found(tmp_path, 10, {}, {})
    resumed.check(settings, steps=STEPS, fingerprint="f")
    assert resumed.position(settings, "f", said.append).row == 10 and not said
    for data in ("shipped:chat", "shipped:text"):
        other = settings_of.make(USUAL | {"data": data})
        with pytest.raises(UsageError) as caught:
            resumed.check(other, steps=STEPS, fingerprint="g")
        check_raised(caught.value, 2, "data", f"'{data}'", "resume_with_changes")
    allowed = settings_of.make(USUAL | {"resume_with_changes": True, "seed": 3})
    resumed.check(allowed, steps=STEPS, fingerprint="g")
    for fingerprint in ("g", "f"):  # a seed makes another order of the same data
        position = resumed.position(allowed, fingerprint, said.append)
        assert (position.epoch, position.row) == (0, 0)
    assert all("data" in line and "seed" in line for line in said) and len(said) == 2


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_a_complete_run_that_is_made_longer_keeps_its_schedules_end(
    kind: str, tmp_path: Path
) -> None:
    said: list[str] = []
    then, longer = {"schedule": kind}, {"steps": 30}
    resumed = found(tmp_path, STEPS, then, longer)
    settings = settings_of.make(USUAL | then | longer)
    before = settings_of.make(USUAL | then).learning_rate(STEPS)
    schedule = resumed.schedule(settings, 30, said.append)
    assert [schedule(step) for step in range(30)] == [before(min(step, 19)) for step in range(30)]
    assert 0 < schedule(29) == before(19) < 1e-4
    (line,) = said
    assert "30" in line and "20" in line and "resume_with_changes" in line
    anew = settings_of.make(USUAL | then | longer | {"resume_with_changes": True})
    assert resumed.schedule(anew, 30, said.append)(20) == settings.learning_rate(30)(20) > 5e-5


def test_with_a_constant_rate_a_run_may_be_as_long_as_it_likes(tmp_path: Path) -> None:
    said: list[str] = []
    then = {"schedule": "constant"}
    for steps in (15, 40):
        resumed = found(tmp_path, 10, then, {"steps": steps})
        settings = settings_of.make(USUAL | then | {"steps": steps})
        assert resumed.schedule(settings, steps, said.append)(39) == 5e-4
    assert not said


def test_a_run_or_its_checkpoints_may_be_named_for_the_newest_of_them(tmp_path: Path) -> None:
    """And a run that is to go on, but is not there, says that it begins."""
    saved = tmp_path / "run" / "checkpoints"
    for step in (10, 12):
        path = checkpoint(saved, step)
    said: list[str] = []
    for named in (path, saved, tmp_path / "run", saved / "latest"):
        settings = settings_of.make(USUAL | {"resume": str(named), "out": str(tmp_path / "run")})
        resumed = resume.find(settings, saved, said.append)
        assert resumed is not None and resumed.manifest.step == 12
    assert not said
    other = settings_of.make(USUAL | {"resume": "auto", "out": str(tmp_path / "rum")})
    assert resume.find(other, tmp_path / "rum" / "checkpoints", said.append) is None
    (line,) = said
    assert "rum" in line


# -- runs

GO_ON = {
    "steps": 4,
    "seq_len": 64,
    "too_long": "truncate",
    "lr": 1e-2,
    "batch_size": 2,
    "resume": "auto",
    "export": "false",
}


def test_runs_go_on_with_changes_and_those_that_do_not_begin_leave_nothing(
    tmp_path: Path,
) -> None:
    """One process: a run, longer, with changes; then one of an epoch, and some that fail."""
    model = train_models.make(tmp_path / "model")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"row {at}" * 9}) + "\n" for at in range(9)))
    given = GO_ON | {"model": model, "data": data, "packing": "false", "cache": tmp_path / "cache"}

    def case(out: str, **keys: Any) -> list[str]:
        pairs = (given | {"out": tmp_path / out} | keys).items()
        return [part for key, value in pairs if value is not None for part in (f"--{key}", value)]

    runs = [
        case("run"),
        case("run", steps=6),
        case("run", steps=8),  # lengthened again, from what was lengthened
        case("run", steps=10, optimizer="sgd", seed=3, resume_with_changes="true"),
        case("epochs", steps=None, epochs=2),
        case("run", steps=12),  # optimizer and seed are those of the first run again
        case("deep/in/there", data="none.jsonl"),
        case("warm", steps=None, epochs=1, warmup_steps=99),
        case("late", sample_prompts="x" * 9999, sample_every=1),  # found behind the log
    ]
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "note.txt").write_text("mine")
    runs.append(case("kept", data="none.jsonl"))
    log, told = tmp_path / "output", tmp_path / "told.json"
    options = [{"options": [str(part) for part in each]} for each in runs]
    assert forked("commands", log, runs=options, found=str(told)) == 0, log.read_text()
    ended = json.loads(told.read_text())
    assert [each["code"] for each in ended] == [0, 0, 0, 0, 0, 2, 2, 2, 2, 2], ended
    rates = [entry["lr"] for entry in read_log(tmp_path / "run")]
    assert rates[3] == rates[4] == rates[5] == rates[6] == rates[7] > 0
    settings = settings_of.read(None, [str(part) for part in runs[3]])
    assert rates[8:] == [settings.learning_rate(10)(8), settings.learning_rate(10)(9)]
    entries = read_log(tmp_path / "run")
    assert entries[8]["epoch"] == 0 and len({entry["step"] for entry in entries}) == 10
    assert settings_of.read(tmp_path / "run" / "config.yaml").resume_with_changes is False
    # Nine rows, two a step: two epochs are nine steps.
    assert len(read_log(tmp_path / "epochs")) == 9
    assert settings_of.read(tmp_path / "epochs" / "config.yaml").epochs == 2.0
    assert says(ended[5]["said"], "optimizer is 'adamw', was 'sgd'", "seed is 0, was 3")
    assert {each.name for each in tmp_path.iterdir() if each.is_dir()} == {
        *("model", "cache", "run", "epochs", "kept")
    }
    assert [each.name for each in kept.iterdir()] == ["note.txt"]


def test_a_lock_whose_file_is_gone_is_made_anew(tmp_path: Path) -> None:
    """One that withdraws while another waits for its folder doesn't leave two in it."""
    first = RunLock(tmp_path / "run")
    first.withdraw()
    assert not (tmp_path / "run").exists()
    second = RunLock(tmp_path / "run")
    first.release()
    with pytest.raises(UsageError):
        RunLock(tmp_path / "run")
    second.release()
