"""`parallama validate`: equal runs pass, a planted fault is named, wrong requests are refused."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from forks import Done
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import check_refusal, says
from reference import TinyModels
from workers import Workers

from parallama.files.find import find
from parallama.files.skeleton import to_host
from parallama.model.spec import ModelSpec
from parallama.prove import reference as theirs
from parallama.prove import shipped_text
from parallama.prove.activations import activations
from parallama.prove.metrics import compare_logits, max_abs_diff, pcc, relative_l2
from parallama.prove.tolerance import Limits, Tolerance

SMOL = {"heads": 9, "kv_heads": 3, "tied": True}
DECODE = 6
# From the 21st position on, the long factors: in the text, which has 24, and while decoding.
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [1.5, 2.0, 4.0, 9.0],
    "original_max_position_embeddings": 20,
}
KEYS = {
    "model",
    "backend",
    "mesh",
    "dtype",
    "prefill_tokens",
    "decode_tokens",
    "module_tokens",
    "tolerances",
    "prefill",
    "decode",
    "dtype_prefill",
    "dtype_decode",
    "gradients",
    "modules",
    "first_fault",
    "programs_after_warmup",
    "faults",
    "passed",
}
FIGURES = {
    "pcc",
    "relative_l2",
    "max_abs_diff",
    "top1_agreement",
    "top5_agreement",
    "kl_nats",
    "perplexity",
    "reference_perplexity",
}


def devices(mesh: str) -> int:
    return math.prod(int(size) for size in mesh.split("x"))


class Asked:
    """References of tiny models, computed in this process and kept: request and answers' folder."""

    def __init__(self, root: Path, models: TinyModels) -> None:
        self._root, self._models = root, models
        self._made: dict[str, dict[str, Any]] = {}

    def __call__(self, *, dtype: str = "float32", **sizes: Any) -> dict[str, Any]:
        key = repr((dtype, sorted(sizes.items())))
        if key not in self._made:
            tiny = self._models(**sizes)
            ids = reference.random_ids(1, 24 + DECODE, tiny.vocab)[0].tolist()
            request = theirs.ReferenceRequest(
                model=tiny.folder,
                ids=tuple(ids),
                prefill=24,
                traced=24,
                gradients=True,
                dtype=dtype,
            )
            folder = self._root / str(len(self._made))
            folder.mkdir()
            theirs.compute(request, folder)
            self._made[key] = {"request": asdict(request), "answers": str(folder)}
        return self._made[key]


