"""`parallama verify` finds what loading would refuse, and what a manifest shows."""

import json
from pathlib import Path

import pytest
from broken_folders import CONFIG, Q, good_tensors, make, make_good, random_tensor, save
from forks import command
from messages import says

from parallama.__main__ import run
from parallama.errors import CheckpointError
from parallama.files import manifest
from parallama.prove.verification import verify


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_good(tmp_path / "model")


def findings(folder: Path) -> list[tuple[str, str]]:
    found = verify(str(folder))
    assert found.passed == (not found.findings)
    assert all(len(finding.message.splitlines()) <= 3 for finding in found.findings)
    return [(finding.check, finding.message.splitlines()[0]) for finding in found.findings]


def test_a_good_folder_is_sound(folder):
    manifest.write(folder, ["config.json", "model.safetensors"])
    found = verify(str(folder))
    assert found.to_dict() == {
        "model": str(folder),
        "model_type": "llama",
        "tensors": 21,
        "parameters": 1384,
        "dtypes": {"float32": 21},
        "ignored": [],
        "manifest_files": 2,
        "findings": (),
        "notes": (),
        "passed": True,
    }


def test_every_tensor_that_is_not_finite_is_found(folder):
    tensors = good_tensors()
    for name in (Q, "model.norm.weight"):
        tensors[name].data = b"\xff\xff\xff\x7f" * (len(tensors[name].data) // 4)
    save(folder / "model.safetensors", tensors)
    found = findings(folder)
    assert [check for check, _ in found] == ["tensors"] * 2
    for (_, message), name, count in zip(found, (Q, "model.norm.weight"), (64, 8), strict=True):
        assert says(message, "model.safetensors", name, "NaN", f"{count} of {count} ")


def test_every_file_that_is_not_as_its_manifest_says_is_found(folder):
    manifest.write(
        folder, ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    )
    (folder / "generation_config.json").write_text("{}", encoding="utf-8")
    tensors = good_tensors()
    tensors[Q] = random_tensor([8, 8], seed=7)
    save(folder / "model.safetensors", tensors, {"format": "pt"})
    (folder / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes() + b" ")
    assert [(check, message.split()[0]) for check, message in findings(folder)] == [
        ("manifest", "generation_config.json"),
        ("manifest", "model.safetensors"),
        ("manifest", "tokenizer.json"),
    ]


def test_what_is_not_read_is_listed_with_the_reason(tmp_path):
    make("inv_freq buffers", tmp_path / "model")
    document = verify(str(tmp_path / "model")).to_dict()
    reason = "a table of rotary frequencies, which are computed from the config"
    assert document["ignored"] == [
        {"name": "model.layers.0.self_attn.rotary_emb.inv_freq", "reason": reason}
    ]
    assert document["passed"]


@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("offsets overlap", "structure"),
        ("shape turned round", "structure"),
        ("dtype I32, of a number's size", "structure"),
        ("tied head that differs", "tensors"),
        ("tokenizer: an unknown model", "tokenizer"),
        ("config: eos_token_id is 24", "structure"),
    ],
)
def test_a_broken_folder_is_not_sound(name, check, tmp_path):
    case = make(name, tmp_path / "model")
    ((found, _),) = findings(tmp_path / "model")
    assert found == check
    assert case.says and says(verify(str(tmp_path / "model")).findings[0].message, *case.says)


def test_a_model_that_is_not_there_is_an_error():
    with pytest.raises(CheckpointError, match="is not there"):
        verify("/no/such/folder")


def test_the_command_says_what_is_wrong_and_exits_with_3(folder, capsys):
    manifest.write(folder, ["config.json"])
    assert run(["verify", str(folder)]) == 0
    shown = capsys.readouterr()
    assert says(shown.out, f"{folder}: sound", "llama", "21 tensors", "1,384", "manifest.json")
    (folder / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 25}), encoding="utf-8")
    assert run(["verify", str(folder)]) == 3
    shown = capsys.readouterr()
    assert "NOT SOUND" in shown.out and "- manifest: config.json" in shown.out
    assert "- structure: model.safetensors" in shown.out and "[24, 8]" in shown.out
    assert shown.err.startswith("parallama: ") and says(shown.err, folder, "2 finding")


def test_the_command_in_json_needs_no_devices(tmp_path):
    make("NaN in BF16", tmp_path / "model")
    done = command(["verify", str(tmp_path / "model"), "--json"])
    document = json.loads(done.out)
    assert done.code == 3 and not document["passed"]
    assert [finding["check"] for finding in document["findings"]] == ["tensors"]
    assert done.err.startswith("parallama: ") and says(done.err, "model.safetensors", Q, "NaN")
