"""Model folders as people have them: pointers, wrapped names, byte order marks, wrong values."""

from __future__ import annotations

import codecs
import functools
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from broken_folders import (
    CONFIG,
    EMBEDDING,
    HEAD,
    INDEX,
    SINGLE,
    TOKENIZER_CONFIG,
    Q,
    Tensor,
    encode,
    good_tensors,
    make_good,
    make_sharded,
    random_tensor,
    save,
    write_json,
)
from forks import command
from messages import check_raised, check_refusal

from parallama.errors import CheckpointError
from parallama.files.config_json import read_config
from parallama.files.find import find
from parallama.model.families import FAMILIES
from parallama.model.spec import ModelSpec
from parallama.notices import say_once
from parallama.plan.make_plan import make_plan
from parallama.plan.mesh_shape import MeshShape
from parallama.plan.overrides import read_overrides
from parallama.prove.verification import verify
from parallama.sharded import stream
from parallama.train import yaml_config
from parallama.train.data_files import read_rows

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    b"size 4976698672\n"
)
TIED = CONFIG | {"tie_word_embeddings": True}


def everything(folder: Path) -> tuple[dict[str, torch.Tensor], Any]:
    """All that loading reads of a folder."""
    found = find(str(folder))
    return dict(found.tensors(found.spec)), found.tokenizer()


def check_refused(folder: Path, *parts: object) -> None:
    with pytest.raises(CheckpointError) as caught:
        everything(folder)
    check_raised(caught.value, 3, *parts)


# Files that hold something else than their name says.


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", SINGLE, "tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
        *("generation_config.json", "chat_template.jinja", INDEX, "merges.txt"),
    ],
)
def test_a_git_lfs_pointer_in_place_of_any_file_is_named_with_what_brings_the_file(tmp_path, name):
    (make_good(tmp_path / "model") / name).write_bytes(POINTER)
    check_refused(tmp_path / "model", name, "Git LFS pointer", "git lfs pull")


def test_one_shard_or_a_gguf_that_is_a_git_lfs_pointer_is_named(tmp_path):
    make_sharded(make_good(tmp_path / "model"))
    (tmp_path / "model" / "model-00002-of-00003.safetensors").write_bytes(POINTER)
    check_refused(tmp_path / "model", "model-00002-of-00003.safetensors", "git lfs pull")
    (tmp_path / "tiny.gguf").write_bytes(POINTER)
    check_refused(tmp_path / "tiny.gguf", "tiny.gguf", "git lfs pull")


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        (SINGLE, b"<!DOCTYPE html>\n<html><head>", "web page"),
        ("config.json", b"\n<html>", "web page"),
        ("config.json", b'<?xml version="1.0"?><Error><Code>AccessDenied', "server's answer"),
        ("config.json", b"Entry not found", "hub's refusal"),
        ("config.json", b'{"error":"Repository not found"}', "hub's refusal"),
        (SINGLE, b"Access to model org/name is restricted", "hub's refusal"),
        (SINGLE, b"../../.git/annex/objects/Wk/1", "git annex get"),
        (SINGLE, b"GGUF\3\0\0\0" + bytes(64), "GGUF"),
        (SINGLE, b"PK\3\4" + bytes(64), "torch.save"),
        ("tokenizer.json", b"\x1f\x8b\x08" + bytes(64), "gzip"),
        ("config.json", b"", "empty"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_holds_something_else_is_called_what_it_is(tmp_path, name, content, what):
    (make_good(tmp_path / "model") / name).write_bytes(content)
    check_refused(tmp_path / "model", name, what)


# Names and numbers of tensors.


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "_forward_module.", "module._orig_mod.", "model."]
)
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_a_prefix_that_all_names_share_is_left_out_and_said(tmp_path, caplog, prefix, sharded):
    expected, _ = everything(make_good(tmp_path / "plain"))
    wrapped = {f"{prefix}{name}": tensor for name, tensor in good_tensors().items()}
    folder = make_good(tmp_path / "wrapped", tensors=wrapped)
    if sharded:
        (folder / SINGLE).rename(folder / "model-00001-of-00001.safetensors")
        names = dict.fromkeys(wrapped, "model-00001-of-00001.safetensors")
        write_json(folder / INDEX, {"weight_map": names})
    found, _ = everything(folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert "prefix" in find(str(folder)).ignored[prefix]
    say_once.cache_clear()
    caplog.clear()
    find(str(folder))
    assert [record.getMessage().split()[0] for record in caplog.records] == [prefix]


def test_a_tied_model_that_was_saved_without_its_head_class_loads(tmp_path):
    """As `LlamaModel.save_pretrained` names them; transformers loads it, too."""
    tensors = good_tensors(TIED)
    expected, _ = everything(make_good(tmp_path / "whole", TIED, tensors))
    base = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    found, _ = everything(make_good(tmp_path / "base", TIED, base))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("rename", "parts"),
    [
        (lambda name: name.replace("layers.0.", "layers.0._orig_mod."), ("torch.compile",)),
        (lambda name: name.replace("layers.", "_fsdp_wrapped_module.layers."), ("FSDP",)),
        (lambda name: name.replace(".weight", ".base_layer.weight"), ("PEFT", "merge_and_unload")),
        (lambda name: f"base_model.model.{name}.x", ("PEFT", "merge_and_unload")),
        (lambda name: name.removeprefix("model."), ("without a head", "ForCausalLM")),
        (lambda name: f"module.{name}" if "layers.1" in name else name, ("DataParallel",)),
        (lambda name: name.replace("model.embed_tokens", "tok_embeddings"), ("Mistral",)),
    ],
    ids=["within", "FSDP", "LoRA within", "PEFT", "no head", "mixed", "Meta"],
)
def test_other_names_of_a_wrapper_say_which_it_is_and_what_to_save(tmp_path, rename, parts):
    tensors = {rename(name): tensor for name, tensor in good_tensors().items()}
    check_refused(make_good(tmp_path / "model", tensors=tensors), SINGLE, "unexpected", *parts)


