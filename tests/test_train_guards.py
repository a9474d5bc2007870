"""Guards of training: options that mean nothing, data that teach nothing, damaged checkpoints."""

from __future__ import annotations

import copy
import errno
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import train_models
from checkpoint_cases import snapshot, state
from forks import command
from kill_cases import counting
from test_checkpoints import _flip, names, read, same, two  # noqa: F401

from parallama.__main__ import run
from parallama.cli.train_options import AuditedStep, PlannedStep
from parallama.errors import CheckpointError, ParallamaError, RunError, UsageError
from parallama.train import checkpoints, resume, tokens
from parallama.train import settings as settings_of
from parallama.train.declared import declarations
from parallama.train.options import LoraOptions, StepOptions
from parallama.train.packing import Position, Rows, plan_rows
from parallama.train.records import DataError, Text
from parallama.train.row_forms import parse
from parallama.train.saver import Saver

LEAST = {"model": "smollm2", "data": "shipped:chat", "out": "run", "steps": 5}

# -- options

TRAINING = {
    "--fsdp": [],
    "--sequence-parallel": [],
    "--grad-accum": ["1"],
    "--remat": ["none"],
}
ONLY_PLANNED = {"--optimizer": ["adamw"], "--lora.rank": ["8"], "--lora.targets": ["q_proj"]}


@pytest.mark.parametrize("phase", ["decode", "prefill", "all"])
@pytest.mark.parametrize("option", TRAINING)
def test_audit_refuses_a_training_option_for_other_phases_even_at_its_default(
    capsys: pytest.CaptureFixture[str], phase: str, option: str
) -> None:
    assert run(["audit", "nowhere", "--phase", phase, option, *TRAINING[option]]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"parallama: {option} ") and "--phase train" in said


@pytest.mark.parametrize("option", TRAINING | ONLY_PLANNED)
def test_plan_refuses_a_training_option_without_train_even_at_its_default(
    capsys: pytest.CaptureFixture[str], option: str
) -> None:
    assert run(["plan", "smollm2", option, *(TRAINING | ONLY_PLANNED)[option]]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"parallama: {option} ") and "--train" in said


