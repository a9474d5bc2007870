"""Broken and odd folders from the command line to the devices: a refusal, or a run; no hang."""

import json
from pathlib import Path

import pytest
from broken_folders import make
from forks import Done, command
from messages import check_refusal


def generate(folder: Path, *more: str) -> Done:
    few = ["--quiet", "--max-new-tokens", "2", "--max-model-len", "32"]
    return command(["generate", str(folder), *few, *more], optimize=False)


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
    assert case.says
    check_refusal(done, 3, *case.says)


def test_weights_that_are_not_finite_load_where_that_is_allowed(tmp_path):
    make("NaN in F32", tmp_path / "model")
    done = generate(tmp_path / "model", "--prompt", "a b", "--allow-nonfinite", "--json")
    assert done.code == 0, done.err
    assert len(json.loads(done.out)["outputs"][0]["token_ids"]) >= 1


def test_what_is_not_read_of_a_checkpoint_is_reported(tmp_path):
    make("inv_freq buffers", tmp_path / "model")
    document = json.loads(generate(tmp_path / "model", "--prompt", "a b", "--json").out)
    reason = "a table of rotary frequencies, which are computed from the config"
    assert document["ignored"] == [
        {"name": "model.layers.0.self_attn.rotary_emb.inv_freq", "reason": reason}
    ]
