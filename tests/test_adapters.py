"""PEFT's adapters: merged while a model is loaded, equal to PEFT's own merging, or refused by name.

PEFT makes and merges every adapter here; the models are tiny and random.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from forks import command
from messages import check_raised, check_refusal
from reference import Tiny, TinyModels
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from workers import Workers

from parallama.errors import CheckpointError
from parallama.files.adapter import AdaptedCheckpoint
from parallama.files.config_json import read_config
from parallama.files.find import find
from parallama.model.spec import ModelSpec
from parallama.prove.verification import verify
from parallama.train.trained_model import lasting_name

SIZES: dict[str, Any] = {"heads": 6, "kv_heads": 2, "layers": 2}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def adapter(tiny: Tiny, folder: Path, **config: Any) -> Any:
    """Write a random adapter of a model; what PEFT's merging makes of both."""
    given = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | config
    model = peft.get_peft_model(
        copy.deepcopy(tiny.model), peft.LoraConfig(task_type="CAUSAL_LM", **given)
    )
    model.base_model.model.config._name_or_path = tiny.folder
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    for each in model.peft_config.values():
        each.base_model_name_or_path = tiny.folder
    model.save_pretrained(folder)
    return model.merge_and_unload()


def tensors(folder: Path | str, base: str | None = None) -> dict[str, torch.Tensor]:
    """The whole model, as it is loaded."""
    checkpoint = find(str(folder)) if base is None else find(base, str(folder))
    return dict(checkpoint.tensors(ModelSpec.from_config(checkpoint.config)))


def assert_merged(found: dict[str, torch.Tensor], expected: Any, base: Any) -> None:
    theirs, before = dict(expected.named_parameters()), dict(base.named_parameters())
    changed = 0
    for name, tensor in found.items():
        assert torch.allclose(tensor, theirs[name], rtol=1e-5, atol=1e-6), name
        changed += not torch.equal(tensor, before[name])
    assert changed


KINDS: dict[str, dict[str, Any]] = {
    "the usual": {},
    "every linear weight": {"target_modules": "all-linear"},
    "named one by one": {"target_modules": [*LINEARS]},
    "rsLoRA": {"use_rslora": True, "r": 6},
    "ranks and alphas by pattern": {
        "target_modules": [*LINEARS],
        "rank_pattern": {
            "q_proj": 2,
            r"layers\.1\.mlp\.up_proj": 7,
            "^model.layers.0.*down_proj": 3,
        },
        "alpha_pattern": {"v_proj": 3, "layers.0.self_attn.k_proj": 5},
    },
    "some layers": {"layers_to_transform": [1]},
    "the head too": {"target_modules": ["q_proj", "lm_head"]},
    "the embedding too": {"target_modules": ["q_proj", "embed_tokens"]},
    "modules that are saved whole": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "a norm that is saved whole": {"modules_to_save": ["norm"]},
}


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_a_model_with_an_adapter_is_what_peft_makes_of_them(
    models: TinyModels, tmp_path: Path, config: dict[str, Any]
) -> None:
    tiny = models(**SIZES)
    merged = adapter(tiny, tmp_path / "adapter", **config)
    assert_merged(tensors(tmp_path / "adapter"), merged, tiny.model)
    assert_merged(tensors(tmp_path / "adapter", tiny.folder), merged, tiny.model)