@pytest.mark.parametrize("said", [None, False], ids=["absent", "false"])
def test_a_tied_model_whose_config_does_not_say_so_is_refused_with_the_key(tmp_path, said):
    config = {key: value for key, value in CONFIG.items() if key != "tie_word_embeddings"}
    config |= {} if said is None else {"tie_word_embeddings": said}
    tensors = good_tensors()
    tensors.pop(HEAD)
    folder = make_good(tmp_path / "model", CONFIG, tensors)
    write_json(folder / "config.json", config)
    check_refused(folder, HEAD, "tie_word_embeddings to true", "config.json")


def test_a_shard_without_tensors_and_one_that_is_missing_are_named(tmp_path):
    make_sharded(make_good(tmp_path / "model"))
    shard = tmp_path / "model" / "model-00002-of-00003.safetensors"
    save(shard, {})
    check_refused(tmp_path / "model", shard.name, "no tensors")
    (tmp_path / "model" / INDEX).unlink()
    check_refused(tmp_path / "model", shard.name, "no tensors")
    shard.unlink()
    check_refused(tmp_path / "model", "missing tensors", f"download {shard.name}")


# Byte order marks.


def with_mark(path: Path) -> None:
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())


def test_byte_order_marks_are_read_away_in_a_whole_folder_and_a_prompt(tmp_path):
    """One run: every text of the folder begins with one, and the prompt is UTF-16."""
    folder = make_good(tmp_path / "model")
    make_sharded(folder)
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            with_mark(path)
    prompt = tmp_path / "prompt.txt"
    prompt.write_bytes("a b c".encode("utf-16"))
    arguments = ["generate", str(folder), "--prompt-file", str(prompt), "--max-new-tokens", "1"]
    done = command([*arguments, "--chat", "--mesh", "1x1", "--json"], optimize=False)
    assert done.code == 0, done.err
    plain = make_good(tmp_path / "plain")
    _, tokenizer = everything(plain)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "a b c"}])["input_ids"]
    assert json.loads(done.out)["outputs"][0]["prompt"] == ids == [3, 4, 5]


def test_byte_order_marks_are_read_away_in_data_and_settings(tmp_path):
    for name, content in {
        "rows.jsonl": '{"text": "a b"}\n',
        "text.txt": "a b",
        "plan.yaml": "model.norm: replicate\n",
        "run.yaml": "lr: 0.5\n",
    }.items():
        (tmp_path / name).write_text(content)
        with_mark(tmp_path / name)
    for name in ("rows.jsonl", "text.txt"):
        (row,) = read_rows(tmp_path / name)
        assert row.document == {"text": "a b"}
    assert read_overrides(tmp_path / "plan.yaml") == {"model.norm": "replicate"}
    assert yaml_config.read_file(tmp_path / "run.yaml") == {"lr": 0.5}


