"""A model in the hub's own cache: blobs, refs, and a snapshot of relative links out of itself."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import forks
import pytest
from terminals import all_of

from parallama.prove.verification import verify

COMMAND = str(Path(sys.executable).with_name("parallama"))
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(folder: Path, home: Path) -> Path:
    """Lay a folder's files out as huggingface_hub does for `org/tiny`; the snapshot's folder."""
    repository = home / "hub" / "models--org--tiny"
    snapshot = repository / "snapshots" / COMMIT
    for made in (repository / "blobs", repository / "refs", snapshot):
        made.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for file in folder.iterdir():
        content = file.read_bytes()
        blob = repository / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / blob.name)
    return snapshot


@pytest.fixture(scope="module")
def home(models, tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("hub")
    cached(Path(models(heads=4, kv_heads=2, layers=1).folder), home)
    return home


def run(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, *arguments], capture_output=True, text=True, timeout=300, env=environment(home)
    )


def environment(home: Path) -> dict[str, str]:
    kept = {key: value for key, value in forks.environment().items() if key != "HF_HUB_CACHE"}
    return kept | {"HF_HOME": str(home)}


def test_a_model_of_the_hubs_cache_is_verified_by_its_id_and_by_its_folder(home):
    snapshot = home / "hub" / "models--org--tiny" / "snapshots" / COMMIT
    by_id, by_folder = run(home, "verify", "org/tiny", "--json"), verify(str(snapshot))
    assert by_id.returncode == 0, by_id.stderr
    assert json.loads(by_id.stdout)["passed"] and by_folder.passed
    assert json.loads(by_id.stdout)["tensors"] == by_folder.tensors > 10


def test_a_snapshot_that_links_to_another_repositorys_blobs_is_refused(models, tmp_path):
    snapshot = cached(Path(models(heads=4, kv_heads=2, layers=1).folder), tmp_path)
    other = tmp_path / "hub" / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    weights = snapshot / "model.safetensors"
    weights.resolve().rename(other / "weights")
    weights.unlink()
    weights.symlink_to(Path("../../../models--org--other/blobs/weights"))
    done = run(tmp_path, "verify", "org/tiny")
    assert done.returncode == 3
    assert "model.safetensors is a link to" in done.stdout + done.stderr


def test_a_model_of_the_hubs_cache_loads_by_its_id_with_a_bar_and_bytes_per_second_on_a_terminal(
    home,
):
    """On a pseudo-terminal, without a network; standard output stays a document."""
    ours, theirs = pty.openpty()
    few = ["--prompt-ids", "5,6,7", "--max-new-tokens", "2", "--mesh", "1x2", "--json"]
    with subprocess.Popen(
        [COMMAND, "generate", "org/tiny", *few],
        stdout=subprocess.PIPE,
        stderr=theirs,
        stdin=subprocess.DEVNULL,
        env=environment(home) | {"TERM": "xterm", "COLUMNS": "120"},
    ) as process:
        os.close(theirs)
        shown = all_of(ours)
        assert process.stdout is not None
        out = process.stdout.read()
        assert process.wait(60) == 0, shown
    told = json.loads(out)
    assert len(told["outputs"][0]["token_ids"]) == 2
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    loading = [line for line in re.split(r"[\r\n]", text) if line.strip().startswith("loading")]
    assert loading, text
    size = told["stats"]["load_bytes_read"] / 1000
    done, total = re.findall(r"([\d.]+)k/([\d.]+)k", loading[-1])[0]
    assert float(done) == float(total) == pytest.approx(size, rel=0.01)
    assert re.search(r"[\d.]+ ?[kMG]?B/s", loading[-1]), loading[-1]