def test_a_slice_of_a_merged_weight_is_that_of_the_whole(
    models: TinyModels, tmp_path: Path
) -> None:
    """To the bit, so what devices hold doesn't depend on the mesh."""
    tiny = models(**SIZES)
    adapter(tiny, tmp_path, target_modules=["q_proj", "embed_tokens"])
    checkpoint = find(str(tmp_path))
    for source in checkpoint.sources(ModelSpec.from_config(checkpoint.config)):
        whole = source.read()
        if whole.dim() < 2:
            continue
        rows, columns = whole.shape
        for slices in (
            (slice(1, rows - 2), slice(0, columns)),
            (slice(0, rows // 2), slice(3, columns - 1)),
            (slice(7, 8), slice(1, 2)),
        ):
            assert torch.equal(source.read(slices), whole[slices]), source.name


def test_a_base_of_half_precision_is_merged_in_single(models: TinyModels, tmp_path: Path) -> None:
    """And exported as it was stored."""
    tiny = models(**SIZES)
    merged = adapter(tiny, tmp_path / "adapter")
    half = copy.deepcopy(tiny.model).to(torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    found = tensors(tmp_path / "adapter", str(tmp_path / "half"))
    name = "model.layers.0.self_attn.q_proj.weight"
    delta = dict(merged.named_parameters())[name] - dict(tiny.model.named_parameters())[name]
    assert torch.allclose(
        found[name], dict(half.named_parameters())[name].float() + delta, atol=1e-6
    )
    assert found[name].dtype == torch.float32
    assert found["model.norm.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("mesh", ["1x1", "1x8"])
def test_on_a_mesh_a_model_with_an_adapter_is_the_merged_one(
    workers: Workers, models: TinyModels, tmp_path: Path, mesh: str
) -> None:
    """Heads and sizes are padded on eight devices. What is exported from there is PEFT's, too."""
    tiny = models(**SIZES)
    config = KINDS["ranks and alphas by pattern"] | {"modules_to_save": ["lm_head"]}
    merged = adapter(tiny, tmp_path / "adapter", **config)
    out = tmp_path / "out"
    workers[1 if mesh == "1x1" else 8].call(
        "stream_cases:export", folder=str(tmp_path / "adapter"), mesh=mesh, out=str(out)
    )
    assert_merged(load_file(out / "model.safetensors"), merged, tiny.model)


def test_export_writes_the_merged_model_with_the_adapters_tokenizer(
    models: TinyModels, tmp_path: Path
) -> None:
    import train_models

    tiny = models(**SIZES, vocab=train_models.VOCAB)
    base = shutil.copytree(tiny.folder, tmp_path / "base")
    merged = adapter(tiny, tmp_path / "adapter")
    train_models.tokenizer().save_pretrained(tmp_path / "adapter")
    for number, given in enumerate(
        ([tmp_path / "adapter"], [base, "--adapter", tmp_path / "adapter"])
    ):
        out = tmp_path / f"out-{number}"
        done = command(["export", *map(str, given), str(out), "--json"])
        assert done.code == 0, done.err
        assert json.loads(done.out)["dtype"] == "float32"
        assert_merged(
            dict(AutoModelForCausalLM.from_pretrained(out).named_parameters()), merged, tiny.model
        )
        assert (out / "tokenizer.json").exists() and not (out / "adapter_config.json").exists()
    assert verify(str(tmp_path / "adapter")).passed


def test_the_config_of_an_adapter_is_its_bases(models: TinyModels, tmp_path: Path) -> None:
    tiny = models(**SIZES)
    adapter(tiny, tmp_path)
    assert read_config(str(tmp_path)) == read_config(tiny.folder)


def test_an_adapter_on_an_adapter_is_merged_with_both(models: TinyModels, tmp_path: Path) -> None:
    tiny = models(**SIZES)
    first = adapter(tiny, tmp_path / "one")
    second = adapter(
        Tiny(first, str(tmp_path / "one")), tmp_path / "two", target_modules=["o_proj"]
    )
    assert_merged(tensors(tmp_path / "two"), second, tiny.model)
    rewrite(tmp_path / "one", base_model_name_or_path=str(tmp_path / "two"))
    with pytest.raises(CheckpointError) as caught:
        find(str(tmp_path / "two"))
    check_raised(caught.value, 3, "adapter")


def test_an_adapter_of_the_model_without_its_head_is_merged(
    models: TinyModels, tmp_path: Path
) -> None:
    """Its names begin within the model: PEFT would find none of them, and say nothing."""
    tiny = models(**SIZES)
    merged = adapter(tiny, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    held = load_file(file)
    save_file(
        {name.replace("model.model.model.", "model.model."): held[name] for name in held}, file
    )
    assert_merged(tensors(tmp_path), merged, tiny.model)


def rewrite(folder: Path, **keys: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def test_a_base_beside_its_adapter_is_found_and_one_that_is_gone_is_asked_for(
    models: TinyModels, tmp_path: Path
) -> None:
    tiny = models(**SIZES)
    merged = adapter(tiny, tmp_path / "adapter")
    shutil.copytree(tiny.folder, tmp_path / "base")
    rewrite(tmp_path / "adapter", base_model_name_or_path="../base")
    assert_merged(tensors(tmp_path / "adapter"), merged, tiny.model)
    for base in ("/nowhere/at/all", None):
        rewrite(tmp_path / "adapter", base_model_name_or_path=base)
        with pytest.raises(CheckpointError) as caught:
            find(str(tmp_path / "adapter"))
        parts = (f"--adapter {tmp_path / 'adapter'}", *((base,) if base else ()))
        check_raised(caught.value, 3, str(tmp_path / "adapter"), *parts)
        assert_merged(tensors(tmp_path / "adapter", tiny.folder), merged, tiny.model)
    done = command(["generate", str(tmp_path / "adapter"), "--prompt", "x"])
    check_refusal(done, 3, "--adapter")


REFUSED: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    "DoRA": ({"use_dora": True}, ("use_dora", "merge_and_unload")),
    "a variant of tomorrow": ({"use_newlora": True}, ("use_newlora", "merge_and_unload")),
    "IA3": ({"peft_type": "IA3"}, ("peft_type", "'IA3'", "LORA")),
    "mlx-lm's": ({"peft_type": None, "lora_parameters": {"rank": 8}}, ("mlx", "fuse")),
    "no kind": ({"peft_type": None}, ("peft_type", "LORA")),
    "biases": ({"bias": "lora_only"}, ("bias", "lora_only")),
    "a bias of its own": ({"lora_bias": True}, ("lora_bias",)),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, ("init_lora_weights", "pissa_niter_4")),
    "OLoRA": ({"init_lora_weights": "olora"}, ("init_lora_weights", "olora")),
    "doubled layers": ({"layer_replication": [[0, 2], [1, 2]]}, ("layer_replication",)),
    "single tokens": ({"trainable_token_indices": [1, 2]}, ("trainable_token_indices",)),
    "Conv1D": ({"fan_in_fan_out": True}, ("fan_in_fan_out",)),
    "a rank that is no number": ({"r": "4"}, ("r is '4'",)),
    "another rank": ({"r": 16}, ("q_proj", "rank 16")),
    "an alpha that is no number": ({"lora_alpha": None}, ("lora_alpha",)),
    "a pattern that takes for ever": (
        {"rank_pattern": {"(.*)*(.*)*x": 2}},
        ("rank_pattern", "(.*)*(.*)*x"),
    ),
    "patterns that are none": ({"alpha_pattern": [3]}, ("alpha_pattern", "[3]")),
}


@pytest.mark.parametrize(("keys", "parts"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_plain_lora_is_refused_by_name(
    models: TinyModels, tmp_path: Path, keys: dict[str, Any], parts: tuple[Any, ...]
) -> None:
    tiny = models(**SIZES)
    adapter(tiny, tmp_path)
    rewrite(tmp_path, **keys)
    with pytest.raises(CheckpointError) as caught:
        find(tiny.folder, str(tmp_path))
    check_raised(caught.value, 3, "adapter_", *parts)


Q = "base_model.model.model.layers.0.self_attn.q_proj"
DAMAGED: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], tuple[str, ...]]] = {
    "half a pair": (lambda held: held.pop(f"{Q}.lora_B.weight"), ("q_proj", "no lora_B")),
    "a module of another model": (
        lambda held: held.update({"base_model.model.h.0.attn.lora_A.weight": torch.zeros(4, 8)}),
        ("'h.0.attn'", "base"),
    ),
    "a base of another size": (
        lambda held: held.update({f"{Q}.lora_A.weight": torch.zeros(4, 64)}),
        ("q_proj", "[4, 64]", "base"),
    ),
    "a magnitude": (
        lambda held: held.update({f"{Q}.lora_magnitude_vector": torch.zeros(48)}),
        ("lora_magnitude_vector", "DoRA"),
    ),
    "a head of more tokens": (
        lambda held: held.update({"base_model.model.lm_head.weight": torch.zeros(103, 36)}),
        ("lm_head", "103", "101"),
    ),
    "whole numbers": (
        lambda held: held.update({f"{Q}.lora_A.weight": torch.zeros(4, 36, dtype=torch.int64)}),
        ("q_proj", "I64"),
    ),
    "something else": (
        lambda held: held.update({"base_model.model.prompt": torch.zeros(4)}),
        ("prompt",),
    ),
    "nothing": (lambda held: held.clear(), ("no tensor",)),
}


@pytest.mark.parametrize(("change", "parts"), DAMAGED.values(), ids=DAMAGED)
def test_an_adapter_that_is_not_of_this_model_is_refused_with_the_tensor(
    models: TinyModels, tmp_path: Path, change: Callable[..., Any], parts: tuple[str, ...]
) -> None:
    tiny = models(**SIZES)
    adapter(tiny, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    held = load_file(file)
    change(held)
    save_file(held, file)
    with pytest.raises(CheckpointError) as caught:
        find(str(tmp_path))
    text = str(caught.value)
    assert caught.value.exit_code == 3 and "adapter_model.safetensors" in text
    assert all(part in text for part in parts), text


def test_what_an_adapter_lacks_is_said(models: TinyModels, tmp_path: Path) -> None:
    tiny = models(**SIZES)
    adapter(tiny, tmp_path / "adapter")
    for given in (tiny.folder, str(tmp_path / "none")):
        with pytest.raises(CheckpointError) as caught:
            find(tiny.folder, given)
        check_raised(caught.value, 3, "adapter", given)
    with pytest.raises(CheckpointError) as caught:  # as PEFT saves adapters with names
        find(tiny.folder, str(tmp_path))
    check_raised(caught.value, 3, repr(str(tmp_path / "adapter")))
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(
        tmp_path / "adapter" / "adapter_model.bin"
    )
    with pytest.raises(CheckpointError) as caught:
        find(str(tmp_path / "adapter"))
    check_raised(caught.value, 3, "adapter_model.safetensors", "adapter_model.bin", "unpickled")


def test_a_model_and_an_adapter_in_one_folder_are_told_apart(
    models: TinyModels, tmp_path: Path
) -> None:
    tiny = models(**SIZES)
    shutil.copytree(tiny.folder, tmp_path / "both")
    adapter(tiny, tmp_path / "both")
    with pytest.raises(CheckpointError) as caught:
        find(str(tmp_path / "both"))
    check_raised(caught.value, 3, str(tmp_path / "both"), "--adapter")


def test_an_adapter_never_unties_a_model_silently(models: TinyModels, tmp_path: Path) -> None:
    tiny = models(**SIZES, tied=True)
    for number, config in enumerate(
        ({"target_modules": ["q_proj", "embed_tokens"]}, {"modules_to_save": ["lm_head"]})
    ):
        folder = tmp_path / str(number)
        adapter(tiny, folder, **config)
        with pytest.raises(CheckpointError) as caught:
            find(str(folder))
        check_raised(caught.value, 3, "embed_tokens", "lm_head", "tie_word_embeddings")
    merged = adapter(tiny, tmp_path / "fine", target_modules="all-linear")
    assert_merged(tensors(tmp_path / "fine"), merged, tiny.model)


def test_an_adapter_that_is_not_finite_is_refused_unless_that_is_allowed(
    models: TinyModels, tmp_path: Path
) -> None:
    tiny = models(**SIZES)
    adapter(tiny, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    held = load_file(file)
    held[f"{Q}.lora_A.weight"][1, 2] = float("nan")
    save_file(held, file)
    found = verify(str(tmp_path))
    assert not found.passed
    assert any("q_proj" in finding.message for finding in found.findings)


def test_an_adapter_that_training_wrote_is_merged_as_training_merges_it(
    workers: Workers, models: TinyModels, tmp_path: Path
) -> None:
    import train_data

    tiny = models(**SIZES)
    lora = {"rank": 2, "alpha": 8.0, "targets": LINEARS}
    batches = [train_data.random_batch((1, 2, 12), tiny.vocab, seed) for seed in range(2)]
    found = workers[1].call(
        "train_cases:adapted",
        model=tiny.folder,
        mesh="1x1",
        options={"batch_size": 2, "seq_len": 12, "lora": lora},
        batches=batches,
        lr=1e-2,
        folder=str(tmp_path),
    )
    ours = tensors(tmp_path)
    assert isinstance(find(str(tmp_path)), AdaptedCheckpoint)
    for name, tensor in found["merged"].items():
        assert torch.allclose(ours[name], tensor, atol=1e-6), name


def test_an_adapter_names_its_base_from_wherever_it_was_trained(
    models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(models(**SIZES).folder, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    assert lasting_name("base") == lasting_name("./base") == str((tmp_path / "base").resolve())
    assert lasting_name("smollm2") == "smollm2" and lasting_name("org/name") == "org/name"