# Values of the wrong type.


def edited(name: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        old = json.loads(path.read_text()) if path.exists() else {}
        write_json(path, old | values)

    return change


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("tokenizer_config.json", "model_max_length", "4096"),
        ("tokenizer_config.json", "model_max_length", []),
        ("tokenizer_config.json", "model_max_length", -1),
        ("tokenizer_config.json", "eos_token", 2),
        ("tokenizer_config.json", "bos_token", {"content": 1}),
        ("tokenizer_config.json", "pad_token", ["</s>"]),
        ("tokenizer_config.json", "add_bos_token", "true"),
        ("tokenizer_config.json", "add_eos_token", 1),
        ("tokenizer_config.json", "padding_side", "middle"),
        ("tokenizer_config.json", "tokenizer_class", 7),
        ("tokenizer_config.json", "chat_template", 7),
        ("tokenizer_config.json", "chat_template", [{"name": "default"}]),
        ("tokenizer_config.json", "added_tokens_decoder", [1]),
        ("tokenizer_config.json", "added_tokens_decoder", {"x": {"content": "a"}}),
        ("tokenizer_config.json", "added_tokens_decoder", {"1": {"content": 7}}),
        ("tokenizer_config.json", "extra_special_tokens", [7]),
        ("tokenizer_config.json", "model_input_names", None),
        ("special_tokens_map.json", "eos_token", 2),
        ("special_tokens_map.json", "additional_special_tokens", "x"),
        ("added_tokens.json", "<x>", "24"),
        ("added_tokens.json", "<x>", {"content": 7}),
    ],
    ids=str,
)
def test_a_value_of_the_wrong_type_in_a_tokenizers_file_is_named(tmp_path, name, key, value):
    folder = make_good(tmp_path / "model")
    edited(name, **{key: value})(folder)
    check_refused(folder, name, key, "expected")


def test_the_values_that_transformers_itself_writes_are_taken(tmp_path):
    """Of several releases: null, numbers as 1e30, lists and objects of added tokens."""
    token = {"__type": "AddedToken", "content": "</s>", "lstrip": False, "special": True}
    folder = make_good(tmp_path / "model")
    written = {
        **TOKENIZER_CONFIG,
        **{"bos_token": None, "eos_token": token, "model_max_length": 1e30},
        **{"extra_special_tokens": {}, "add_bos_token": False, "legacy": None},
        **{"added_tokens_decoder": {"2": token}, "clean_up_tokenization_spaces": False},
    }
    write_json(folder / "tokenizer_config.json", written)
    write_json(folder / "special_tokens_map.json", {"eos_token": token})
    write_json(folder / "added_tokens.json", {"</s>": 2})
    _, tokenizer = everything(folder)
    assert tokenizer.eos_token_id == 2


def test_a_wrong_value_ends_a_command_with_3_and_a_broken_tokenizer_json_is_named(tmp_path):
    folder = make_good(tmp_path / "model")
    edited("tokenizer_config.json", model_max_length="x")(folder)
    arguments = ["generate", str(folder), "--prompt", "a b", "--max-new-tokens", "1"]
    done = command([*arguments, "--mesh", "1x1"], optimize=False)
    check_refusal(done, 3, "tokenizer_config.json", "model_max_length", "'x'")
    edited("tokenizer_config.json", model_max_length=4)(folder)
    write_json(folder / "tokenizer.json", [])
    check_refused(folder, "tokenizer.json")


# Weights that are finite as they are stored.


