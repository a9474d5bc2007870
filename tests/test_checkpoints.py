"""Training checkpoints: the order of their writing, and what a kill or an error leaves."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import laid_out, snapshot, state
from hypothesis import given, settings
from hypothesis import strategies as st
from kill_cases import counting, forked
from messages import check_raised, says

from parallama.errors import ParallamaError, RunError
from parallama.files.disk import RunLock
from parallama.plan import heads
from parallama.plan.mesh_shape import MeshShape
from parallama.plan.placement import Blocks
from parallama.train import checkpoints
from parallama.train.manifest import BlockRuns
from parallama.train.saver import Saver

ERRORS = {
    errno.ENOSPC: ("No space left on device", "make room", "--resume auto"),
    errno.EACCES: ("Permission denied", "writable", "--resume auto"),
    errno.EIO: ("Input/output error", "check the disk", "--resume auto"),
}
"""What is said of each: its cause, and what to do."""


def read(path: Path) -> dict[str, torch.Tensor]:
    return dict(checkpoints.read_tensors(path, checkpoints.verify(path)))


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        found[name].dtype == wanted[name].dtype and torch.equal(found[name], wanted[name])
        for name in found
    )


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A folder with the checkpoints of steps 1 and 2."""
    for step in (1, 2):
        checkpoints.write(tmp_path, snapshot(step), keep_last=2)
    return tmp_path


@pytest.mark.parametrize("mesh", ["1x1", "1x8", "2x4", "4x2", "8x1"])
def test_what_was_written_on_any_mesh_is_read_as_the_models_own_tensors(
    mesh: str, tmp_path: Path
) -> None:
    path = checkpoints.write(tmp_path, snapshot(3, MeshShape.parse(mesh)), keep_last=1)
    assert same(read(path), state(3))
    held = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    whole = sum(
        tensor.nbytes
        for tensor in (
            laid_out(
                state(3)["param.heads.weight"],
                snapshot(3).manifest.tensors["param.heads.weight"].blocks.blocks,
            ),
            *list(state(3).values())[1:],
        )
    )  # type: ignore[union-attr]
    assert (
        held < whole + 1000 * MeshShape.parse(mesh).devices
    )  # nothing stands there twice but headers


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(-1, 6), min_size=1, max_size=20))
def test_runs_of_blocks_are_the_blocks(sources: list[int]) -> None:
    blocks = Blocks(
        dim=1, block=3, sources=tuple(heads.EMPTY if source < 0 else source for source in sources)
    )
    assert BlockRuns.of(blocks).blocks == blocks


def test_a_checkpoint_is_written_in_the_order_that_makes_it_safe(two: Path) -> None:
    disk, done = counting(None)
    checkpoints.write(two, snapshot(3, MeshShape(data=1, model=2)), keep_last=2, disk=disk)
    files = ("device-0.safetensors", "device-1.safetensors", "manifest.json")
    assert done == [
        "make folder .saving-step-00000003",
        *(f"{operation} {file}" for file in files for operation in ("create", "write", "sync")),
        "sync folder .saving-step-00000003",
        "rename step-00000003",
        f"sync folder {two.name}",
        "link .saving-latest",
        "rename latest",
        f"sync folder {two.name}",
        "rename .old-step-00000001",
        "remove .old-step-00000001",
    ]
    assert names(two) == {"step-00000002", "step-00000003", "latest"}
    assert (two / "latest").resolve() == (two / "step-00000003").resolve()
    manifest = json.loads((two / "latest" / "manifest.json").read_text())
    assert {
        "step",
        "mesh",
        "data",
        "rng",
        "schedule",
        "settings",
        "plan",
        "versions",
        "tensors",
        "files",
    } <= set(manifest)


