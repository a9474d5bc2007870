"""`parallama train` on the command line: what it refuses before it compiles, and what it leaves."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import train_models
from forks import script
from kill_cases import forked
from messages import says

from parallama.__main__ import run
from parallama.train import settings as settings_of
from parallama.train.logs import read_log


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, the same without tokenizer and without chat template, and many wrong data."""
    root = tmp_path_factory.mktemp("train")
    train_models.make(root / "model")
    for name in ("bare", "plain"):
        train_models.make(root / name)
    for file in (
        *(root / "bare").glob("tokenizer*"),
        *(root / "bare").glob("*.jinja"),
        *(root / "plain").glob("*.jinja"),
    ):
        file.unlink()
    config = json.loads((root / "plain" / "tokenizer_config.json").read_text())
    (root / "plain" / "tokenizer_config.json").write_text(
        json.dumps({key: value for key, value in config.items() if key != "chat_template"})
    )
    train_models.make(root / "nan")
    weights = safetensors.torch.load_file(root / "nan" / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    safetensors.torch.save_file(
        weights, root / "nan" / "model.safetensors", metadata={"format": "pt"}
    )
    fine = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    for name, content in {
        "empty": "",
        "not-json": json.dumps(fine) + "\n{oh\n",
        "no-assistant": '{"messages": [{"role": "user", "content": "a"}]}\n',
        "number": '{"text": 5}\n',
        "long": json.dumps({"prompt": "a", "completion": "b" * 4000}) + "\n",
        "fine": json.dumps(fine) + "\n",
    }.items():
        (root / f"{name}.jsonl").write_text(content)
    (root / "old").mkdir()
    (root / "old" / "log.jsonl").write_text('{"step": 1}\n')
    (root / "file").write_text("")
    (root / "bad.yaml").write_text("model: [\n")
    (root / "plan.yaml").write_text("model.layers.*.mlp.sideways.weight: colwise\n")
    return root


BAD: dict[str, tuple[dict[str, str], int, tuple[str, ...]]] = {
    "unknown key": ({"lrr": "1"}, 2, ("'lrr'",)),
    "wrong type": ({"steps": "many"}, 2, ("'steps' is 'many'",)),
    "batch over data": ({"mesh": "3x1"}, 4, ("batch_size 4", "3 devices")),
    "unknown mesh": ({"mesh": "x"}, 2, ("mesh 'x'",)),
    "LoRA target": ({"lora.targets": "[head]"}, 2, ("targets are head",)),
    "no such model": ({"model": "ROOT/none"}, 3, ("none'",)),
    "no tokenizer": ({"model": "ROOT/bare"}, 2, ("tokenizer.json",)),
    "no chat template": ({"model": "ROOT/plain"}, 2, ("chat template",)),
    "no such data": ({"data": "ROOT/none.jsonl"}, 2, ("none.jsonl'",)),
    "unknown data set": ({"data": "shipped:cats"}, 2, ("'shipped:cats'",)),
    "no such data set": ({"data": "hf:ROOT/none:train"}, 2, ("none",)),
    "empty data": ({"data": "ROOT/empty.jsonl"}, 2, ("empty.jsonl",)),
    "a line that is no JSON": ({"data": "ROOT/not-json.jsonl"}, 2, ("not-json.jsonl:2",)),
    "no assistant": ({"data": "ROOT/no-assistant.jsonl"}, 2, ("assistant",)),
    "a number for text": ({"data": "ROOT/number.jsonl"}, 2, ("'text' is 5",)),
    "longer than the sequence": ({"data": "ROOT/long.jsonl"}, 2, ("seq_len is 64",)),
    "longer than the model": ({"seq_len": "4096"}, 4, ("seq_len is 4096",)),
    "a run that is there": ({"out": "ROOT/old"}, 2, ("old'",)),
    "out is a file": ({"out": "ROOT/file"}, 1, ("file'",)),
    "no checkpoint": ({"resume": "ROOT/model"}, 3, ("manifest.json",)),
    "a plan that matches nothing": ({"plan": "ROOT/plan.yaml"}, 2, ("sideways",)),
    "bad validation data": (
        {"eval_data": "ROOT/empty.jsonl", "eval_every": "1"},
        2,
        ("empty.jsonl",),
    ),
    "a fraction of tokens": ({"seq_len": "2048.5"}, 2, ("'seq_len' is 2048.5",)),
    "sequence parallelism": (
        {"sequence_parallel": "true", "seq_len": "63"},
        4,
        ("seq_len is 63", "multiple of 2"),
    ),
    "dropout of all": ({"lora.dropout": "1"}, 2, ("'lora.dropout' is 1",)),
    "weights that are not finite": (
        {"model": "ROOT/nan"},
        3,
        ("model.norm.weight", "NaN", "1 of 24 "),
    ),
}
ALL = """
import contextlib, io, json, sys
from parallama.__main__ import run
from parallama.engine.torch_xla.counters import compilations
ended = []
for arguments in json.load(sys.stdin):
    with contextlib.redirect_stderr(io.StringIO()) as err:
        ended.append([run(["train", *arguments]), err.getvalue()])
print(json.dumps([ended, compilations()]))
"""
"""Runs commands in one process, and counts what they compiled."""


def test_wrong_configs_and_data_are_errors_before_anything_is_compiled(folders: Path) -> None:
    usual = {"mesh": "1x2", "model": "ROOT/model", "data": "ROOT/fine.jsonl", "cache": "ROOT/cache"}
    usual |= {"steps": "2", "seq_len": "64"}
    cases = [[str(folders / "bad.yaml")]]
    for number, (keys, _, _) in enumerate(BAD.values()):
        given = {"out": f"ROOT/run-{number}"} | usual | keys
        parts = [part for key, value in given.items() for part in (f"--{key}", value)]
        cases.append([part.replace("ROOT", str(folders)) for part in parts])
    done = script(ALL, stdin=json.dumps(cases))
    assert done.code == 0, done.err[-3000:]
    (no_yaml, *ended), compiled = json.loads(done.out)
    assert no_yaml[0] == 2 and "bad.yaml" in no_yaml[1]
    for name, (_, code, parts), (found, said) in zip(BAD, BAD.values(), ended, strict=True):
        last = said[said.index("parallama: ") :]
        assert found == code and says(last, *parts), f"{name}: {found}, {said}"
        assert "Traceback" not in said and "fault of parallama" not in said, said
    assert compiled == 0
    assert not [path.name for path in folders.iterdir() if path.name.startswith("run-")]
    assert [path.name for path in (folders / "old").iterdir()] == ["log.jsonl"]


def test_weights_that_are_not_finite_are_trained_where_that_is_allowed(folders: Path) -> None:
    keys = {
        "model": folders / "nan",
        "data": folders / "fine.jsonl",
        "out": folders / "allowed",
        "steps": 1,
        "cache": folders / "cache",
    }
    log = folders / "allowed-output"
    given = [
        *(part for key, value in keys.items() for part in (f"--{key}", str(value))),
        "--allow-nonfinite",
        "--seq-len",
        "64",
    ]
    assert forked("train", log, options=given) == 1
    assert "RunError: step 1: loss nan" in log.read_text()


def test_help_names_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "--help"]) == 0
    words = set(re.findall(r"\w+(?:\.\w+)?", capsys.readouterr().out))
    assert set(settings_of.keys()) <= words and {"lora.rank", "lora.dropout"} <= words