@pytest.mark.parametrize("mesh", ["1x1", "1x2"])
@pytest.mark.parametrize(
    ("stored", "number", "dtype"),
    [("F64", -1e39, "float32"), ("F32", 3.4e38, "bfloat16"), ("F64", 1e300, "bfloat16")],
)
def test_weights_that_become_infinite_in_the_runs_dtype_are_refused(
    tmp_path, mesh, stored, number, dtype
):
    values = np.ones(8 * 8)
    values[37] = number
    tensors = good_tensors() | {Q: Tensor(stored, [8, 8], encode(values, stored))}
    found = find(str(make_good(tmp_path / "model", tensors=tensors)))
    plan = make_plan(found.spec, MeshShape.parse(mesh))
    (source,) = (each for each in found.sources(found.spec) if each.name == Q)
    cast = functools.partial(
        stream.parts, source, plan, getattr(torch, dtype), range(plan.mesh.devices)
    )
    with pytest.raises(CheckpointError) as caught:
        cast()
    check_raised(caught.value, 3, SINGLE, Q, f"infinity in {dtype}", "1 of ", "--allow-nonfinite")
    assert sum(int(part.isinf().sum()) for part in cast(allow_nonfinite=True).values()) == 1
    told = verify(str(tmp_path / "model")).findings
    assert [finding.check for finding in told] == ["tensors"] * (stored == "F64")


# Configs that contradict themselves.

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            ("architectures", "model_type is 'llama'", "LlamaForCausalLM"),
        ),
        (
            {"architectures": ["Qwen2ForCausalLM"]},
            ("architectures", "model_type is 'llama'", "model_type to 'qwen2'"),
        ),
        ({"architectures": ["LlamaModel"]}, ("architectures", "LlamaForCausalLM")),
        ({"architectures": ["LlamaForCausalLMEagle3"]}, ("Eagle3", "LlamaForCausalLM")),
        ({"architectures": "LlamaForCausalLM"}, ("architectures", "list of names")),
        ({"dtype": "bfloat16"}, ("dtype is 'bfloat16'", "torch_dtype is 'float32'")),
        (
            {"rope_parameters": {"rope_theta": 5e5}},
            ("rope_parameters.rope_theta is 500000.0", "rope_theta is 10000.0"),
        ),
        (
            {"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}},
            ("rope_scaling.rope_type is 'yarn'", "rope_parameters.rope_type is 'default'"),
        ),
        (
            {"rope_scaling": YARN, "rope_parameters": YARN | {"factor": 2.0}},
            ("rope_scaling.factor is 4.0", "rope_parameters.factor is 2.0"),
        ),
        (
            {"rope_scaling": YARN | {"type": "linear"}},
            ("rope_scaling.rope_type is 'yarn'", "rope_scaling.type is 'linear'"),
        ),
        (
            {"rope_scaling": YARN, "original_max_position_embeddings": 32},
            ("original_max_position_embeddings is 16", "is 32"),
        ),
        ({"rope_scaling": {"factor": 8.0}}, ("factor 8.0", "rope_type is missing", "yarn")),
        ({"rope_scaling": {"type": "default", "factor": 2}}, ("factor 2", "rope_type is default")),
        ({"rope_parameters": {"low_freq_factor": 4.0}}, ("low_freq_factor", "rope_type")),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 1000.0}},
            ("'dynamic'", "alpha 1000.0"),
        ),
        ({"tie_word_embeddings": 1}, ("tie_word_embeddings is 1", "true or false")),
        ({"rope_scaling": []}, ("rope", "[]")),
    ],
    ids=str,
)
def test_a_config_that_contradicts_itself_is_refused_with_both_keys(tmp_path, values, parts):
    folder = make_good(tmp_path / "model")
    write_json(folder / "config.json", CONFIG | values)
    check_refused(folder, "config.json", *parts)
    with pytest.raises(CheckpointError):  # `plan` takes it from there
        ModelSpec.from_config(read_config(str(folder)))


@pytest.mark.parametrize(
    "values",
    [
        {"architectures": None},
        {"architectures": []},
        {"architectures": ["LLaMAForCausalLM"]},
        {"architectures": ["FSDPLlamaForCausalLM"]},
        {"dtype": "float32", "torch_dtype": "torch.float32"},
        {"rope_scaling": None, "rope_parameters": {"rope_theta": 10000, "rope_type": "default"}},
        {"rope_scaling": {"type": "yarn"} | YARN, "rope_parameters": YARN | {"rope_theta": 1e4}},
    ],
    ids=str,
)
def test_a_config_that_says_the_same_twice_is_taken(tmp_path, values):
    folder = make_good(tmp_path / "model")
    plain, _ = everything(folder)
    write_json(folder / "config.json", CONFIG | values)
    tensors, _ = everything(folder)
    assert tensors.keys() == plain.keys()


