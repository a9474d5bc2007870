"""What is exported is what transformers loads, to the bit; a folder appears whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Done, command
from messages import check_refusal, says
from reference import TinyModels
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
)

from parallama.errors import CheckpointError, RunError, UsageError
from parallama.files import manifest
from parallama.files.checkpoint import SafetensorsFolder
from parallama.files.export import export_checkpoint, export_weights
from parallama.files.find import find
from parallama.prove.verification import verify


def assert_same(found: Any, expected: Any, dtype: torch.dtype | None = None) -> None:
    """Two transformers models have the same parameters, to the bit."""
    theirs = dict(expected.named_parameters())
    assert dict(found.named_parameters()).keys() == theirs.keys()
    for name, parameter in found.named_parameters():
        assert parameter.dtype == (dtype or theirs[name].dtype)
        assert torch.equal(parameter, theirs[name].to(parameter.dtype)), name


@pytest.mark.parametrize(
    "sizes",
    [
        {"heads": 9, "kv_heads": 3, "tied": True},
        {"family": "qwen2", "heads": 6, "kv_heads": 2, "hidden": 48},
        {"family": "qwen3", "heads": 5, "kv_heads": 1},
    ],
    ids=str,
)
def test_a_model_taken_off_eight_devices_is_what_transformers_loads_to_the_bit(
    tmp_path, models, workers, sizes
):
    """Head padding and repetition, padded intermediate and vocabulary, biases, ties."""
    tiny = models(**sizes)
    out = tmp_path / "out"
    told = workers[8].call("stream_cases:export", folder=tiny.folder, mesh="1x8", out=str(out))
    back = AutoModelForCausalLM.from_pretrained(out)
    assert_same(back, tiny.model)
    assert (
        back.lm_head.weight is back.model.embed_tokens.weight
    ) == tiny.model.config.tie_word_embeddings
    stored = load_file(out / "model.safetensors")
    assert ("lm_head.weight" in stored) != tiny.model.config.tie_word_embeddings
    assert told["parameters"] == sum(tensor.numel() for tensor in stored.values())
    configs = [
        AutoConfig.from_pretrained(folder).to_dict() | {"_name_or_path": ""}
        for folder in (out, tiny.folder)
    ]
    assert configs[0] == configs[1]
    assert sorted(told["files"]) == sorted(path.name for path in out.iterdir())


@pytest.fixture(scope="module")
def dressed(models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything.

    That is bf16 beside F16 and float32, tokenizer, chat template, generation config, keys that name
    code, and files of others.
    """
    folder = tmp_path_factory.mktemp("dressed")
    tiny = models(heads=4, kv_heads=2, vocab=49152, layers=1)
    shutil.copytree(tiny.folder, folder, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    kinds = {"up_proj": torch.float16, "norm": torch.float32}
    cast = {
        name: t.to(next((kind for part, kind in kinds.items() if part in name), torch.bfloat16))
        for name, t in tensors.items()
    }
    save_file(cast, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(
            config | {"dtype": "bfloat16", "auto_map": {"AutoConfig": "evil.Evil"}, "kept": 7}
        )
    )
    (folder / "generation_config.json").write_text(
        '{"eos_token_id": [2, 5], "do_sample": true, "top_k": 7}'
    )
    tokenizer = find("smollm2").tokenizer()
    assert tokenizer is not None
    tokenizer.save_pretrained(folder)
    (folder / "evil.py").write_text("raise SystemExit(9)")
    return folder


def test_everything_that_came_with_the_weights_is_in_the_folder(dressed, tmp_path):
    exported = export_checkpoint(find(str(dressed)), tmp_path / "out")
    assert exported.dtype == "mixed"
    stored, expected = (
        load_file(tmp_path / "out" / "model.safetensors"),
        load_file(dressed / "model.safetensors"),
    )
    assert stored.keys() == expected.keys()
    assert all(
        stored[name].dtype == tensor.dtype and torch.equal(stored[name], tensor)
        for name, tensor in expected.items()
    )
    for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (dressed / name).read_bytes(), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["kept"] == 7 and config["dtype"] == "bfloat16" and "auto_map" not in config
    assert not (tmp_path / "out" / "evil.py").exists()
    theirs, ours = (
        AutoTokenizer.from_pretrained(dressed),
        AutoTokenizer.from_pretrained(tmp_path / "out"),
    )
    messages = [{"role": "user", "content": "Hello"}]
    assert ours.apply_chat_template(messages, tokenize=False) == theirs.apply_chat_template(
        messages, tokenize=False
    )
    assert GenerationConfig.from_pretrained(tmp_path / "out").top_k == 7


def test_the_manifest_has_every_file_with_its_sha256(dressed, tmp_path):
    export_checkpoint(find(str(dressed)), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()} - {"manifest.json"}
    checked = manifest.check(tmp_path / "out")
    assert checked is not None and checked.keys() == names
    weights = tmp_path / "out" / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="SHA-256"):
        manifest.check(tmp_path / "out")


def test_chat_templates_beside_the_default_one_are_copied_and_stand_in_the_manifest(
    dressed, tmp_path
):
    folder = tmp_path / "model"
    shutil.copytree(dressed, folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(
        "{{ messages[0]['content'] }}!"
    )
    exported = export_checkpoint(find(str(folder)), tmp_path / "out")
    name = "additional_chat_templates/tool_use.jinja"
    assert name in exported.files
    checked = manifest.check(tmp_path / "out")
    assert checked is not None and name in checked
    messages = [{"role": "user", "content": "Hello"}]
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "out").apply_chat_template(
            messages, chat_template="tool_use", tokenize=False
        )
        == "Hello!"
    )
    assert verify(str(tmp_path / "out")).passed
    (tmp_path / "out" / name).write_text("{{ messages[0]['content'] }}?")
    found = verify(str(tmp_path / "out"))
    assert [finding.check for finding in found.findings] == [
        "manifest"
    ] and f"{name} has SHA-256" in found.findings[0].message


