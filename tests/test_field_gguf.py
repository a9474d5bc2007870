"""GGUF files as llama.cpp writes them: rotary scaling, ends of turns, and every other key."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from forks import command
from messages import check_raised
from reference import greedy, logits, make_model, random_ids
from transformers.convert_slow_tokenizer import bytes_to_unicode

from parallama.errors import CheckpointError
from parallama.files.find import find
from parallama.files.gguf_rope import _of_factors
from parallama.files.skeleton import to_host
from parallama.inference.sampling_defaults import with_defaults

Edit = Callable[[gguf.GGUFWriter], None]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


def factors_of(config: Any) -> torch.Tensor:
    """What llama.cpp's converter writes: how many times plain frequencies are the scaled ones."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, "cpu")
    theta, dim = config.rope_parameters["rope_theta"], config.head_dim
    plain = 1.0 / theta ** (torch.arange(0, dim, 2).float() / dim)
    return plain / scaled


def write(path: Path, model: Any, *edits: Edit, architecture: str = "llama") -> Path:
    """A model as llama.cpp's converter writes it."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            split = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
            tensor = split.transpose(1, 2).reshape(tensor.shape).contiguous()
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(theirs, tensor.float().numpy())
    for edit in edits:
        edit(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny(**more: Any) -> Any:
    return make_model(layers=1, **more)


def of_freqs(model: Any) -> Edit:
    factors = factors_of(model.config)
    return lambda writer: writer.add_tensor("rope_freqs.weight", factors.numpy())


def check_same_logits(path: Path, model: Any) -> None:
    """The file's model says what the model itself says, in transformers, to the bit."""
    ids = random_ids(1, 96, model.config.vocab_size)
    found = logits(to_host(find(str(path)), torch.float32), ids)
    assert torch.equal(found, logits(model, ids))


# Rotary embedding.


def test_rope_freqs_are_llama3s_factors_and_give_the_same_logits(tmp_path):
    model = tiny(rope_parameters=LLAMA3 | {"rope_theta": 5e5})
    path = write(tmp_path / "model.gguf", model, of_freqs(model))
    check_same_logits(path, model)
    assert find(str(path)).config.rope_parameters["rope_type"] == "llama3"


def test_a_gguf_with_rope_freqs_continues_on_a_mesh_as_the_same_safetensors(models, tmp_path):
    sizes: dict[str, Any] = {"layers": 1, "rope_parameters": LLAMA3 | {"rope_theta": 5e5}}
    model = models(**sizes)
    path = write(tmp_path / "model.gguf", model.model, of_freqs(model.model))
    prompt = random_ids(1, 80, model.vocab)[0].tolist()
    few = ["--prompt-ids", ",".join(map(str, prompt)), "--max-new-tokens", "6", "--mesh", "1x2"]
    done = command(["generate", str(path), *few, "--json"], optimize=False)
    assert done.code == 0, done.err
    assert json.loads(done.out)["outputs"][0]["token_ids"] == greedy(model.model, prompt, 6)[0]


@pytest.mark.parametrize(
    ("factor", "original", "theta", "head_dim"),
    [
        (8.0, 8192, 5e5, 128),  # Llama 3.1
        (32.0, 8192, 5e5, 64),  # Llama 3.2
        (4.0, 4096, 1e4, 96),
        (16.0, 131072, 1e6, 128),
        (8.0, 64, 5e5, 8),
        (8.0, 64, 1e4, 16),
    ],
)
def test_llama3s_numbers_are_found_from_its_factors(factor, original, theta, head_dim):
    rope = LLAMA3 | {"factor": factor, "original_max_position_embeddings": original}
    config = tiny(head_dim=head_dim, rope_parameters=rope | {"rope_theta": theta}).config
    factors = factors_of(config)
    found = _of_factors(factors.tolist(), theta, head_dim, 2048)
    assert found["rope_type"] == "llama3"
    if head_dim >= 64:
        assert found == rope
    config.rope_parameters = found | {"rope_theta": theta}
    torch.testing.assert_close(factors_of(config), factors, rtol=2e-5, atol=0)


def test_factors_that_llama3_does_not_make_are_used_as_they_are(tmp_path):
    longrope = {
        **{"rope_type": "longrope", "original_max_position_embeddings": 2048},
        **{"short_factor": [1.0, 3.0, 2.0, 5.0], "long_factor": [1.0, 3.0, 2.0, 5.0]},
    }
    model = tiny(rope_parameters=longrope | {"rope_theta": 1e4, "attention_factor": 1.0})
    factors = torch.tensor(longrope["short_factor"])
    check_same_logits(
        write(
            tmp_path / "model.gguf",
            model,
            lambda writer: writer.add_tensor("rope_freqs.weight", factors.numpy()),
        ),
        model,
    )