@pytest.fixture(scope="module")
def asked(models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Asked:
    return Asked(tmp_path_factory.mktemp("answers"), models)


def without_gradients(given: dict[str, Any]) -> dict[str, Any]:
    return given | {"request": given["request"] | {"gradients": False}}


# -- equal runs


@pytest.mark.parametrize(
    ("mesh", "sizes"),
    [
        ("1x1", SMOL),
        ("1x3", SMOL),
        ("2x4", {"family": "qwen3", "heads": 6, "kv_heads": 2}),
        ("1x2", {"heads": 4, "kv_heads": 2, "rope_parameters": LONGROPE}),
        pytest.param(
            "1x2",
            {"family": "mistral", "heads": 4, "kv_heads": 2, "sliding_window": 11},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_right_run_passes_far_within_its_tolerances(
    workers: Workers, asked: Asked, mesh: str, sizes: dict[str, Any]
) -> None:
    found = workers[devices(mesh)].call(
        "validate_cases:judged", mesh=mesh, **without_gradients(asked(**sizes))
    )
    assert found["passed"] and found["faults"] == [] and found["first_fault"] is None
    assert (found["prefill_tokens"], found["decode_tokens"], found["module_tokens"]) == (
        24,
        DECODE,
        24,
    )
    limit = found["tolerances"]["logits_relative_l2"]
    for part in ("prefill", "decode"):
        assert 0 < found[part]["relative_l2"] < limit / 2 < 1e-5
        assert (
            found[part]["pcc"] > 0.9999999
            and found[part]["top1_agreement"] == found[part]["top5_agreement"] == 1
        )
        assert abs(found[part]["kl_nats"]) < 1e-9
        assert found[part]["perplexity"] == pytest.approx(
            found[part]["reference_perplexity"], rel=1e-5
        )
    for module in found["modules"]:
        assert module["ok"] and module["inputs_ok"], module
        assert module["alone_relative_l2"] < module["tolerance"] / 2, module
    assert found["gradients"] is None and found["dtype_prefill"] is None
    assert found["programs_after_warmup"] == 0
    check_document(found["document"])


@pytest.mark.parametrize(
    ("mesh", "sizes"),
    [
        ("1x2", SMOL),
        pytest.param("2x4", SMOL, marks=pytest.mark.slow),
        ("1x8", {"heads": 8, "kv_heads": 2, "attention_bias": True, "mlp_bias": True}),
    ],
)
def test_every_gradient_is_the_references_with_heads_padded_and_repeated(
    workers: Workers, asked: Asked, models: TinyModels, mesh: str, sizes: dict[str, Any]
) -> None:
    found = workers[devices(mesh)].call("validate_cases:judged", mesh=mesh, **asked(**sizes))
    assert found["passed"]
    assert {gradient["name"] for gradient in found["gradients"]} == {
        name for name, _ in models(**sizes).model.named_parameters()
    }
    for gradient in found["gradients"]:
        assert (
            gradient["ok"]
            and 0 < gradient["relative_l2"] < found["tolerances"]["gradients_relative_l2"] / 2
        ), gradient
        assert gradient["pcc"] > 0.999999, gradient
        assert set(gradient) == {"name", "relative_l2", "pcc", "ok"}


def test_bfloat16_passes_and_says_what_the_dtype_alone_costs(
    workers: Workers, asked: Asked
) -> None:
    found = workers[8].call(
        "validate_cases:judged", mesh="1x8", dtype="bfloat16", **asked(dtype="bfloat16", **SMOL)
    )
    assert found["passed"] and found["dtype"] == "bfloat16"
    for part in ("prefill", "decode"):
        # transformers' own bfloat16 is as far from float32 as ours.
        ours, alone = found[part]["relative_l2"], found[f"dtype_{part}"]["relative_l2"]
        assert 1e-3 < ours < 2 * alone and ours < found["tolerances"]["logits_relative_l2"] / 2
    assert all(gradient["relative_l2"] > 1e-4 and gradient["ok"] for gradient in found["gradients"])


@pytest.mark.slow
def test_weights_split_over_both_axes_pass(workers: Workers, asked: Asked) -> None:
    plan = {
        "model.layers.*.self_attn.q_proj.weight": ["model", "data"],
        "model.layers.*.mlp.down_proj.weight": ["data", "model"],
    }
    found = workers[8].call(
        "validate_cases:judged",
        mesh="2x4",
        plan=plan | {"model.layers.*.mlp.up_proj.weight": "replicate"},
        **asked(**SMOL),
    )
    assert found["passed"] and len(found["gradients"]) == 20


def check_document(document: dict[str, Any]) -> None:
    assert set(document) == KEYS and set(document["prefill"]) == set(document["decode"]) == FIGURES
    assert set(document["tolerances"]) == {
        "unit_roundoff",
        "logits_relative_l2",
        "gradients_relative_l2",
    }
    modules = {
        "name",
        "relative_l2",
        "max_abs_diff",
        "inputs_ok",
        "alone_relative_l2",
        "tolerance",
        "ok",
    }
    assert set(document["modules"][0]) == modules
    json.dumps(document, allow_nan=False)


# -- faults


FAULTS = {
    "swapped heads": "model.layers.1.self_attn.q_proj",
    "swapped heads in the output": "model.layers.0.self_attn.o_proj",
    "dropped all-reduce after attention": "model.layers.1.self_attn.o_proj",
    "dropped all-reduce after the MLP": "model.layers.0.mlp.down_proj",
    "wrong RoPE scaling": "model.rotary_emb",
    "wrong softmax scaling": "model.layers.0.self_attn",
    "one NaN": "model.layers.1.self_attn.v_proj",
    "transposed slice": "model.layers.0.mlp.gate_proj",
}


QUICK = {
    "1x2": {"swapped heads in the output", "dropped all-reduce after the MLP"},
    "1x8": set(FAULTS) - {"dropped all-reduce after the MLP", "swapped heads in the output"},
    "2x4": {"dropped all-reduce after attention"},
}


@pytest.mark.parametrize(
    ("mesh", "fault"),
    [
        pytest.param(mesh, fault, marks=[] if fault in quick else [pytest.mark.slow])
        for mesh, quick in QUICK.items()
        for fault in FAULTS
    ],
)
def test_a_planted_fault_is_named_and_nothing_else_is(
    workers: Workers, asked: Asked, mesh: str, fault: str
) -> None:
    found = workers[devices(mesh)].call(
        "validate_cases:with_fault", mesh=mesh, fault=fault, **asked(**SMOL)
    )
    assert found["first"] == FAULTS[fault]
    assert found["alone"] == found["bad"] == [FAULTS[fault]], (
        "what follows had wrong inputs, and is not at fault"
    )
    assert found["inputs"][FAULTS[fault]] and not found["inputs"]["lm_head"]


def test_a_repeated_head_that_differs_from_its_first_copy_is_noticed(
    workers: Workers, asked: Asked
) -> None:
    found = workers[8].call(
        "validate_cases:with_fault", mesh="1x8", fault="a second copy that differs", **asked(**SMOL)
    )
    assert (
        found["alone"] == ["model.layers.0.self_attn.k_proj"]
        and found["first"] == "model.layers.0.self_attn.k_proj"
    )


def test_a_fault_of_decoding_alone_is_told_from_one_of_the_modules(
    workers: Workers, asked: Asked
) -> None:
    right = without_gradients(asked(**SMOL))
    ids = right["request"]["ids"]
    other = right | {"request": right["request"] | {"ids": (*ids[:24], *reversed(ids[24:]))}}
    found = workers[2].call("validate_cases:judged", mesh="1x2", **other)
    assert found["faults"] == ["decode"] and not found["passed"] and found["first_fault"] is None


def test_gradients_of_another_model_are_out_of_tolerance(
    workers: Workers, asked: Asked, models: TinyModels, tmp_path: Path
) -> None:
    given = asked(**SMOL)
    for file in Path(given["answers"]).iterdir():
        shutil.copy(file, tmp_path)
    from safetensors.torch import load_file, save_file

    gradients = load_file(tmp_path / "gradients.safetensors")
    name = "model.layers.0.self_attn.k_proj.weight"
    gradients[name][0] *= 2
    save_file(gradients, tmp_path / "gradients.safetensors")
    found = workers[2].call(
        "validate_cases:judged", mesh="1x2", request=given["request"], answers=str(tmp_path)
    )
    assert found["faults"] == ["gradients"]
    assert [gradient["name"] for gradient in found["gradients"] if not gradient["ok"]] == [name]


# -- its own reference process, and the command line


def test_the_public_function_asks_a_process_of_its_own(
    workers: Workers, models: TinyModels
) -> None:
    tiny = models(**SMOL)
    ids = reference.random_ids(1, 20, tiny.vocab)[0].tolist()
    document = workers[2].call(
        "validate_cases:validated", mesh="1x2", folder=tiny.folder, ids=ids, decode=0
    )
    assert document["passed"] and document["decode"] is None and document["prefill_tokens"] == 20
    with torch.no_grad():
        loss = tiny.model(torch.tensor([ids]), labels=torch.tensor([ids])).loss
    assert document["prefill"]["reference_perplexity"] == pytest.approx(float(loss.exp()), rel=1e-5)


def test_a_text_that_does_not_fit_is_refused(workers: Workers, models: TinyModels) -> None:
    calls = [
        {"ids": [1, 2, 3], "decode": 2},
        {"ids": [1, 2, 3], "decode": -1},
        {"ids": [1] * 2049},
        {"ids": [1, 2, 101], "decode": 0},
    ]
    said = workers[1].call("validate_cases:refused", folder=models(**SMOL).folder, calls=calls)
    assert {(kind, code) for kind, code, _ in said} == {("UsageError", 2)}
    expected = (("3 tokens", "2"), ("-1",), ("2049 tokens", "2048"), ("101",))
    for (_, _, message), parts in zip(said, expected, strict=True):
        assert says(message, *parts)


def test_a_reference_that_cannot_be_computed_says_why(
    workers: Workers, models: TinyModels, tmp_path: Path
) -> None:
    folder = str(shutil.copytree(models(**SMOL).folder, tmp_path / "model"))
    said = workers[1].call("validate_cases:vanished", folder=folder, ids=[1, 2, 3, 4])
    assert said.startswith("RunError ") and says(said, "exit code 1", "*.safetensors")


def test_the_reference_process_says_who_starts_it() -> None:
    said: list[str] = []
    assert theirs.main([], said.append) == 2
    assert "parallama validate" in said[0]


@pytest.fixture(scope="module")
def bare(models: TinyModels) -> str:
    return models(**SMOL).folder


def validate(workers: Workers, *arguments: str) -> Done:
    """The command, in a worker; it starts a process of its own for the reference."""
    asked = ["validate", *arguments]
    return Done(*workers[1].call("validate_cases:command", arguments=asked))


def test_a_model_without_a_tokenizer_is_validated_on_ids_that_are_given(
    workers: Workers, bare: str, tmp_path: Path
) -> None:
    file = tmp_path / "ids.json"
    file.write_text(json.dumps(list(range(40))))
    done = validate(workers, bare, "--tokens", str(file), "--decode", "3", "--grads")
    assert done.code == 0
    out = " ".join(done.out.split())
    for part in (
        "float32: passed",
        "37 tokens",
        "3 one by one",
        "perplexity",
        "0 of 28",
        "0 of 20",
    ):
        assert part in out, part


FEW = ("--prompt-tokens", "12", "--decode", "3")


@pytest.fixture
def with_nan(bare: str, tmp_path: Path) -> str:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(bare, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_a_checkpoint_with_a_nan_fails_on_drawn_ids_with_exit_code_1_and_names_where_it_begins(
    workers: Workers, with_nan: str
) -> None:
    done = validate(workers, with_nan, *FEW, "--allow-nonfinite", "--seed", "5", "--json")
    document = json.loads(done.out)
    assert (done.code, done.err, document["passed"]) == (1, "", False)
    assert done.out.count("\n") == 1
    assert set(document) == KEYS | {"tokens_from"} and "seed 5" in document["tokens_from"]
    assert (document["prefill_tokens"], document["decode_tokens"]) == (12, 3)
    assert document["first_fault"] == "model.layers.1.mlp.up_proj"
    assert document["faults"] == ["prefill", "decode", "modules"]
    assert document["prefill"]["relative_l2"] is None, "JSON has no NaN"


@pytest.mark.slow
def test_a_failed_validation_names_its_parts_and_the_first_module_in_words(
    workers: Workers, with_nan: str
) -> None:
    done = validate(workers, with_nan, *FEW, "--allow-nonfinite")
    out = " ".join(done.out.split())
    assert done.code == 1 and "FAILED: prefill, decode, modules" in out
    assert "model.layers.1.mlp.up_proj" in out


def test_a_bad_tokens_file_is_refused_with_its_name(
    workers: Workers, bare: str, tmp_path: Path
) -> None:
    for name, content, part in (
        ("missing.txt", None, "No such file"),
        ("broken.json", b"[1, 2", "JSON"),
        ("object.json", b'{"ids": [1]}', "token ids"),
        ("floats.json", b"[1.5]", "token ids"),
        ("bytes.txt", bytes(range(256)), "UTF-8"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        done = validate(workers, bare, "--tokens", str(tmp_path / name))
        check_refusal(done, 2, name, part)


def test_fewer_tokens_than_asked_for_is_an_error_not_a_shorter_run(
    workers: Workers, bare: str, tmp_path: Path
) -> None:
    (tmp_path / "ids.json").write_text("[1, 2, 3, 4]")
    sizes = ("--prompt-tokens", "8", "--decode", "2")
    done = validate(workers, bare, "--tokens", str(tmp_path / "ids.json"), *sizes)
    assert done.code == 2 and all(part in done.err for part in ("4 tokens", "10", "8", "2"))
    (tmp_path / "text.txt").write_text("Some words")
    done = validate(workers, bare, "--tokens", str(tmp_path / "text.txt"))
    assert done.code == 2 and "tokenizer" in done.err


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "dtype"), [("1x8", "float32"), ("1x2", "bfloat16")])
def test_the_trained_model_passes_on_the_shipped_text(
    workers: Workers, mesh: str, dtype: str
) -> None:
    arguments = [
        "validate",
        "smollm2",
        "--mesh",
        mesh,
        "--dtype",
        dtype,
        "--prompt-tokens",
        "128",
        "--decode",
        "16",
        "--json",
    ]
    code, out, _ = workers[devices(mesh)].call("validate_cases:command", arguments=arguments)
    document = json.loads(out)
    assert code == 0 and document["passed"] and document["tokens_from"] == "shipped text"
    assert 1 < document["prefill"]["reference_perplexity"] < 60
    assert len(document["modules"]) == 2 + 30 * 12 + 2


@pytest.mark.slow
def test_every_gradient_of_the_trained_model_is_the_references(workers: Workers) -> None:
    """Its norms cancel large contributions.

    What the loss's sum over 49,152 ids loses in float32 shows here, and in no tiny model.
    """
    arguments = [
        "validate",
        "smollm2",
        "--mesh",
        "1x2",
        "--prompt-tokens",
        "96",
        "--decode",
        "8",
        "--grads",
        "--json",
    ]
    code, out, _ = workers[2].call("validate_cases:command", arguments=arguments)
    document = json.loads(out)
    assert code == 0 and document["passed"] and len(document["gradients"]) == 272
    limit = document["tolerances"]["gradients_relative_l2"]
    assert [
        gradient for gradient in document["gradients"] if not gradient["relative_l2"] < limit / 2
    ] == [] and limit < 2e-4


# -- what it is made of


def test_the_shipped_text_is_some_thousand_words() -> None:
    text = shipped_text.shipped()
    assert text.startswith("We the People of the United States") and 2000 < len(text.split()) < 5000


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "smollm3", "seed_oss"])
def test_points_cover_every_module_with_weights_once_and_inputs_come_first(
    models: TinyModels, family: str
) -> None:
    tiny = models(family=family, heads=4, kv_heads=2)
    watched = activations(ModelSpec.from_config(tiny.model.config))
    names = [point.name for point in watched]
    with_weights = {
        name
        for name, module in tiny.model.named_modules()
        if list(module.parameters(recurse=False))
    }
    assert len(set(names)) == len(names) and with_weights <= set(names)
    assert {name for name, _ in tiny.model.named_modules()} >= set(names)
    for place, point in enumerate(watched):
        assert set(point.inputs) <= set(names[:place]), point
        assert point.like is None or point.like[0] in dict(tiny.model.named_parameters())


def test_a_host_model_is_the_checkpoint_as_transformers_loads_it(models: TinyModels) -> None:
    tiny = models(**SMOL)
    model = to_host(find(tiny.folder), torch.float32)
    ids = reference.random_ids(1, 9, tiny.vocab)
    assert torch.equal(reference.logits(model, ids), reference.logits(tiny.model, ids))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_figures_of_logits_are_what_their_definitions_say() -> None:
    generator = torch.Generator().manual_seed(0)
    wanted = 3 * torch.randn(150, 40, generator=generator)
    ours = wanted + 0.3 * torch.randn(150, 40, generator=generator)
    targets = torch.randint(40, (149,), generator=generator)
    found = compare_logits(ours, wanted, targets.tolist())
    assert found.pcc == pytest.approx(
        reference.pcc(ours, wanted)
    ) and found.relative_l2 == pytest.approx(reference.relative_l2(ours, wanted))
    assert found.max_abs_diff == pytest.approx(float((ours - wanted).abs().max()))
    assert found.top1_agreement == pytest.approx(
        float((ours.argmax(-1) == wanted.argmax(-1)).double().mean())
    )
    fives = [
        set(a.tolist()) & set(b.tolist())
        for a, b in zip(ours.topk(5).indices, wanted.topk(5).indices, strict=True)
    ]
    assert found.top5_agreement == pytest.approx(sum(len(five) for five in fives) / 750)
    divergence = torch.nn.functional.kl_div(
        ours.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert found.kl_nats == pytest.approx(float(divergence), rel=1e-5)
    for figure, logits in ((found.perplexity, ours), (found.reference_perplexity, wanted)):
        assert figure == pytest.approx(
            float(torch.nn.functional.cross_entropy(logits[:149], targets).exp()), rel=1e-5
        )
    assert compare_logits(ours, wanted, []).perplexity is None


@given(
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20),
    st.sampled_from([math.nan, math.inf, -math.inf]),
)
def test_nothing_is_near_what_is_not_finite(values: list[float], bad: float) -> None:
    right = torch.tensor(values)
    wrong = right.clone()
    wrong[-1] = bad
    assert relative_l2(right, right) == 0 == max_abs_diff(right, right)
    for pair in ((right, wrong), (wrong, right), (wrong, wrong)):
        assert not relative_l2(*pair) <= 1e30
    assert not pcc(wrong, right) > -2


@settings(max_examples=50)
@given(
    st.sampled_from(["float32", "bfloat16"]),
    st.integers(1, 256),
    st.integers(1, 1 << 17),
    st.integers(1, 200),
)
def test_tolerances_grow_with_terms_devices_and_depth_and_stay_below_a_fault(
    dtype: str, parts: int, terms: int, layers: int
) -> None:
    tolerance = Tolerance(dtype=dtype, devices=parts)
    more = Tolerance(dtype=dtype, devices=parts + 1)
    assert tolerance.unit_roundoff < tolerance.product(terms) < tolerance.product(terms + 1) < 0.1
    assert tolerance.product(terms) < more.product(terms)
    limits = Limits.of(tolerance, layers=layers, terms=terms)
    assert tolerance.product(terms) < limits.logits_relative_l2 < limits.gradients_relative_l2
    assert Tolerance(dtype="float32", devices=parts).depth(layers, terms) < 2e-3