def test_plan_takes_targets_alone_for_adapters_of_the_declared_rank(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = []
    for given in (["--lora.targets", "q_proj"], ["--lora.targets", "q_proj", "--lora.rank", "8"]):
        assert run(["plan", "smollm2", "--train", *given, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["totals"]["train"])
    assert found[0] == found[1] and LoraOptions.rank == 8
    assert found[0]["gradient_bytes_per_device"] == 4 * 30 * 8 * (576 + 576)


@pytest.mark.parametrize(
    "option",
    ["--mesh 1x2", "--dtype bfloat16", "--repeats 3", "--backend cpu", "--allow-nonfinite"],
)
def test_bench_refuses_what_means_nothing_where_it_makes_a_checkpoint(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, option: str
) -> None:
    arguments = ["bench", str(tmp_path / "made"), "--make", "l200", *option.split()]
    assert run(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"parallama: {option.split()[0]} ") and "--make" in said
    assert not (tmp_path / "made").exists()


def test_prompts_without_samples_are_refused() -> None:
    with pytest.raises(UsageError, match="sample_prompts") as caught:
        settings_of.make(LEAST | {"sample_prompts": ["We"]})
    assert "sample_every" in str(caught.value)


def test_audit_takes_weights_that_are_not_finite_for_a_training_step_where_asked(
    tmp_path: Path,
) -> None:
    folder = Path(train_models.make(tmp_path / "nan"))
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    asked = ["audit", str(folder), "--phase", "train", "--seq", "8", "--json"]
    refused, taken = (command([*asked, *more]) for more in ([], ["--allow-nonfinite"]))
    assert refused.code == 3 and "model.norm.weight" in refused.err
    assert taken.code == 0, taken.err
    assert json.loads(taken.out)["passed"]


def test_the_options_of_a_step_are_declared_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Keys of a run, options of commands and their help all come from `StepOptions`."""
    declared = {each.name: each for each in declarations(StepOptions)}
    assert declared.keys() <= set(settings_of.keys())
    settings = settings_of.make(LEAST)
    assert settings.step_options == StepOptions()
    assert settings.to_dict().items() >= StepOptions().to_dict().items()
    for verb, group in (("audit", AuditedStep), ("plan", PlannedStep)):
        assert run([verb, "--help"]) == 0
        shown = "".join(capsys.readouterr().out.replace("│", "").split())
        for field in fields(group):
            name = field.name.replace("lora_", "")
            kind = LoraOptions if name != field.name else StepOptions
            (help_,) = (each.help for each in declarations(kind) if each.name == name)
            assert "".join(help_.split()) in shown, (verb, name)


WRONG = {
    "batch_size": 0,
    "grad_accum": 1.5,
    "seq_len": 1,
    "remat": "some",
    "fsdp": "yes",
    "dtype": "float16",
    "optimizer": "adam",
    "beta2": 1.0,
    "eps": float("nan"),
    "weight_decay": -1.0,
    "max_grad_norm": 0.0,
    "lora": 3,
}


@pytest.mark.parametrize("name", WRONG)
def test_a_step_and_a_run_refuse_the_same_values_with_the_same_words(name: str) -> None:
    said = []
    for make in (lambda given: StepOptions(**given), lambda given: settings_of.make(LEAST | given)):
        with pytest.raises(UsageError) as caught:
            make({name: WRONG[name]})
        said.append(str(caught.value).splitlines())
    assert name in said[0][0] and repr(WRONG[name]) in said[0][0]
    assert f"{name!r} is {WRONG[name]!r}" in said[1][0] and said[0][1] == said[1][1]


def test_the_command_line_starts_without_torch_or_pydantic() -> None:
    code = "import sys, parallama.cli; print({'torch', 'pydantic', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "set()\n", done.stderr


# -- shared configs


def test_models_of_one_checkpoint_have_configs_of_their_own(workers: Any, models: Any) -> None:
    tiny = models(heads=4, kv_heads=2, layers=1)
    found = workers[2].call("train_guard_cases:one_checkpoint", model=tiny.folder, mesh="1x2")
    assert found["same"] and not any(found["shared"])
    named = [found["served"], *found["trained"]]
    assert found["attention"] not in named and found["trained"][0] == found["trained"][1]
    assert found["served"] != found["trained"][0]


# -- data


@pytest.fixture(scope="module")
def without_eos() -> Any:
    """A tokenizer that adds nothing, and takes blanks from both ends of a text."""
    from tokenizers import normalizers

    made = train_models.tokenizer()
    made.backend_tokenizer.normalizer = normalizers.Strip()
    made.eos_token = None
    assert made.eos_token_id is None
    return made


@pytest.mark.parametrize(("text", "count"), [("a", 1), ("   ", 0)])
def test_a_text_without_a_token_to_predict_is_refused_with_its_place(
    without_eos: Any, tmp_path: Path, text: str, count: int
) -> None:
    with pytest.raises(DataError, match=f"here: none of its {count} tokens"):
        tokens.encode(Text(text=text, where="here"), without_eos)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": each}) + "\n" for each in ("fine text", text)))
    with pytest.raises(DataError) as caught:
        tokens.prepare([str(data)], without_eos, seq_len=16, cache=tmp_path / "cache")
    assert f"{data}:2" in str(caught.value) and caught.value.exit_code == 2
    assert not list((tmp_path / "cache").glob("*"))


def test_tokenized_data_that_teach_nothing_are_found_damaged(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"text": "one"}) + "\n" + json.dumps({"text": "two"}) + "\n")
    given: dict[str, Any] = {"seq_len": 16, "cache": tmp_path / "cache"}
    corpus = tokens.prepare([str(data)], train_models.tokenizer(), **given)
    folder = tmp_path / "cache" / corpus.fingerprint
    offsets = np.fromfile(folder / "offsets.bin", "<i8")
    trained = np.fromfile(folder / "trained.bin", "?")
    count = offsets[-1]
    for bounds, mask in (
        ([0, 1, count], trained),  # a document of one token
        ([0, count, count], trained),  # one of none
        ([0, count + 5, count], trained),  # one that goes back
        (offsets, np.zeros_like(trained)),  # nothing is trained on
        (offsets, np.arange(count) == 0),  # only what nothing precedes
    ):
        np.asarray(bounds, "<i8").tofile(folder / "offsets.bin")
        np.asarray(mask, "?").tofile(folder / "trained.bin")
        with pytest.raises(RunError, match="damaged") as caught:
            tokens.prepare([str(data)], train_models.tokenizer(), **given)
        assert str(folder) in str(caught.value)
    offsets.tofile(folder / "offsets.bin")
    trained.tofile(folder / "trained.bin")
    again = tokens.prepare([str(data)], train_models.tokenizer(), **given)
    assert (again.lengths == corpus.lengths).all()


@pytest.mark.parametrize("lengths", [[], [3, 0], [3, 9]])
def test_documents_that_no_row_can_hold_are_refused(lengths: list[int]) -> None:
    with pytest.raises(UsageError, match="8 tokens"):
        plan_rows(np.asarray(lengths, np.int64), 8, 0, 0)


def test_a_conversation_without_a_chat_template_is_refused_by_encode_itself() -> None:
    record = parse({"messages": [{"role": "assistant", "content": "x"}]}, "here")
    with pytest.raises(UsageError, match="data here is a conversation"):
        tokens.encode(record, train_models.tokenizer())


class OneDocument:
    lengths = np.asarray([4])

    def document(self, index: int) -> tuple[Any, Any]:
        return np.arange(4), np.ones(4, bool)


def test_a_place_behind_the_data_is_refused_before_the_first_step() -> None:
    with pytest.raises(CheckpointError, match="row 3"):
        Rows(OneDocument(), 8, position=Position(epoch=2, row=3))


# -- checkpoints


def test_a_damaged_checkpoint_never_takes_a_good_ones_place(two: Path) -> None:  # noqa: F811
    """Only its content is damaged: every file has its size."""
    _flip(two / "step-00000002" / "device-0.safetensors")
    checkpoints.write(two, snapshot(3), keep_last=2)
    assert {"step-00000001", "step-00000003", "latest"} <= names(two)
    _flip(two / "step-00000003" / "device-0.safetensors")
    assert checkpoints.newest(two) == two / "step-00000001"
    for step in (4, 5):  # once there are two good ones again, the rest goes
        checkpoints.write(two, snapshot(step), keep_last=2)
    assert names(two) == {"step-00000004", "step-00000005", "latest"}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_run_that_goes_on_keeps_the_good_ones_that_it_found(
    two: Path,  # noqa: F811
    asynchronous: bool,
) -> None:
    """The damaged one is newer than what the run goes on from."""
    checkpoints.write(two, snapshot(4), keep_last=3)
    _flip(two / "step-00000004" / "device-0.safetensors")
    saver = Saver(two, keep_last=2, asynchronous=asynchronous)
    saver.save(snapshot(3))
    saver.wait()
    assert {"step-00000002", "step-00000003"} <= names(two)
    saver.save(snapshot(4))  # the damaged one is written anew, and nothing of it stays
    saver.wait()
    assert names(two) == {"step-00000003", "step-00000004", "latest"}
    assert same(read(two / "latest"), state(4))


def test_what_is_said_to_be_whole_is_undamaged(two: Path) -> None:  # noqa: F811
    _flip(two / "step-00000002" / "device-1.safetensors")
    disk, _ = counting(None, errno.ENOSPC, 3)
    with pytest.raises(RunError) as caught:
        checkpoints.write(two, snapshot(3), keep_last=2, disk=disk)
    assert str(two / "step-00000001") in str(caught.value)
    assert "step-00000002" not in str(caught.value)


def test_a_damaged_newer_checkpoint_does_not_keep_a_run_from_an_older_one(
    two: Path,  # noqa: F811
) -> None:
    made = snapshot(1)
    now = settings_of.make(LEAST | {"resume": str(two / "step-00000001"), "out": str(two)})
    settings = made.manifest.model_copy(update={"settings": now.to_dict()})
    for path in checkpoints.steps_in(two):
        path.rename(two / f".old-{path.name}")
    checkpoints.clean(two)
    for step in (1, 2):
        manifest = snapshot(step).manifest.model_copy(update={"settings": settings.settings})
        parts = snapshot(step).parts
        checkpoints.write(two, checkpoints.Snapshot(manifest=manifest, parts=parts), keep_last=2)
    said: list[str] = []
    with pytest.raises(UsageError, match="step-00000002"):
        resume.find(now, two, said.append)
    _flip(two / "step-00000002" / "device-0.safetensors")
    found = resume.find(now, two, said.append)
    assert found is not None and found.path == two / "step-00000001"


def test_a_part_of_another_shape_is_refused_not_spread_out(two: Path) -> None:  # noqa: F811
    """A safetensors file and a manifest that agree, but with a number in place of a vector."""
    path = two / "step-00000002"
    file = path / "device-0.safetensors"
    held = safetensors.torch.load_file(file)
    held["adam.m.norm.weight"] = torch.zeros(1)
    safetensors.torch.save_file(held, file)
    from parallama.files.disk import sha256

    document = json.loads((path / "manifest.json").read_text())
    changed = copy.deepcopy(document)
    entry = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    changed["files"]["device-0.safetensors"] = entry
    (path / "manifest.json").write_text(json.dumps(changed))
    with pytest.raises(ParallamaError, match=r"adam\.m\.norm\.weight") as caught:
        read(path)
    assert caught.value.exit_code == 3 and "[5]" in str(caught.value)
