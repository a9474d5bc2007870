"""File operations that fail during `parallama train`: a full disk, missing rights, a broken device.

The run ends and says what to do; when that is done, it goes on as if nothing had been.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import train_models
from kill_cases import forked
from messages import says
from test_checkpoints import ERRORS, mounted
from test_train_kill import logged, options

from parallama.train import checkpoints

STEPS, EVERY = 4, 2
SAVINGS = ("true", "false")  # asynchronous or not
NOBODY = 65534


@dataclass(frozen=True)
class Healthy:
    """A run in which nothing failed.

    Attributes:
        operations: those of its disk, where only one checkpoint is kept.
        saved: by step the hashes of the checkpoint's files.
        tensors: of the last.
    """

    model: str
    out: Path
    operations: list[str]
    saved: dict[int, dict[str, str]]
    tensors: dict[str, torch.Tensor]

    def options(self, out: Path, **keys: Any) -> list[str]:
        usual: dict[str, Any] = {
            "model": self.model,
            "data": "shipped:text",
            "steps": STEPS,
            "save_every": EVERY,
            "keep_last": 1,
            "cache": self.out.parent / "cache",
        }
        return options(**(usual | keys), out=out)

    def check(self, out: Path) -> None:
        """A run is this one: its log, its last checkpoint to the bit, and nothing beside it."""
        path = checkpoints.newest(out / "checkpoints")
        assert path is not None and path.name == checkpoints.name_of(STEPS)
        manifest = checkpoints.verify(path)
        tensors = dict(checkpoints.read_tensors(path, manifest))
        assert tensors.keys() == self.tensors.keys() and all(
            torch.equal(tensors[name], self.tensors[name]) for name in tensors
        )
        assert {name: entry.sha256 for name, entry in manifest.files.items()} == self.saved[
            STEPS
        ] and logged(out) == logged(self.out)
        assert {path.name for path in (out / "checkpoints").iterdir()} == {
            path.name,
            checkpoints.LATEST,
        }


def run_all(folder: Path, runs: list[dict[str, Any]], **more: Any) -> list[dict[str, Any]]:
    """Some commands in turn, in one process."""
    code = forked(
        "commands", folder / "output", runs=runs, found=str(folder / "found.json"), **more
    )
    said = (folder / "output").read_text()
    assert code == 0 and "Traceback" not in said, said
    return json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Healthy:
    root = tmp_path_factory.mktemp("healthy")
    made = Healthy(
        model=train_models.make(root / "model"),
        out=root / "run",
        operations=[],
        saved={},
        tensors={},
    )
    one, two = run_all(
        root,
        [{"options": made.options(root / "one")}, {"options": made.options(made.out, keep_last=2)}],
    )
    assert (one["code"], one["said"]) == (two["code"], two["said"]) == (0, "")
    made.operations.extend(one["operations"])
    for step in (EVERY, STEPS):
        path = made.out / "checkpoints" / checkpoints.name_of(step)
        manifest = checkpoints.verify(path)
        made.saved[step] = {name: entry.sha256 for name, entry in manifest.files.items()}
    made.tensors.update(dict(checkpoints.read_tensors(path, manifest)))
    made.check(root / "one")
    assert made.saved[EVERY] != made.saved[STEPS]
    return made


def check_failed(
    healthy: Healthy, out: Path, ended: dict[str, Any], code: int, at: int = -1
) -> None:
    """A run that could not save: what it said, and what it left.

    Without `at` it failed somewhere in the second checkpoint's files.
    """
    before, operation = healthy.operations[:at], healthy.operations[at]
    step = (
        STEPS if at < 0 else EVERY * [*before, operation].count("sync log.jsonl")
    )  # which begins a save
    whole = (
        [each for each in (EVERY, STEPS) if f"rename {checkpoints.name_of(each)}" in before]
        if at >= 0
        else [EVERY]
    )
    folder, parts = out / "checkpoints", [f"{str(out / 'log.jsonl')!r}"]
    if operation != "sync log.jsonl":
        kept = repr(str(folder / checkpoints.name_of(whole[-1]))) if whole else "no whole"
        parts = [f"step {step}", f"{str(folder)!r}", kept]
    assert ended["code"] == 1 and says(ended["said"], "parallama: ", *parts, *ERRORS[code]), ended
    assert (ended["newest"], ended["hashes"]) == (
        (checkpoints.name_of(whole[-1]), healthy.saved[whole[-1]]) if whole else (None, {})
    )
    assert not [name for name in ended["names"] if name.startswith(".")]


def fail_and_go_on(healthy: Healthy, folder: Path, cases: list[tuple[int, int, str]]) -> None:
    """For each case (operation, error, asynchronous saves) a run that fails, and the same again."""
    outs = [folder / f"{at}-{code}-{saving}" for at, code, saving in cases]
    given = [
        healthy.options(out, async_save=saving)
        for out, (_, _, saving) in zip(outs, cases, strict=True)
    ]
    failing = [
        {"options": options, "errno": code, "fail_at": at}
        for options, (at, code, _) in zip(given, cases, strict=True)
    ]
    ended = run_all(
        folder, [run for fails in failing for run in (fails, {"options": fails["options"]})]
    )
    for out, (at, code, _), failed, again in zip(outs, cases, ended[::2], ended[1::2], strict=True):
        check_failed(healthy, out, failed, code, at)
        assert (again["code"], again["said"]) == (0, "")
        healthy.check(out)


def test_whatever_fails_in_a_save_the_run_says_what_to_do_and_then_ends_as_if_nothing_had(
    healthy: Healthy, tmp_path: Path
) -> None:
    """The operations of the second save, each with one of the errors, in turns.

    Of its files one device's and the manifest's.
    """
    errors, second = list(ERRORS), healthy.operations.index("sync log.jsonl", 1)
    chosen = [
        at
        for at in range(second, len(healthy.operations))
        if "device-1" not in healthy.operations[at]
    ]
    cases = [(at, errors[number % 3], SAVINGS[number // 3 % 2]) for number, at in enumerate(chosen)]
    assert len(cases) >= 16 and len({case[1:] for case in cases}) == 6
    fail_and_go_on(healthy, tmp_path, cases)


@pytest.mark.slow
@pytest.mark.parametrize("saving", SAVINGS)
@pytest.mark.parametrize("code", ERRORS, ids=[errno.errorcode[code] for code in ERRORS])
def test_any_error_in_any_operation_of_two_saves(
    healthy: Healthy, tmp_path: Path, code: int, saving: str
) -> None:
    first = healthy.operations.index("sync log.jsonl")  # what is before is no save's
    every = range(first, len(healthy.operations))
    fail_and_go_on(healthy, tmp_path, [(at, code, saving) for at in every])


def test_on_a_disk_that_is_really_full_a_run_says_so_and_goes_on_when_there_is_room(
    healthy: Healthy, tmp_path: Path
) -> None:
    """The second checkpoint fits in part, or the last entry of the log is cut after a few bytes.

    The disk fills up after the third step; or no file may be larger.
    """
    with mounted(tmp_path, "-o", "size=3m"):
        runs = []
        for name, (saving, left) in {"async": ("true", 70_000), "sync": ("false", 16_000)}.items():
            given = healthy.options(tmp_path / name, async_save=saving)
            full = [
                "fill",
                str(tmp_path),
                left,
                str(tmp_path / name / "checkpoints" / checkpoints.LATEST),
            ]
            runs += [
                {"options": given, "after": 3, "then": full},
                {"options": given, "after": 0, "then": ["free", str(tmp_path)]},
            ]
        given, log = (
            healthy.options(tmp_path / "cut", async_save="false"),
            str(tmp_path / "cut" / "log.jsonl"),
        )
        runs += [
            {"options": given, "after": 3, "then": ["limit_files", log, 10]},
            {"options": given, "after": 0, "then": ["limit_files", None]},
        ]
        ended = run_all(healthy.out.parent, runs)
        for name, failed, again in zip(
            ("async", "sync", "cut"), ended[::2], ended[1::2], strict=True
        ):
            if name == "cut":
                assert failed["code"] == 1 and failed["hashes"] == healthy.saved[EVERY]
                assert says(failed["said"], repr(log), "File too large", "room"), failed
            else:
                check_failed(healthy, tmp_path / name, failed, errno.ENOSPC)
            assert (again["code"], again["said"]) == (0, "")
            healthy.check(tmp_path / name)


FULL_BEFORE = {
    "run": (0, "'{out}'"),
    "tokens": (12_000, "'{out}-cache/"),
    "config": (4096, "'{out}/config.yaml'"),
    "log": (8192, "'{out}/log.jsonl'"),
}
"""By what can't be written: how many bytes are left before the run, and what is named."""


