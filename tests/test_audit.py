"""Compiled steps held against their plans: what passes, and every fault that must be found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from forks import Done, command
from messages import check_refusal

from parallama.engine.devices import versions
from parallama.plan.mesh_shape import MeshShape
from parallama.prove.compiled_collectives import axis_of

LAYER = "model.layers.*."
DIVIDES = {"heads": 8, "kv_heads": 4, "intermediate": 48, "vocab": 96}
SMOL = {"heads": 9, "kv_heads": 3, "tied": True}
PHASES = ("prefill", "decode")


def modules(document: dict[str, Any]) -> set[str]:
    return {finding["module"] for finding in document["findings"]}


# -- what passes


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(  # the families' audits are on the other meshes
    ("sizes", "mesh"),
    [
        (DIVIDES, "1x1"),
        (DIVIDES, "2x2"),
        *(pytest.param(SMOL, mesh, marks=pytest.mark.slow) for mesh in ("1x3", "1x8")),
    ],
)
def test_our_own_steps_are_what_was_predicted_to_the_byte(
    auditors: Any, models: Any, sizes: Any, mesh: str, phase: str
) -> None:
    document = auditors("judged", models(**sizes).folder, mesh, phase=phase)
    assert document["findings"] == () and document["passed"]
    shape = MeshShape.parse(mesh)
    tokens = 4 // shape.data * (16 if phase == "prefill" else 1)
    hidden = models(**sizes).model.config.hidden_size
    reduced, last = (
        {"kind": "all-reduce", "axis": "model", "bytes": count * hidden * 4}
        for count in (tokens, 4 // shape.data)
    )
    picked = {"kind": "all-gather", "axis": "model", "bytes": shape.model * 4 // shape.data * 5 * 4}
    found = sorted(document["found"], key=lambda each: (each["module"], -each["bytes"]))
    assert found == (
        []
        if shape.model == 1
        else [
            reduced | {"count": 1, "module": "model.embed_tokens"},
            *(
                [
                    reduced | {"count": 2, "module": LAYER + "mlp.down_proj"},
                    reduced | {"count": 2, "module": LAYER + "self_attn.o_proj"},
                ]
                if phase == "decode"
                else [
                    reduced | {"count": 1, "module": "model.layers.0.mlp.down_proj"},
                    reduced | {"count": 1, "module": "model.layers.0.self_attn.o_proj"},
                    last | {"count": 1, "module": "model.layers.1.mlp.down_proj"},
                    last | {"count": 1, "module": "model.layers.1.self_attn.o_proj"},
                ]
            ),
            picked | {"count": 1, "module": "sampling"},
            *(
                {"kind": "all-reduce", "axis": "model", "module": "sampling.truncation"}
                | {"count": 2, "bytes": 4 // shape.data * numbers * 4}
                for numbers in (15, 1)
            ),
        ]
    )
    assert (document["programs"], document["aliased"], document["cache_tensors"]) == (1, 4, 4)


@pytest.mark.parametrize("phase", PHASES)
def test_bf16_is_summed_as_fp32_on_the_cpu(auditors: Any, models: Any, phase: str) -> None:
    tiny = models(**DIVIDES)
    assert auditors("judged", tiny.folder, "1x2", phase=phase, dtype="bfloat16")["findings"] == ()


# -- faults


FIRST = "model.layers.0."  # of two; the last one has fewer positions in a prefill
FAULTS = {
    "o_proj replicated": ("2x2", LAYER + "self_attn.o_proj", "on a device, planned"),
    "lm_head replicated": (
        "1x2",
        "lm_head",
        "1 parameter(s) are stored as [96, 64] on a device, planned [48, 64]",
    ),
    "one layer replicated": (
        "1x8",
        "model.layers.1.mlp.down_proj",
        "1 parameter(s) are stored as [64, 48] on a device, planned [64, 6]",
    ),
    "table gathered": (
        "2x2",
        "model.embed_tokens",
        "all-gather over 'model', 1 of 24576 bytes, which the plan does not need",
    ),
    "q, k and v concatenated": (
        "1x2",
        LAYER + "self_attn.k_proj",
        "collective-permute over 'model'",
    ),
    "cache split over head_dim": (
        "1x2",
        "cache",
        "0 of 4 tensors are stored as [4, 2, 256, 8] on a device, as planned",
    ),
    "cache not donated": (
        "1x2",
        "cache",
        "4 of 4 tensors are not updated in place: each step writes them anew",
    ),
}


@pytest.mark.parametrize(
    ("fault", "phase"),
    # Every fault once, in turns in prefill and decode; the one layer has a test below. The rest is
    # slow.
    [
        pytest.param(
            fault,
            phase,
            marks=()
            if (index + place) % 2 == 0 and fault != "one layer replicated"
            else pytest.mark.slow,
        )
        for index, fault in enumerate(FAULTS)
        for place, phase in enumerate(PHASES)
    ],
)
def test_a_fault_is_found_and_its_module_named(
    auditors: Any, models: Any, fault: str, phase: str
) -> None:
    mesh, module, what = FAULTS[fault]
    document = auditors(
        "judged", models(**DIVIDES, head_dim=8, hidden=64).folder, mesh, phase=phase, fault=fault
    )
    assert not document["passed"]
    assert any(what in told for told in said_of(document, module)), document["findings"]


def said_of(document: dict[str, Any], module: str) -> list[str]:
    return [finding["what"] for finding in document["findings"] if finding["module"] == module]


# What is moved for a weight on the wrong side: the product's result, or, where oneDNN multiplies,
# the weight.
SIDES = {
    ("o_proj split on its outputs", "Eigen", "prefill"): (
        FIRST + "self_attn.o_proj",
        "all-gather over 'model', 2 of 16384",
    ),
    ("o_proj split on its outputs", "Eigen", "decode"): (
        LAYER + "self_attn.o_proj",
        "all-gather over 'model', 4 of 1024",
    ),
    ("o_proj split on its outputs", "oneDNN", "prefill"): (
        LAYER + "self_attn.o_proj",
        "all-to-all over 'model', 2 of 8192",
    ),
    ("o_proj split on its outputs", "oneDNN", "decode"): (
        LAYER + "self_attn.o_proj",
        "all-to-all over 'model', 2 of 8192",
    ),
    ("up_proj split on its inputs", "Eigen", "prefill"): (
        FIRST + "mlp.up_proj",
        "all-to-all over 'model', 1 of 6144",
    ),
    ("up_proj split on its inputs", "Eigen", "decode"): (
        LAYER + "mlp.up_proj",
        "all-reduce over 'model', 2 of 768",
    ),
    ("up_proj split on its inputs", "oneDNN", "prefill"): (
        LAYER + "mlp.up_proj",
        "all-to-all over 'model', 2 of 6144",
    ),
    ("up_proj split on its inputs", "oneDNN", "decode"): (
        LAYER + "mlp.up_proj",
        "all-to-all over 'model', 2 of 6144",
    ),
}


@pytest.mark.parametrize(
    ("fault", "by", "phase"),
    [
        pytest.param(*case, marks=() if index % 3 == 0 else pytest.mark.slow)
        for index, case in enumerate(SIDES)
    ],
)
def test_a_weight_split_on_the_wrong_side_is_found_whatever_multiplies(
    auditors: Any, models: Any, fault: str, by: str, phase: str
) -> None:
    if by == "oneDNN" and not versions.onednn_fusions():
        pytest.skip("the installed torch_xla was built without oneDNN")
    module, what = SIDES[fault, by, phase]
    folder = models(**DIVIDES, head_dim=8, hidden=64).folder
    document = auditors(
        "judged", folder, "1x2", phase=phase, fault=fault, one_core_each=by == "oneDNN"
    )
    assert not document["passed"]
    assert f"{what} bytes, which the plan does not need" in said_of(document, module), document[
        "findings"
    ]
    part = fault.split()[0]
    lies = (
        "[32, 64] on a device, planned [64, 32]"
        if part == "o_proj"
        else "[48, 32] on a device, planned [24, 64]"
    )
    assert any(
        lies in told
        for each in modules(document)
        if each.endswith(part)
        for told in said_of(document, each)
    )


def test_a_cache_that_is_copied_every_step_costs_its_bytes(auditors: Any, models: Any) -> None:
    document = auditors(
        "judged",
        models(**DIVIDES, head_dim=8, hidden=64).folder,
        "1x8",
        phase="decode",
        fault="cache not donated",
        batch=2,
    )
    # On eight devices the four KV heads stand twice, one on each device.
    size = 4 * 2 * 1 * 256 * 8 * 4
    assert {
        "module": "cache",
        "what": "4 whole tensors are copied every step",
        "bytes": size,
    } in list(document["findings"])


def test_an_input_that_is_split_by_accident_is_found(auditors: Any, models: Any) -> None:
    document = auditors(
        "judged", models(**DIVIDES).folder, "1x2", phase="prefill", fault="ids split over positions"
    )
    what = "all-gather over 'model', 1 of 512 bytes, which the plan does not need"
    assert document["findings"] == ({"module": "model.embed_tokens", "what": what, "bytes": 512},)


def test_a_fault_in_one_layer_names_that_layer_alone(auditors: Any, models: Any) -> None:
    assert modules(
        auditors(
            "judged", models(**DIVIDES).folder, "1x2", phase="decode", fault="one layer replicated"
        )
    ) == {"model.layers.1.mlp.down_proj"}


def test_the_plain_recipe_gathers_three_tensors_a_layer_where_heads_do_not_divide(
    auditors: Any, models: Any
) -> None:
    findings = auditors(
        "recipe", models(heads=9, kv_heads=3, hidden=72, intermediate=48, vocab=96).folder, "1x2"
    )
    gathers = [
        finding
        for finding in findings
        if "all-gather" in finding["what"] and finding["module"] == LAYER + "self_attn"
    ]
    assert sum(int(finding["what"].split(", ")[1].split()[0]) for finding in gathers) == 3 * 2
    assert {finding["module"] for finding in findings} == {
        LAYER + "self_attn",
        "sampling",
        "sampling.truncation",
    }  # it picks no token


def test_the_plain_recipe_is_as_planned_where_heads_divide(auditors: Any, models: Any) -> None:
    findings = auditors("recipe", models(**DIVIDES, hidden=64).folder, "2x2")
    assert {finding["module"] for finding in findings} == {"sampling", "sampling.truncation"}


# -- plans of a user's own


PLANS: dict[str, dict[str, Any]] = {
    "attention replicated": {LAYER + "self_attn.*.weight": "replicate"},
    "o_proj replicated": {LAYER + "self_attn.o_proj.weight": "replicate"},
    "o_proj on its outputs": {LAYER + "self_attn.o_proj.weight": "colwise"},
    "down_proj replicated": {LAYER + "mlp.down_proj.weight": "replicate"},
    "down_proj on its outputs": {LAYER + "mlp.down_proj.weight": "colwise"},
    "gate_proj on its inputs": {LAYER + "mlp.gate_proj.weight": "rowwise"},
    "q, k, v on their inputs": {
        LAYER + f"self_attn.{part}_proj.weight": "rowwise" for part in "qkv"
    },
    "table over hidden": {"model.embed_tokens.weight": [None, "model"]},
    "head on its inputs": {"lm_head.weight": [None, "model"]},
    "one layer": {"model.layers.1.mlp.down_proj.weight": "replicate"},
}
ALIKE = ("o_proj replicated", "down_proj on its outputs", "q, k, v on their inputs")


@pytest.mark.parametrize(
    ("name", "mesh"),
    # Every plan on one of the meshes, but for those that are like another one; the rest is slow.
    [
        pytest.param(
            name,
            mesh,
            marks=() if (index + place) % 2 == 0 and name not in ALIKE else pytest.mark.slow,
        )
        for index, name in enumerate(PLANS)
        for place, mesh in enumerate(("1x2", "2x2"))
    ],
)
def test_a_plan_of_ones_own_is_carried_out_and_its_cost_named(
    auditors: Any, models: Any, name: str, mesh: str
) -> None:
    folder = models(**DIVIDES, hidden=64).folder
    accepted = auditors("judged", folder, mesh, phase="decode", plan=PLANS[name], accept_plan=True)
    assert accepted["findings"] == ()
    document = auditors("judged", folder, mesh, phase="prefill", plan=PLANS[name])
    assert document["findings"] and all(
        "which this mesh can do without" in finding["what"] for finding in document["findings"]
    )
    pattern = next(iter(PLANS[name])).removesuffix(".weight")
    assert any(module.startswith(pattern.split("*")[0]) for module in modules(document))
    assert all(finding["bytes"] > 0 for finding in document["findings"])


@pytest.mark.parametrize("part", ["mlp.*", "self_attn.k_proj"])
def test_a_replicated_weight_that_costs_no_collective_is_no_finding(
    auditors: Any, models: Any, part: str
) -> None:
    plan = {f"{LAYER}{part}.weight": "replicate"}
    assert auditors("judged", models(**DIVIDES).folder, "1x2", phase="decode", plan=plan)["passed"]


# -- axes


def test_groups_of_devices_are_named_by_their_axis() -> None:
    mesh = MeshShape(data=2, model=4)
    assert axis_of([(0, 1, 2, 3), (4, 5, 6, 7)], mesh) == "model"
    assert axis_of([(0, 4), (5, 1), (2, 6), (3, 7)], mesh) == "data"
    assert axis_of([tuple(range(8))], mesh) == "data+model"
    assert axis_of([(0, 1), (2, 3)], mesh) == "[(0, 1), (2, 3)]"
    assert axis_of([(0, 1)], MeshShape(model=2)) == "model"


# -- from outside


def audit(*arguments: str) -> Done:
    return command(["audit", *arguments], limit_s=600, optimize=False)


@pytest.mark.slow  # unmarked, tests/test_readme.py has it audited on 1x8
@pytest.mark.parametrize("mesh", ["1x2", "1x3", "1x4", "1x8", "2x4"])
def test_smollm2_needs_two_all_reduces_a_layer_and_what_embedding_and_pick_need(mesh: str) -> None:
    done = audit("smollm2", "--mesh", mesh, "--phase", "all", "--json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    phases = document["phases"]
    assert document["passed"]
    assert [each["phase"] for each in phases] == ["prefill", "decode", "copy"]
    assert (phases[2]["found"], phases[2]["aliased"]) == ([], 60)
    for phase in phases[:2]:
        layers = {"*": 30} if phase["phase"] == "decode" else {"0-28": 29, "29": 1}
        sums = {
            ("all-reduce", f"model.layers.{some}.{module}"): count
            for some, count in layers.items()
            for module in ("self_attn.o_proj", "mlp.down_proj")
        }
        assert {
            (each["kind"], each["module"]): each["count"]
            for each in phase["found"]
            if each["module"] != "sampling.truncation"
        } == sums | {
            ("all-reduce", "model.embed_tokens"): 1,
            ("all-gather", "sampling"): 1,
        }
        assert phase["found"] == phase["expected"] and phase["aliased"] == 60


def test_plan_predicts_what_audit_finds(models: Any, tmp_path: Path) -> None:
    folder = models(**SMOL).folder
    asked = [folder, "--mesh", "2x2", "--batch", "6", "--seq", "40", "--json"]
    done, plan = audit(*asked, "--phase", "all"), command(["plan", *asked])
    assert done.code == plan.code == 0, done.err + plan.err
    planned = json.loads(plan.out)
    for phase in json.loads(done.out)["phases"]:
        assert phase["found"] == planned["collectives"].get(phase["phase"], [])
        assert phase["param_bytes_per_device"] == [planned["totals"]["param_bytes_per_device"]] * 4


def test_a_failed_audit_says_what_differs_and_exits_with_1(models: Any, tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("model.layers.*.self_attn.o_proj.weight: replicate\n")
    asked = [models(**DIVIDES).folder, "--mesh", "1x2", "--plan", str(plan)]
    done, accepted = audit(*asked), audit(*asked, "--accept-plan", "--quiet")
    assert (done.code, accepted.code) == (1, 0)
    assert "decode: FAILED" in done.out
    finding = " ".join(done.out.split()).split("- model.layers.*.self_attn.o_proj: ")[1]
    assert "all-gather over 'model', 2 of" in finding


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--phase", "generate"], ("--phase 'generate'", "prefill, decode, copy, train, all")),
        (["--mesh", "2x1", "--batch", "3"], ("--batch is 3", "multiple of 2", "'data'")),
        (["--seq", "0"], ("--seq is 0", "at least 1")),
    ],
)
def test_a_wrong_option_is_refused_before_anything_runs(
    arguments: list[str], parts: tuple[str, ...]
) -> None:
    check_refusal(audit("nowhere", *arguments), 2, *parts)


def test_a_sequence_longer_than_the_model_is_refused(models: Any) -> None:
    check_refusal(audit(models(**SMOL).folder, "--seq", "100000"), 2, "--seq is 100000")
