"""A second engine needs nothing but the door: `door_engine` runs sessions, loading, resharding,
scoring and inspection.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from door_engine import HostEngine, HostTensor
from reference import Tiny, TinyModels

import parallama
from parallama.engine.row_sampling import RowSampling
from parallama.errors import BackendError, ParallamaError, RunError
from parallama.evaluate.scorer import Scorer, Text
from parallama.prove.audit import audit, step_key
from parallama.prove.inspector import Inspector
from parallama.prove.validation import validate
from parallama.sharded.layout import Layout
from parallama.sharded.reshard import Mover, relay

SIZES: dict[str, Any] = {"heads": 6, "kv_heads": 3}  # over 4 and 8 devices: padded and repeated
MESHES = ["1x1", "1x2", "2x1", "2x4", "1x8"]


@pytest.fixture(scope="module")
def tiny(models: TinyModels) -> Tiny:
    return models(**SIZES)


def load(tiny: Tiny, mesh: str, **options: Any) -> parallama.LLM:
    return parallama.load(tiny.folder, mesh=HostEngine(mesh), **options)


# -- inference


@pytest.mark.parametrize("mesh", MESHES)
def test_generates_the_tokens_of_transformers(tiny: Tiny, mesh: str) -> None:
    llm = load(tiny, mesh)
    prompts = reference.random_prompts((3, 17, 1), tiny.vocab)
    found = llm.generate(prompts, max_new_tokens=8)
    for prompt, completion in zip(prompts, found, strict=True):
        tokens, logprobs = reference.greedy(tiny.model, prompt, 8)
        assert completion.token_ids == tokens
        assert completion.logprobs == pytest.approx(logprobs, abs=1e-4)
    assert llm.stats.programs_compiled == 2 and llm.stats.programs_after_warmup == 0
    assert llm.kv_bytes_per_device == llm.plan.cache_bytes(4, 512, 4)


def test_tied_embeddings_and_a_vocabulary_that_is_padded_make_no_difference(
    models: TinyModels,
) -> None:
    tiny = models(tied=True, family="qwen3", **SIZES)
    prompt = reference.random_prompts((9,), tiny.vocab)[0]
    found = load(tiny, "1x4").generate([prompt], max_new_tokens=6)[0]
    assert found.token_ids == reference.greedy(tiny.model, prompt, 6)[0]


def test_a_long_prompt_comes_in_chunks_and_the_cache_grows(tiny: Tiny) -> None:
    llm = load(tiny, "1x2")
    for length, room in ((250, 500), (530, 600)):
        prompt = reference.random_prompts((length,), tiny.vocab)[0]
        stream = llm.stream(prompt, max_new_tokens=room)
        tokens = [next(stream).token for _ in range(12)]
        assert tokens == reference.greedy(tiny.model, prompt, 12)[0]
        assert llm.stats.programs_after_warmup == 0


def test_a_conversation_goes_on_from_its_cache(tiny: Tiny) -> None:
    llm = load(tiny, "2x2")
    turns = reference.random_prompts((20, 5, 70), tiny.vocab)
    wanted = reference.greedy_turns(tiny.model, turns, 4)
    session = llm.session([RowSampling()], capacity=200, continued=True)
    taken: list[int] = []
    for turn, answer in zip(turns, wanted, strict=True):
        taken += turn
        said = [session.prefill([taken])[0].token]
        said += [choices[0].token for choices in session.decode(3)]
        assert said == answer
        taken += said
    assert session.stats.programs_after_warmup == 0
    assert session.stats.prefill_tokens < len(taken)


def test_a_row_that_has_ended_stays_as_it_is(tiny: Tiny) -> None:
    llm = load(tiny, "1x2")
    prompts = reference.random_prompts((5, 9), tiny.vocab)
    first, second = (reference.greedy(tiny.model, prompt, 6)[0] for prompt in prompts)
    end = next(token for token in first[1:4] if token not in second)
    llm.eos_ids[:] = [end]
    found = llm.generate(prompts, max_new_tokens=6)
    assert found[0].token_ids == first[: first.index(end) + 1]
    assert found[1].token_ids == second


@pytest.mark.parametrize("mesh", ["1x1", "2x4"])
def test_logits_are_those_of_transformers(tiny: Tiny, mesh: str) -> None:
    ids = reference.random_ids(3, 21, tiny.vocab)
    found = load(tiny, mesh).logits(ids)
    assert found.shape == (3, 21, tiny.vocab)
    torch.testing.assert_close(found, reference.logits(tiny.model, ids), rtol=1e-4, atol=1e-4)


def test_logits_of_tokens_that_are_fed_are_those_of_transformers(tiny: Tiny) -> None:
    llm = load(tiny, "2x2")
    ids = reference.random_ids(2, 12, tiny.vocab)
    session = llm.session([RowSampling()] * 2, capacity=12, longest_prompt=8, scored=True)
    session.prefill(ids[:, :8].tolist())
    found = torch.stack([session.feed(column.tolist()) for column in ids[:, 8:].T], 1)
    wanted = reference.logits(tiny.model, ids)[:, 8:]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_scores_are_those_of_transformers(tiny: Tiny) -> None:
    llm = load(tiny, "2x2", max_model_len=64)
    scorer = Scorer(llm, batch=2)
    texts = [Text(ids, 4) for ids in reference.random_prompts((30, 12, 7), tiny.vocab)]
    scorer.warm_up(texts)
    assert scorer.programs_compiled == 2
    for text, score in zip(texts, scorer(texts), strict=True):
        logits = reference.logits(tiny.model, torch.tensor([text.ids[:-1]]))[0, -4:]
        chances = torch.log_softmax(logits, -1).gather(1, torch.tensor(text.ids[-4:])[:, None])
        assert score.logprob == pytest.approx(float(chances.sum()), abs=1e-4)
        assert score.greedy == (logits.argmax(-1).tolist() == list(text.ids[-4:]))
    assert scorer.programs_after_warmup == 0


# -- tensors


@pytest.mark.parametrize("mesh", MESHES)
def test_a_checkpoint_is_on_the_devices_as_planned_and_comes_back_whole(
    tiny: Tiny, mesh: str
) -> None:
    llm = load(tiny, mesh)
    assert all(isinstance(tensor, HostTensor) for tensor in llm.weights.tensors.values())
    assert llm.param_bytes_per_device() == llm.plan.parameter_bytes(4)
    for name, parameter in tiny.model.named_parameters():
        assert torch.equal(llm.weights.fetch(name), parameter), name
    inspector = Inspector(llm, batch=2, max_model_len=256)
    assert inspector.inspect().findings == ()
    for name in inspector.select("model.layers.0.*.*.weight"):
        assert inspector.read(name)[1] == ()


def test_a_tensor_moves_between_meshes_bit_by_bit(tiny: Tiny) -> None:
    llm = load(tiny, "1x8")
    other = load(tiny, "2x4")
    name = "model.layers.0.self_attn.k_proj.weight"
    old, new = Layout.of(llm.plan, name), Layout.of(other.plan, name)
    mover = Mover(llm.mesh, other.mesh, [llm.weights.tensors[name]])
    moved = mover({name: llm.weights.tensors[name]}, lambda _: old, lambda _: new)[name]
    wanted = other.mesh.shards(other.weights.tensors[name])
    for part, expected in zip(other.mesh.shards(moved), wanted, strict=True):
        assert torch.equal(part, expected)
    back = relay(lambda: moved, other.mesh, new, llm.mesh, old)
    assert torch.equal(
        llm.mesh.fetch(back, old.axes), llm.mesh.fetch(llm.weights.tensors[name], old.axes)
    )
    assert mover.result().tensors == 1


def test_a_model_moves_to_another_mesh_while_a_stream_is_half_read(tiny: Tiny) -> None:
    llm = load(tiny, "1x8")
    prompt = reference.random_prompts((11,), tiny.vocab)[0]
    wanted = reference.greedy(tiny.model, prompt, 12)[0]
    stream = llm.stream(prompt, max_new_tokens=12)
    tokens = [next(stream).token for _ in range(4)]
    for mesh in ("2x4", "4x2", "8x1"):
        moved = llm.reshard(mesh)
        assert str(moved.after) == mesh and llm.mesh.shape == moved.after
        tokens += [next(stream).token for _ in range(2)]
    tokens += [chunk.token for chunk in stream]
    assert tokens == wanted
    assert llm.generate([prompt], max_new_tokens=12)[0].token_ids == wanted


def test_an_exported_model_is_the_checkpoint(tiny: Tiny, tmp_path: Path) -> None:
    load(tiny, "2x4").export(tmp_path / "out")
    again = load(Tiny(tiny.model, str(tmp_path / "out")), "1x2")
    for name, parameter in tiny.model.named_parameters():
        assert torch.equal(again.weights.fetch(name), parameter), name


# -- what another engine has not


def refusal(error: ParallamaError) -> str:
    assert len(str(error).splitlines()) <= 3
    return str(error)


def test_what_needs_torch_xla_is_refused_at_once_with_the_backends_name(tiny: Tiny) -> None:
    llm = load(tiny, "1x2")
    ids = reference.random_prompts((12,), tiny.vocab)[0]
    made = llm.mesh.compilations()
    for gradients in (False, True):
        with pytest.raises(BackendError) as caught:
            validate(llm, ids, decode=2, gradients=gradients)
        assert "'host'" in refusal(caught.value) and "torch-xla" in refusal(caught.value)
    assert llm.mesh.compilations() == made
    with pytest.raises(RunError) as no_hlo:
        audit(llm.steps, llm.programs, "decode", step_key("decode", 1, 16, 1))
    assert "'host'" in refusal(no_hlo.value)


def test_nothing_of_torch_xla_is_imported(tiny: Tiny) -> None:
    """In a process where it cannot be."""
    prompt = reference.random_prompts((5,), tiny.vocab)[0]
    code = f"""if True:
        import sys
        sys.modules["torch_xla"] = sys.modules["torch_xla.core"] = None
        import parallama
        from door_engine import HostEngine
        from parallama.evaluate.scorer import Scorer, Text
        llm = parallama.load({tiny.folder!r}, mesh=HostEngine("1x2"))
        tokens = llm.generate([{prompt}], max_new_tokens=5)[0].token_ids
        llm.reshard(HostEngine("2x1"))
        assert llm.generate([{prompt}], max_new_tokens=5)[0].token_ids == tokens
        scorer, texts = Scorer(llm, batch=2), [Text({prompt}, 2)]
        scorer.warm_up(texts)
        scorer(texts)
        engines = ("torch_xla", "_XLAC", "parallama.engine.torch_xla")
        loaded = [name for name in sys.modules if name.startswith(engines)]
        print(tokens, sorted(loaded))
    """
    folder = Path(__file__).parent
    environment = dict(os.environ) | {
        "USE_TORCH_XLA": "0",  # accelerate's, which transformers imports
        "PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    wanted = reference.greedy(tiny.model, prompt, 5)[0]
    assert done.stdout.strip() == f"{wanted} ['torch_xla', 'torch_xla.core']"