def test_killed_before_any_operation_of_a_save_a_whole_checkpoint_is_the_newest(
    two: Path, tmp_path: Path
) -> None:
    operations = 1
    kept: list[int] = []
    at = 0
    while at < operations:
        folder = tmp_path / f"killed-{at}"
        shutil.copytree(
            two, folder, symlinks=True, ignore=shutil.ignore_patterns("killed-*", "log")
        )
        if at == 0:
            code = forked("save", tmp_path / "log", folder=str(folder), step=3)
            assert code == 0, (tmp_path / "log").read_text()
            operations = len(json.loads((folder / "operations").read_text()))
            shutil.rmtree(folder)
            shutil.copytree(
                two, folder, symlinks=True, ignore=shutil.ignore_patterns("killed-*", "log")
            )
        code = forked("save", tmp_path / "log", folder=str(folder), step=3, kill_at=at)
        assert code == -9, (tmp_path / "log").read_text()
        newest = checkpoints.newest(folder)
        assert newest is not None
        step = int(newest.name[-1])
        assert step in (2, 3) and same(read(newest), state(step))
        assert checkpoints.is_whole((folder / "latest").resolve())
        kept.append(step)
        checkpoints.clean(folder)
        checkpoints.write(folder, snapshot(3), keep_last=2)
        checkpoints.write(folder, snapshot(4), keep_last=2)
        assert names(folder) == {"step-00000003", "step-00000004", "latest"} and same(
            read(folder / "latest"), state(4)
        )
        shutil.rmtree(folder)
        at += 1
    assert operations > 30 and kept == sorted(kept) and set(kept) == {2, 3}


@pytest.mark.parametrize("code", ERRORS, ids=[errno.errorcode[code] for code in ERRORS])
def test_an_error_at_any_operation_leaves_the_checkpoint_before_whole_and_says_what_to_do(
    code: int, two: Path, tmp_path: Path
) -> None:
    disk, done = counting(None)
    copy = shutil.copytree(
        two, tmp_path / "whole", symlinks=True, ignore=shutil.ignore_patterns("whole")
    )
    checkpoints.write(copy, snapshot(3), keep_last=2, disk=disk)
    for at in range(len(done)):
        folder = shutil.copytree(
            two,
            tmp_path / f"failed-{at}",
            symlinks=True,
            ignore=shutil.ignore_patterns("whole", "failed-*"),
        )
        disk, _ = counting(None, code, at)
        with pytest.raises(RunError) as caught:
            checkpoints.write(folder, snapshot(3), keep_last=2, disk=disk)
        newest = checkpoints.newest(folder)
        assert newest is not None and same(read(newest), state(int(newest.name[-1])))
        assert says(caught.value, "step 3", f"{str(folder)!r}", f"{str(newest)!r}", *ERRORS[code])
        assert not [name for name in names(folder) if name.startswith(".")]
        checkpoints.write(folder, snapshot(4), keep_last=2)
        assert same(read(folder / "latest"), state(4))