@pytest.mark.parametrize(
    ("rope", "edit"),
    [
        (
            {"rope_type": "linear", "factor": 2.0},
            lambda writer: (
                writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR),
                writer.add_rope_scaling_factor(2.0),
            ),
        ),
        (
            YARN | {"beta_fast": 16.0, "attention_factor": 1.5},
            lambda writer: (
                writer.add_rope_scaling_type(gguf.RopeScalingType.YARN),
                writer.add_rope_scaling_factor(4.0),
                writer.add_rope_scaling_orig_ctx_len(512),
                writer.add_rope_scaling_yarn_beta_fast(16.0),
                writer.add_rope_scaling_yarn_attn_factor(1.5),
            ),
        ),
        (
            {"rope_type": "default"},
            lambda writer: writer.add_tensor("rope_freqs.weight", torch.ones(4).numpy()),
        ),
    ],
    ids=["linear", "yarn", "ones"],
)
def test_the_converters_keys_of_a_scaling_give_the_same_logits(tmp_path, rope, edit):
    model = tiny(rope_parameters=rope | {"rope_theta": 1e4})
    check_same_logits(write(tmp_path / "model.gguf", model, edit), model)


# Ends of turns, and sampling.


def vocabulary(tokens: dict[int, str], size: int = 101) -> Edit:
    def edit(writer: gguf.GGUFWriter) -> None:
        texts = [tokens.get(number, f"t{number}") for number in range(size)]
        writer.add_token_list(texts)
        writer.add_token_types([3 if number in tokens else 1 for number in range(size)])

    return edit


@pytest.mark.parametrize(
    ("edits", "ids"),
    [
        ([lambda w: w.add_eos_token_id(5), lambda w: w.add_eot_token_id(7)], [5, 7]),
        (
            [
                lambda w: w.add_eos_token_id(5),
                lambda w: w.add_eot_token_id(7),
                lambda w: w.add_eom_token_id(9),
            ],
            [5, 7, 9],
        ),
        ([lambda w: w.add_eos_token_id(5), lambda w: w.add_eot_token_id(5)], 5),
        ([lambda w: w.add_eos_token_id(5), vocabulary({5: "</s>", 8: "<|im_end|>"})], [5, 8]),
        ([lambda w: w.add_eos_token_id(5), vocabulary({5: "<|im_end|>", 8: "<|x|>"})], 5),
        ([lambda w: w.add_eos_token_id(5)], 5),
    ],
    ids=["eot", "eot and eom", "the same", "by text", "another control token", "eos alone"],
)
def test_a_turn_ends_at_every_token_that_the_file_says(tmp_path, edits, ids):
    found = find(str(write(tmp_path / "model.gguf", tiny(), *edits)))
    assert found.generation["eos_token_id"] == ids


def test_a_chat_ends_at_the_files_end_of_turn(models, tmp_path):
    """The model's own third greedy token is made the end of a turn."""
    model = models(layers=1)
    prompt = [3, 4, 5, 6]
    told, _ = greedy(model.model, prompt, 4)
    end = told[2]
    assert end not in told[:2]
    path = write(
        tmp_path / "model.gguf",
        model.model,
        lambda writer: writer.add_eos_token_id(100 if end != 100 else 99),
        lambda writer: writer.add_eot_token_id(end),
    )
    few = ["--prompt-ids", ",".join(map(str, prompt)), "--max-new-tokens", "4", "--mesh", "1x1"]
    done = command(["generate", str(path), *few, "--json"], optimize=False)
    assert done.code == 0, done.err
    (output,) = json.loads(done.out)["outputs"]
    assert output["finish_reason"] == "stop" and output["token_ids"][:2] == told[:2]


def test_recommended_sampling_is_the_generation_config(tmp_path):
    path = write(
        tmp_path / "model.gguf",
        tiny(),
        lambda w: w.add_sampling_temp(0.5),
        lambda w: w.add_sampling_top_k(20),
        lambda w: w.add_sampling_penalty_repeat(1.25),
        lambda w: w.add_sampling_mirostat(2),
    )
    found = find(str(path))
    params = with_defaults(found.generation, {}, 0)
    assert (params.temperature, params.top_k, params.repetition_penalty) == (0.5, 20, 1.25)
    assert list(found.ignored) == ["general.sampling.mirostat"]


# Other keys.


