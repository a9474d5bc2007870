"""An optimizer step on a mesh is that of one device: gradients, losses, and what stays as it is."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import train_data
from reference import TinyModels, relative_l2
from workers import Workers

REPEATED = {
    "heads": 4,
    "kv_heads": 2,
    "layers": 1,
}  # on four devices, each KV head stands in two slots
PADDED = {
    "heads": 9,
    "kv_heads": 3,
    "tied": True,
    "layers": 2,
}  # on two and four devices, a slot of zeros
BIASED = {"family": "qwen2", "heads": 6, "kv_heads": 2, "layers": 1}
# Of 256 rows and more products are another form, and one with so many outputs is done in parts.
WIDE = {"heads": 4, "kv_heads": 2, "layers": 1, "vocab": 9000}
NORMED = {"family": "qwen3", "heads": 4, "kv_heads": 2, "layers": 1}

GRADIENTS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("1x1", PADDED, {}),
    ("1x2", PADDED, {"remat": "full"}),
    ("2x2", PADDED, {"fsdp": True, "grad_accum": 2, "sequence_parallel": True, "remat": 2}),
    ("1x4", REPEATED, {"sequence_parallel": True}),
    ("2x4", REPEATED, {"fsdp": True}),
    ("1x4", BIASED, {}),
    ("1x4", NORMED, {"sequence_parallel": True}),
    ("1x2", WIDE, {"seq_len": 64}),
    ("1x8", REPEATED, {}),
    *(
        pytest.param(mesh, sizes, {}, marks=pytest.mark.slow)
        for mesh in ("1x2", "1x3", "1x8", "2x4")
        for sizes in (PADDED, REPEATED)
        if (mesh, sizes) != ("1x8", REPEATED)
    ),
]


def devices(mesh: str) -> int:
    data, model = mesh.split("x")
    return int(data) * int(model)


@pytest.mark.parametrize(("mesh", "sizes", "options"), GRADIENTS)
def test_every_gradient_is_that_of_one_device(
    workers: Workers, models: TinyModels, mesh: str, sizes: dict[str, Any], options: dict[str, Any]
) -> None:
    tiny = models(**sizes)
    options = {"batch_size": 4, "seq_len": 12} | options
    batch = train_data.random_batch(
        (options.get("grad_accum", 1), 4, options["seq_len"]), tiny.vocab
    )
    found = workers[devices(mesh)].call(
        "train_cases:gradients", model=tiny.folder, mesh=mesh, options=options, arrays=batch
    )
    wanted = train_data.gradients(copy.deepcopy(tiny.model).double(), batch)
    assert found.keys() == wanted.keys()
    far = {name: relative_l2(found[name], wanted[name]) for name in wanted}
    assert max(far.values()) < 1e-5, far


@pytest.mark.parametrize(
    ("mesh", "options"), [("1x1", {}), ("2x2", {"fsdp": True, "remat": "full"})]
)
def test_losses_and_norms_are_those_of_a_plain_torch_loop_and_nothing_is_compiled_on_the_way(
    workers: Workers, models: TinyModels, mesh: str, options: dict[str, Any]
) -> None:
    tiny = models(**PADDED)
    options = {
        "batch_size": 4,
        "seq_len": 12,
        "grad_accum": 2,
        "weight_decay": 0.1,
        "beta2": 0.95,
    } | options
    batches = [train_data.random_batch((2, 4, 12), tiny.vocab, seed) for seed in range(6)]
    found = workers[devices(mesh)].call(
        "train_cases:run",
        model=tiny.folder,
        mesh=mesh,
        options=options,
        batches=batches,
        lr=1e-3,
        final=True,
    )
    plain = copy.deepcopy(tiny.model)
    optimizer = torch.optim.AdamW(train_data.without_decay(plain, 0.1), lr=1e-3, betas=(0.9, 0.95))
    wanted = train_data.losses(plain, batches, optimizer)
    assert found["losses"] == pytest.approx([loss for loss, _ in wanted], rel=1e-5)
    assert found["norms"] == pytest.approx([norm for _, norm in wanted], rel=1e-4)
    assert all(found["finite"]) and found["compiled_later"] == 0
    for name, parameter in plain.named_parameters():
        assert relative_l2(found["parameters"][name], parameter.detach()) < 1e-4, name


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated"
)  # PEFT's own business
@pytest.mark.parametrize(
    ("mesh", "sizes"),
    [
        ("2x2", PADDED),
        *(
            pytest.param(mesh, sizes, marks=pytest.mark.slow)
            for mesh in ("1x2", "1x3", "1x8", "2x4")
            for sizes in (PADDED, REPEATED)
        ),
    ],
)
def test_adapters_on_a_mesh_have_the_gradients_of_one_device_and_peft_loads_what_is_saved(
    workers: Workers, models: TinyModels, mesh: str, sizes: dict[str, Any], tmp_path: Path
) -> None:
    import peft

    tiny = models(**sizes)
    lora = {"rank": 2, "alpha": 8.0, "targets": ("q_proj", "v_proj", "o_proj", "down_proj")}
    options = {"batch_size": 4, "seq_len": 12, "lora": lora}
    batches = [train_data.random_batch((1, 4, 12), tiny.vocab, seed) for seed in range(3)]
    found = workers[devices(mesh)].call(
        "train_cases:adapted",
        model=tiny.folder,
        mesh=mesh,
        options=options,
        batches=batches,
        lr=1e-2,
        folder=str(tmp_path),
    )
    model = peft.PeftModel.from_pretrained(copy.deepcopy(tiny.model), tmp_path, is_trainable=True)
    ids = torch.from_numpy(batches[0]["ids"][0])
    with torch.no_grad():
        ours = model(input_ids=ids, use_cache=False).logits
        merged = copy.deepcopy(tiny.model)
        merged.load_state_dict(found["merged"], strict=False)
        assert relative_l2(merged(input_ids=ids, use_cache=False).logits, ours) < 1e-5
        assert (
            relative_l2(ours, tiny.model(input_ids=ids, use_cache=False).logits) > 1e-3
        )  # something was learnt
    wanted = train_data.gradients(model.double(), batches[0])
    assert len(wanted) == len(found["gradients"]) == sizes["layers"] * 2 * 4
    for name, gradient in found["gradients"].items():
        theirs = wanted[f"base_model.model.{name.removesuffix('.weight')}.default.weight"]
        assert relative_l2(gradient, theirs) < 1e-5, name


@pytest.mark.parametrize(
    ("mesh", "sizes"),
    [("1x4", REPEATED), ("2x2", PADDED), pytest.param("1x4", BIASED, marks=pytest.mark.slow)],
)
def test_after_a_hundred_steps_padding_is_zero_copies_are_equal_and_each_device_holds_its_share(
    workers: Workers, models: TinyModels, mesh: str, sizes: dict[str, Any]
) -> None:
    tiny = models(**sizes)
    batch = train_data.random_batch((1, 4, 12), tiny.vocab)
    options = {"batch_size": 4, "seq_len": 12, "weight_decay": 0.1, "fsdp": True}
    found = workers[4].call(
        "train_cases:hundred_steps",
        model=tiny.folder,
        mesh=mesh,
        options=options,
        arrays=batch,
        lr=3e-3,
        steps=100,
    )
    # Laying out the checkpoint's numbers puts zeros into padding, and the same into every copy.
    assert all(found["equal"].values()), [
        name for name, equal in found["equal"].items() if not equal
    ]
    assert found["last"] < 3
    assert found["held"]["params"] == found["planned"]
    assert found["held"]["optimizer"] == [2 * size + 4 for size in found["planned"]]


def test_a_step_whose_loss_is_no_number_leaves_the_state_as_it_was(
    workers: Workers, models: TinyModels
) -> None:
    tiny = models(**REPEATED)
    batch = train_data.random_batch((1, 2, 12), tiny.vocab)
    found = workers[2].call(
        "train_cases:skipped",
        model=tiny.folder,
        mesh="1x2",
        options={"batch_size": 2, "seq_len": 12},
        arrays=batch,
    )
    assert found["finite"] == [True, False]
    assert all(found["same"].values())