def test_rotary_settings_of_both_spellings_are_put_together(tmp_path):
    """transformers reads one of the two objects alone, and would take theta for 10000."""
    folder = make_good(tmp_path / "model")
    values = {"rope_theta": None, "rope_scaling": YARN, "rope_parameters": {"rope_theta": 5e5}}
    write_json(folder / "config.json", CONFIG | values)
    found = find(str(folder)).config.rope_parameters
    assert found["rope_theta"] == 5e5 and YARN.items() <= found.items()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_familys_architecture_is_transformers_own(model_type):
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert FAMILIES[model_type].architecture == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]


# What training and downloads leave behind.


def test_an_embedding_of_more_tokens_names_the_key_of_the_config(tmp_path):
    tensors = good_tensors() | {name: random_tensor([26, 8]) for name in (EMBEDDING, HEAD)}
    folder = make_good(tmp_path / "model", tensors=tensors)
    check_refused(folder, EMBEDDING, "[26, 8]", "[24, 8]", "vocab_size to 26")


def test_tensors_that_zero_3_left_empty_are_known(tmp_path):
    tensors = good_tensors() | {Q: random_tensor([0])}
    check_refused(make_good(tmp_path / "model", tensors=tensors), Q, "ZeRO-3", "zero_to_fp32.py")


@pytest.mark.parametrize("end", ["qweight", "SCB", "weight_scale_inv", "weight.absmax"])
def test_tensors_of_a_quantization_that_the_config_hides_are_known(tmp_path, end):
    tensors = good_tensors() | {Q.replace("weight", end): random_tensor([3])}
    check_refused(make_good(tmp_path / "model", tensors=tensors), end, "quantized", "bfloat16")


def test_what_macos_and_a_download_leave_beside_the_weights_is_not_read(tmp_path):
    folder = make_good(tmp_path / "model")
    make_sharded(folder)
    (folder / INDEX).unlink()
    (folder / "._model-00001-of-00003.safetensors").write_bytes(b"\0\5\26\7Mac OS X")
    (folder / ".cache").mkdir()
    (folder / "model-00009.safetensors.incomplete").write_bytes(b"x")
    assert everything(folder)[0].keys() == good_tensors().keys()


def test_verify_finds_a_tokenizer_of_more_tokens_than_the_model_has(tmp_path):
    folder = make_good(tmp_path / "model")
    edited("tokenizer_config.json", pad_token="<pad>")(folder)
    (finding,) = verify(str(folder)).findings
    assert finding.check == "tokenizer" and "25 tokens, and the model 24" in finding.message


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ('{"a": 1,}', ("line 1",)),
        ('{\n  // comment\n  "a": 1}', ("line 2",)),
        ('<<<<<<< HEAD\n{"a": 1}', ("line 1",)),
        ('{"model_type": "llama", "num_attention_heads": NaN}', ("heads is nan",)),
    ],
    ids=["trailing comma", "comment", "merge marks", "NaN"],
)
def test_a_config_that_was_edited_by_hand_says_where_it_broke(tmp_path, content, parts):
    (make_good(tmp_path / "model") / "config.json").write_text(content)
    check_refused(tmp_path / "model", "config.json", *parts)


def test_a_config_without_a_type_and_a_folder_of_another_format_say_what_to_do(tmp_path):
    folder = make_good(tmp_path / "model")
    config = {key: value for key, value in CONFIG.items() if key != "model_type"}
    write_json(folder / "config.json", config)
    check_refused(folder, "model_type None", "set model_type to 'llama'", "LlamaForCausalLM")
    (folder / "config.json").rename(folder / "params.json")
    check_refused(folder, "no config.json", "params.json", "Mistral")


def test_a_tokenizer_that_lacks_a_file_or_a_package_says_which(tmp_path):
    folder = make_good(tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    check_refused(folder, str(folder), "no tokenizer.json")
    if importlib.util.find_spec("sentencepiece") is None:
        edited("tokenizer_config.json", tokenizer_class="LlamaTokenizer")(folder)
        (folder / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>\x15\0\0\0\0\x18\2")
        check_refused(folder, "tokenizer.model", "pip install sentencepiece")
    (folder / "tokenizer.model").write_bytes(b"")
    check_refused(folder, "tokenizer.model is empty")