@pytest.mark.parametrize(
    "name",
    [
        "../out/config.json",
        "a/b",
        "additional_chat_templates/../config.json",
        "additional_chat_templates/a/b",
        "/etc/passwd",
    ],
)
def test_a_manifest_names_no_file_elsewhere(dressed, tmp_path, name):
    export_checkpoint(find(str(dressed)), tmp_path / "out")
    told = json.loads((tmp_path / "out" / "manifest.json").read_text())
    told["files"][name] = told["files"]["config.json"]
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match="leads out of the model folder"):
        manifest.check(tmp_path / "out")


def test_several_files_have_an_index_that_transformers_follows(models, tmp_path):
    tiny = models(heads=9, kv_heads=3)
    exported = export_checkpoint(find(tiny.folder), tmp_path / "out", shard_bytes=40_000)
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all(
        sum(t.nbytes for t in load_file(tmp_path / "out" / name).values()) <= 40_000
        for name in shards
    )
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * exported.parameters
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), tiny.model)
    SafetensorsFolder(tmp_path / "out")


def test_weights_are_cast_where_a_dtype_is_asked_for(models, tmp_path):
    tiny = models(heads=9, kv_heads=3)
    exported = export_checkpoint(find(tiny.folder), tmp_path / "out", dtype="bfloat16")
    assert exported.dtype == "bfloat16"
    back = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out"
    )  # transformers takes the dtype from the config
    assert_same(back, tiny.model, torch.bfloat16)


def test_a_gguf_becomes_a_folder_with_its_tokenizer_and_the_same_weights(tmp_path):
    source = find("smollm2")
    exported = export_checkpoint(source, tmp_path / "out")
    assert exported.dtype == "float32"
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    parameters = dict(back.named_parameters())
    for name, tensor in source.tensors(source.spec):
        assert torch.equal(parameters[name], tensor), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (
        config["architectures"] == ["LlamaForCausalLM"]
        and config["dtype"] == "float32"
        and config["tie_word_embeddings"] is True
    )
    theirs, ours = source.tokenizer(), AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "Jupiter's 79 moons — naïve?\n\tdef f(x): return x"
    assert theirs is not None and ours(text)["input_ids"] == theirs(text)["input_ids"]
    messages = [{"role": "user", "content": "Hello"}]
    assert ours.apply_chat_template(messages, tokenize=False) == theirs.apply_chat_template(
        messages, tokenize=False
    )
    assert back.generation_config.eos_token_id == 2
    checked = manifest.check(tmp_path / "out")
    assert checked is not None and "tokenizer.json" in checked


# Whole or not at all.


def test_nothing_is_left_where_an_export_ends_early(models, tmp_path):
    tiny = models(heads=9, kv_heads=3)
    source = find(tiny.folder)
    pairs = list(source.tensors(source.spec))

    def ends_early():
        yield from pairs[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_weights(ends_early(), source, tmp_path / "out", dtype=torch.float32)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_are_not_handed_back_unless_asked_for(models, tmp_path):
    source = find(models(heads=9, kv_heads=3).folder)
    pairs = {name: tensor.clone() for name, tensor in source.tensors(source.spec)}
    pairs["model.norm.weight"][3] = 1e30
    with pytest.raises(CheckpointError) as caught:
        export_weights(pairs.items(), source, tmp_path / "out", dtype=torch.float16)
    assert says(caught.value, "float16", "model.norm.weight", "infinity", "1 of 36 ")
    assert list(tmp_path.iterdir()) == []
    export_weights(
        pairs.items(), source, tmp_path / "out", dtype=torch.float16, allow_nonfinite=True
    )
    assert torch.isinf(load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"][3])


def test_a_folder_with_something_in_it_is_not_written_to(models, tmp_path):
    source = find(models(heads=9, kv_heads=3).folder)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    for name in ("full", "file"):
        with pytest.raises(UsageError) as caught:
            export_checkpoint(source, tmp_path / name)
        assert says(caught.value, str(tmp_path / name))
    export_checkpoint(source, tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"full", "file", "empty"}
    with pytest.raises(RunError, match="cannot be written"):
        export_checkpoint(source, tmp_path / "file" / "out")


def test_the_command_writes_the_folder_and_says_what_is_in_it(dressed, tmp_path):
    def run(to: str, *more: str) -> Done:
        return command(["export", str(dressed), str(tmp_path / to), *more])

    done = run("out", "--dtype", "float32", "--mesh", "1x2", "--json", "--quiet")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert told["dtype"] == "float32" and told["folder"] == str(tmp_path / "out")
    assert sorted(told["files"]) == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert told["bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert_same(
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
        AutoModelForCausalLM.from_pretrained(dressed, dtype=torch.float32),
    )
    exact = run("exact", "--mesh", "1x2", "--quiet")
    assert exact.code == 0 and "mixed" in exact.out
    expected = load_file(dressed / "model.safetensors")
    for name, tensor in load_file(tmp_path / "exact" / "model.safetensors").items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name
    check_refusal(run("out"), 2, "out", "not empty")
    check_refusal(run("other", "--dtype", "int4"), 2, "dtype 'int4'")
    assert not (tmp_path / "other").exists()


def test_a_config_is_what_it_was(models):
    """A config that has no file of its own says all that matters."""
    from parallama.files.export_configs import described

    config = LlamaConfig(
        hidden_size=24,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        vocab_size=50,
    )
    assert LlamaConfig.from_dict(described(config)).to_dict() == config.to_dict() | {
        "architectures": ["LlamaForCausalLM"]
    }