@pytest.mark.parametrize(
    ("edit", "parts"),
    [
        (lambda w: w.add_expert_count(8), ("llama.expert_count is 8", "mixture of experts")),
        (lambda w: w.add_logit_scale(0.5), ("llama.logit_scale is 0.5",)),
        (lambda w: w.add_causal_attention(False), ("llama.attention.causal is False",)),
        (lambda w: w.add_attn_logit_softcapping(50.0), ("attn_logit_softcapping", "soft-capping")),
        (lambda w: w.add_pooling_type(gguf.PoolingType.LAST), ("llama.pooling_type",)),
        (lambda w: w.add_sliding_window(16), ("attention.sliding_window is 16", "safetensors")),
        (lambda w: w.add_type("adapter"), ("general.type is 'adapter'",)),
        (lambda w: w.add_uint16("split.count", 3), ("3 parts", "llama-gguf-split --merge")),
        (lambda w: w.add_string("llama.rope.scaling.type", "longrope"), ("'longrope'",)),
        (lambda w: w.add_rope_scaling_yarn_log_mul(0.1), ("yarn_log_multiplier",)),
        (lambda w: w.add_rope_scaling_factor(-2.0), ("rope.scaling.factor is -2.0",)),
        (lambda w: w.add_eot_token_id(101), ("eos_token_id is 101", "0 to 100")),
        (lambda w: w.add_sampling_temp(-1.0), ("temperature is -1.0",)),
        (lambda w: w.add_tensor("rope_freqs.weight", torch.ones(3).numpy()), ("3 numbers", "4")),
        (
            lambda w: w.add_tensor("rope_freqs.weight", torch.full((4,), 0.5).numpy()),
            ("rope_freqs.weight", "0.5"),
        ),
    ],
)
def test_a_key_that_asks_for_more_is_refused_by_its_name(tmp_path, edit, parts):
    path = write(tmp_path / "model.gguf", tiny(), edit)
    with pytest.raises(CheckpointError) as caught:
        find(str(path))
    check_raised(caught.value, 3, "model.gguf", *parts)


@pytest.mark.parametrize(
    ("architecture", "sizes"),
    [
        ("llama", {"attention_bias": True}),
        ("llama", {"mlp_bias": True, "head_dim": 12}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 12, "attention_bias": False}),
        ("qwen3", {"head_dim": 16}),
    ],
    ids=str,
)
def test_biases_and_heads_of_any_length_are_as_the_file_has_them(tmp_path, architecture, sizes):
    model = tiny(family=architecture, **sizes)
    path = write(tmp_path / "model.gguf", model, architecture=architecture)
    check_same_logits(path, model)


# Texts.


def bpe(way: str | None, *, add_bos: bool | None = None) -> Edit:
    """A byte-level vocabulary in which `12` and ` a` are tokens of their own."""

    def edit(writer: gguf.GGUFWriter) -> None:
        specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
        letters = list(bytes_to_unicode().values())
        writer.add_tokenizer_model("gpt2")
        if way is not None:
            writer.add_tokenizer_pre(way)
        writer.add_token_list([*letters, *specials, "12", "Ġa"])
        writer.add_token_types([1] * 256 + [3] * 3 + [1] * 2)
        writer.add_token_merges(["1 2", "Ġ a"])
        writer.add_bos_token_id(256)
        writer.add_eos_token_id(257)
        if add_bos is not None:
            writer.add_add_bos_token(add_bos)

    return edit


@pytest.mark.parametrize(
    ("way", "add_bos", "ids"),
    [
        ("llama-bpe", None, [256, 64, 220, 259, 260]),
        ("llama-bpe", False, [64, 220, 259, 260]),
        ("tekken", None, [256, 64, 220, 16, 17, 260]),
        ("qwen2", None, [64, 220, 16, 17, 260]),
        ("smollm", None, [64, 220, 16, 17, 260]),
        ("gpt-2", None, [64, 220, 259, 260]),
        ("default", None, [64, 220, 259, 260]),
        (None, True, [256, 64, 220, 259, 260]),
    ],
)
def test_texts_begin_and_are_split_as_llama_cpp_does_it(tmp_path, caplog, way, add_bos, ids):
    path = write(tmp_path / f"{way}-{add_bos}.gguf", tiny(vocab=261), bpe(way, add_bos=add_bos))
    tokenizer = find(str(path)).tokenizer()
    assert tokenizer is not None
    assert tokenizer("a 12 a")["input_ids"] == ids
    assert ("tokenizer.ggml.pre" in caplog.text) == (way in (None, "default"))


def test_a_way_of_splitting_texts_that_nobody_knows_is_refused(tmp_path):
    found = find(str(write(tmp_path / "model.gguf", tiny(vocab=261), bpe("deepseek-coder"))))
    with pytest.raises(CheckpointError) as caught:
        found.tokenizer()
    check_raised(caught.value, 3, "model.gguf", "tokenizer.ggml.pre is 'deepseek-coder'")


def test_a_type_of_numbers_that_cannot_be_read_is_called_by_its_name(tmp_path):
    path = write(
        tmp_path / "model.gguf",
        tiny(),
        lambda w: w.add_tensor(
            "output_norm.bias",
            np.zeros((1, 22), np.uint8),
            raw_dtype=gguf.GGMLQuantizationType.Q5_0,
        ),
    )
    with pytest.raises(CheckpointError) as caught:
        find(str(path))
    check_raised(caught.value, 3, "model.gguf", "Q5_0", "Q4_K", "another quantization")


def test_a_big_endian_file_is_called_so(tmp_path):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(str(path), "llama", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError) as caught:
        find(str(path))
    check_raised(caught.value, 3, "model.gguf", "big-endian")
