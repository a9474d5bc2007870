"""Broken and odd folders from the command line to the devices: exit code 3 and at most three lines, or a run; no traceback, no hang."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from broken_folders import CASES, make

COMMAND = str(Path(sys.executable).with_name("parallama"))


def generate(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("PJRT_", "XLA_", "CPU_NUM_", "TF_CPP_"))
    }
    command = [
        COMMAND,
        "generate",
        str(folder),
        "--quiet",
        "--max-new-tokens",
        "2",
        "--max-model-len",
        "32",
        *more,
    ]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=kept, stdin=subprocess.DEVNULL
    )


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("NaN in BF16", ("--prompt", "a b")),
        ("index names a FIFO", ("--prompt", "a b")),
        ("chat template loops for ever", ("--prompt", "a b", "--chat")),
    ],
)
def test_a_broken_folder_ends_the_command_with_3(name, more, tmp_path):
    case = make(name, tmp_path / "model")
    done = generate(tmp_path / "model", *more)
    said = done.stderr.splitlines()
    assert done.returncode == 3 and done.stdout == ""
    assert said[0].startswith("parallama: ") and len(said) <= 3
    assert all(part in done.stderr for part in CASES[name].says) and case.says


def test_weights_that_are_not_finite_load_where_that_is_allowed(tmp_path):
    make("NaN in F32", tmp_path / "model")
    done = generate(tmp_path / "model", "--prompt", "a b", "--allow-nonfinite", "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["outputs"][0]["token_ids"]) >= 1


def test_what_is_not_read_of_a_checkpoint_is_reported(tmp_path):
    make("inv_freq buffers", tmp_path / "model")
    document = json.loads(generate(tmp_path / "model", "--prompt", "a b", "--json").stdout)
    reason = "a table of rotary frequencies, which are computed from the config"
    assert document["ignored"] == [
        {"name": "model.layers.0.self_attn.rotary_emb.inv_freq", "reason": reason}
    ]