def test_dump_config_round_trips_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        run(
            [
                "train",
                "--model",
                "smollm2",
                "--data",
                "[a, b]",
                "--out",
                "1e3",
                "--steps",
                "5",
                "--lora.rank",
                "4",
                "--dump-config",
            ]
        )
        == 0
    )
    first = capsys.readouterr().out
    (tmp_path / "run.yaml").write_text(first)
    assert run(["train", str(tmp_path / "run.yaml"), "--dump-config"]) == 0
    assert capsys.readouterr().out == first
    assert run(["train"]) == 2 and "there is no config" in capsys.readouterr().err


@pytest.fixture(scope="module")
def finished(folders: Path) -> Path:
    """A run with everything: adapters, validation, samples, TensorBoard."""
    out = folders / "everything"
    keys: dict[str, Any] = {
        "model": folders / "model",
        "data": ["shipped:chat", "shipped:text"],
        "out": out,
        "steps": 6,
        "mesh": "1x2",
        "seq_len": 160,
        "too_long": "drop",
        "lr": 1e-2,
        "lora.rank": 2,
        "eval_data": "shipped:text",
        "eval_every": 3,
        "eval_batches": 1,
        "sample_every": 3,
        "sample_prompts": ["We the People", "the"],
        "sample_tokens": 4,
        "report_to": ["tensorboard"],
        "cache": folders / "cache",
    }
    log = folders / "output"
    assert (
        forked(
            "train",
            log,
            options=[part for key, value in keys.items() for part in (f"--{key}", str(value))],
        )
        == 0
    ), log.read_text()
    assert "late programs: 0" in log.read_text()
    return out


def test_a_run_leaves_log_config_checkpoints_and_a_model_that_transformers_loads(
    finished: Path,
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    entries = read_log(finished)
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4, 5, 6]
    assert [("eval_loss" in entry, "samples" in entry) for entry in entries] == [
        (False, False),
        (False, False),
        (True, True),
    ] * 2
    assert (
        entries[5]["eval_loss"] < entries[2]["eval_loss"]
        and entries[0]["mfu"] > 0
        and len(entries[0]["bytes_per_device"]) == 2
    )
    assert [sample["prompt"] for sample in entries[2]["samples"]] == ["We the People", "the"]
    assert settings_of.read(finished / "config.yaml").steps == 6
    assert list((finished / "tensorboard").iterdir())
    model = AutoModelForCausalLM.from_pretrained(finished / "model")
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    assert model.config.vocab_size == train_models.VOCAB and tokenizer.chat_template
    assert {path.name for path in (finished / "adapter").iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
    }


def test_the_validation_loss_is_transformers_own_of_the_exported_model(finished: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from parallama.train.packing import Rows
    from parallama.train.tokens import prepare

    model = AutoModelForCausalLM.from_pretrained(finished / "model")
    settings = settings_of.read(finished / "config.yaml")
    corpus = prepare(
        ["shipped:text"],
        train_models.tokenizer(),
        seq_len=160,
        too_long="drop",
        cache=Path(settings.cache),
    )
    total, count = 0.0, 0
    with torch.no_grad():
        for row in Rows(corpus, 160, shuffle=False).take(4):
            for number in range(row.documents.max() + 1):
                ids = torch.from_numpy(row.ids[row.documents == number])[None]
                total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
                count += ids.shape[1] - 1
    last = read_log(finished)[-1]
    assert last["eval_tokens"] == count and last["eval_loss"] == pytest.approx(
        total / count, rel=1e-4
    )