@contextlib.contextmanager
def mounted(folder: Path, *options: str) -> Iterator[None]:
    """A small file system of its own; where mounting is not allowed, the test is left out."""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no right to mount: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_on_a_disk_that_is_really_full_the_checkpoint_before_is_whole(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    with mounted(tmp_path / "full", "-o", "size=256k"):
        folder = tmp_path / "full" / "checkpoints"
        checkpoints.write(folder, snapshot(1), keep_last=2)
        room = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
        for left in range(0, 90_000, 6_000):  # so that it fills up in every file
            (tmp_path / "full" / "ballast").write_bytes(bytes(max(room - left, 0)))
            try:
                checkpoints.write(folder, snapshot(2), keep_last=2)
            except RunError as error:
                assert says(error, *ERRORS[errno.ENOSPC])
                assert (
                    left < 80_000
                    and same(read(checkpoints.newest(folder) or folder), state(1))
                    and names(folder) == {"step-00000001", "latest"}
                )
            else:
                assert left > 6_000 and same(read(folder / "latest"), state(2))
                break
        else:
            pytest.fail("it never fitted")


def test_where_files_may_not_grow_the_checkpoint_before_is_whole(two: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (700, before[1]))
        with pytest.raises(RunError, match=r"File too large[\s\S]*room"):
            checkpoints.write(two, snapshot(3), keep_last=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert same(read(checkpoints.newest(two) or two), state(2)) and names(two) == {
        "step-00000001",
        "step-00000002",
        "latest",
    }


def test_on_a_disk_that_may_only_be_read_the_checkpoint_before_is_whole(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    with mounted(tmp_path / "disk"):
        folder = tmp_path / "disk" / "checkpoints"
        checkpoints.write(folder, snapshot(1), keep_last=2)
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
        with pytest.raises(RunError) as caught:
            checkpoints.write(folder, snapshot(2), keep_last=2)
        assert says(caught.value, "Read-only file system", "step-00000001", "writable")
        assert same(read(folder / "latest"), state(1))
        with pytest.raises(RunError, match="Read-only file system"):
            RunLock(tmp_path / "disk" / "run")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody without rights")
def test_without_the_right_to_write_the_checkpoint_before_is_whole(
    two: Path, tmp_path: Path
) -> None:
    for folder in [two, *two.parents][:-1]:
        folder.chmod(folder.stat().st_mode | 0o055)
    code = forked("save", tmp_path / "log", folder=str(two), step=3, user=65534)
    said = (tmp_path / "log").read_text()
    assert code == 1
    assert all(part in said for part in ("step-00000002", *ERRORS[errno.EACCES]))
    assert same(read(two / "latest"), state(2))


DAMAGE: dict[str, tuple[Any, tuple[str, ...]]] = {
    "a bit flipped": (
        lambda path: _flip(path / "device-3.safetensors"),
        ("'device-3.safetensors'", "damaged"),
    ),
    "a file cut": (
        lambda path: os.truncate(path / "device-0.safetensors", 100),
        ("'device-0.safetensors'", "100 bytes"),
    ),
    "a file gone": (
        lambda path: (path / "device-1.safetensors").unlink(),
        ("'device-1.safetensors'", "missing"),
    ),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), ("manifest.json",)),
    "a torn manifest": (
        lambda path: os.truncate(path / "manifest.json", 300),
        ("manifest.json", "JSON"),
    ),
    "another format": (lambda path: _rewrite(path, format="x"), ("manifest.json", "'format'")),
    "another version": (lambda path: _rewrite(path, version=2), ("manifest.json", "'version'")),
    "an unknown key": (lambda path: _rewrite(path, more=1), ("manifest.json", "'more'")),
    "a file elsewhere": (
        lambda path: _rewrite(path, tensors={}, files={"../x": {"bytes": 1, "sha256": "0" * 64}}),
        ("'../x'", "missing"),
    ),
    "another mesh": (
        lambda path: _rewrite(path, mesh={"data": 3, "model": 5}),
        ("'param.heads.weight'", "[16, 16]", "['model', 'data']"),
    ),
    "a tensor of no file": (lambda path: _rewrite(path, files={}), ("'param.heads.weight'",)),
}


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _rewrite(path: Path, **changes: Any) -> None:
    document = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(document | changes))


@pytest.mark.parametrize(("damage", "parts"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_says_so_and_the_one_before_is_taken(
    damage: Any, parts: tuple[str, ...], two: Path
) -> None:
    damage(two / "step-00000002")
    with pytest.raises(ParallamaError) as caught:
        checkpoints.verify(two / "step-00000002")
    check_raised(caught.value, 3, *parts)
    said: list[str] = []
    newest = checkpoints.newest(two, said.append)
    assert newest == two / "step-00000001" and len(said) == 1
    checkpoints.write(two, snapshot(2), keep_last=2)  # and is replaced, when that step comes again
    assert same(read(two / "step-00000002"), state(2))


def test_saving_the_same_step_again_changes_nothing(two: Path) -> None:
    before = (two / "step-00000002" / "manifest.json").stat().st_mtime_ns
    (two / "latest").unlink()
    checkpoints.write(two, snapshot(2), keep_last=2)
    assert (two / "step-00000002" / "manifest.json").stat().st_mtime_ns == before and same(
        read(two / "latest"), state(2)
    )


def test_an_asynchronous_save_that_fails_is_heard_of_at_the_next_call(tmp_path: Path) -> None:
    disk, _ = counting(None, errno.ENOSPC, 3)
    saver = Saver(tmp_path / "checkpoints", keep_last=2, asynchronous=True, disk=disk)
    saver.save(snapshot(1))
    with pytest.raises(RunError, match="no whole checkpoint"):
        saver.wait()
    saver.check()  # once
    saver.save(snapshot(2))
    saver.save(snapshot(3))
    saver.wait()
    assert same(read(saver.path(3)), state(3)) and same(read(saver.path(2)), state(2))


def test_a_runs_folder_is_one_processs(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from parallama.files.disk import RunLock\n"
        "lock = RunLock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    other.stdout.close()
    with pytest.raises(ParallamaError) as caught:
        RunLock(tmp_path / "run")
    check_raised(caught.value, 2, other.pid)
    other.kill()
    other.wait()
    RunLock(tmp_path / "run").release()