def test_on_a_disk_that_is_full_before_a_run_or_behind_it_the_run_says_what_cannot_be_written(
    healthy: Healthy, tmp_path: Path
) -> None:
    """Behind it are the adapter and the model, which are written when there is room."""
    with mounted(tmp_path, "-o", "size=3m"):
        runs = []
        for name, (left, _) in FULL_BEFORE.items():
            keys = {"cache": tmp_path / "tokens-cache"} if name == "tokens" else {}
            runs.append(
                {
                    "options": healthy.options(tmp_path / name, **keys),
                    "after": 0,
                    "then": ["fill", str(tmp_path), left],
                }
            )
        out = tmp_path / "adapted"
        given = {
            export: healthy.options(out, **{"lora.rank": 2, "export": export})
            for export in ("true", "false")
        }
        runs.append({"options": given["false"], "after": 0, "then": ["free", str(tmp_path)]})
        runs += [
            {"options": given["true"], "after": 0, "then": ["fill", str(tmp_path), left]}
            for left in (4096, 40_000, 2_000_000)
        ]
        *early, whole, no_adapter, no_model, written = run_all(healthy.out.parent, runs)
        full = ("No space left on device", "room")
        for (name, (_, file)), ended in zip(FULL_BEFORE.items(), early, strict=True):
            assert ended["code"] == 1, ended
            assert says(ended["said"], file.format(out=tmp_path / name), *full), ended
        last = repr(str(out / "checkpoints" / checkpoints.name_of(STEPS)))
        for ended, what in ((no_adapter, "adapter"), (no_model, repr(str(out / "model")))):
            assert ended["code"] == 1 and says(ended["said"], what, last, *full), ended
        assert (whole["code"], written["code"], written["said"]) == (0, 0, "")
        assert {path.name for path in out.iterdir()} >= {"adapter", "model"} and not list(
            out.glob(".model*")
        )


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody without rights")
def test_where_the_right_to_write_is_taken_a_run_says_so_and_goes_on_when_it_is_back(
    healthy: Healthy, tmp_path: Path
) -> None:
    for folder in [tmp_path, *tmp_path.parents][:-1]:
        folder.chmod(folder.stat().st_mode | 0o055)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    os.chown(theirs, NOBODY, NOBODY)
    model = shutil.copytree(healthy.model, tmp_path / "model")
    for file in model.iterdir():
        file.chmod(0o644)
    runs = []
    for saving in SAVINGS:
        folder = theirs / saving / "checkpoints"
        given = healthy.options(
            theirs / saving, model=model, async_save=saving, cache=theirs / "cache"
        )
        taken = ["allow", str(folder), 0o555, str(folder / checkpoints.LATEST)]
        runs += [
            {"options": given, "after": 3, "then": taken},
            {"options": given, "after": 0, "then": ["allow", str(folder), 0o755]},
        ]
    ended = run_all(theirs, runs, user=NOBODY)
    for saving, failed, again in zip(SAVINGS, ended[::2], ended[1::2], strict=True):
        check_failed(healthy, theirs / saving, failed, errno.EACCES)
        assert (again["code"], again["said"]) == (0, "")
        healthy.check(theirs / saving)
