"""Faults of the engine that were found and mended: what holds instead."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import plugin_maker
import pytest
import reference
import torch

from parallama.engine.devices import plugins

MOST_IDS = 1 << 26  # of a vocabulary
EXACT = 1 << 24  # below, fp32 tells whole numbers apart


def python(script: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """A script in a process of its own, without what this one has set for devices."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("PJRT_", "XLA_", "CPU_NUM_", "TF_CPP_"))
    }
    return subprocess.run(
        [sys.executable, *arguments[:-1], "-c", script, *arguments[-1:]],
        capture_output=True,
        text=True,
        timeout=300,
        env=kept | more,
    )


# -- token ids and counts beyond what fp32 tells apart


def test_every_token_id_comes_through_a_float_as_it_was(workers: Any) -> None:
    ids = [0, 1, EXACT - 1, EXACT, EXACT + 1, 2 * EXACT + 1, 3 * EXACT + 7, MOST_IDS - 1]
    assert workers[1].call("engine_fault_cases:wholes", numbers=ids) == ids


@pytest.mark.parametrize("mesh", [pytest.param("1x1", marks=pytest.mark.slow), "1x2"])
def test_a_token_whose_id_fp32_cannot_hold_is_chosen_and_scored_by_its_own_id(
    workers: Any, mesh: str
) -> None:
    vocab, best = EXACT + 12, EXACT + 5
    worker = workers[int(mesh[-1])]
    tokens, logprobs = worker.call(
        "engine_fault_cases:largest", mesh=mesh, vocab=vocab, best=[best]
    )
    assert tokens == [best] and logprobs[0] < 0
    assert worker.call(
        "engine_fault_cases:greedy_targets",
        mesh=mesh,
        vocab=vocab,
        best=best,
        targets=[best, best - 1],
    ) == [True, False]


def test_top_k_keeps_as_many_tokens_as_asked_for_beyond_what_fp32_counts(workers: Any) -> None:
    wanted = EXACT + 50
    kept = workers[1].call("engine_fault_cases:kept_of", vocab=EXACT + 100, top_k=wanted)
    assert kept == wanted


def test_every_micro_step_of_a_long_run_draws_its_own_dropout(workers: Any, models: Any) -> None:
    """Of step 2^24 with two micro-steps each: their numbers are beyond what fp32 tells apart."""
    tiny = models()
    ids = reference.random_ids(4, 8, tiny.vocab).numpy().reshape(2, 2, 8)
    blank = {
        "ids": ids,
        "positions": np.broadcast_to(np.arange(8), ids.shape).copy(),
        "documents": np.zeros_like(ids),
    }
    text = np.stack([ids[0], ids[0]])
    batches = []
    for counted in range(2):  # the same text in both micro-steps; only one of them counts
        labels = np.full_like(text, -100)
        labels[counted] = text[counted]
        batches.append(blank | {"ids": text, "labels": labels})
    first, second = workers[1].call(
        "engine_fault_cases:dropped_gradients",
        model=tiny.folder,
        mesh="1x1",
        step=EXACT,
        batches=batches,
    )
    assert first.keys() == second.keys() and first
    assert all(not torch.allclose(first[name], second[name]) for name in first)


# -- what stays behind


def test_an_operation_is_registered_once_however_often_it_is_traced(workers: Any) -> None:
    assert workers[1].call("engine_fault_cases:operations_of_maxima", times=20) == 0


@pytest.mark.parametrize("mesh", ["1x1", "1x2"])
def test_a_step_that_breaks_while_it_is_traced_leaves_no_graph_and_no_donation(
    workers: Any, mesh: str
) -> None:
    found = workers[int(mesh[-1])].call("engine_fault_cases:after_a_broken_step", mesh=mesh)
    assert found == {"ran": 0, "double": [64.0, 64.0], "state": 32.0}


@pytest.mark.parametrize("mesh", ["1x1", "1x2"])
def test_a_tensor_that_one_program_donates_may_be_read_by_another_before(
    workers: Any, mesh: str
) -> None:
    found = workers[int(mesh[-1])].call("engine_fault_cases:after_a_good_step", mesh=mesh)
    assert found == {"double": [64.0, 64.0], "state": 32.0}


UNGUARDED = """
import sys
sys.path.insert(0, sys.argv[1])
assert False  # gone: this runs with -O
import os, torch
from parallama.errors import ParallamaError
from parallama.engine.torch_xla.mesh import DeviceMesh
from engine_fault_cases import not_compiled
kinds = not_compiled("1x1")
numbers = torch.arange(64, dtype=torch.float32)
for tensor in (numbers[1:], numbers.reshape(8, 8).T):
    try:
        DeviceMesh("1x1").adopt(tensor)
    except ParallamaError as error:
        kinds.append(type(error).__name__)
    else:
        kinds.append("none")
print(*kinds)
sys.stdout.flush()
os._exit(0)
"""


def test_guards_hold_without_asserts() -> None:
    done = python(UNGUARDED, "-O", str(Path(__file__).parent))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["ProgramError"] * 3 + ["UsageError"] * 2


# -- which plugin runs

PLUGINS = """
import json, os, sys
from parallama.engine.torch_xla import backends
from parallama.engine.torch_xla.mesh import DeviceMesh
from parallama.errors import ParallamaError
first, asked = json.loads(sys.argv[1])
mesh = DeviceMesh("1x2", backend=first, backend_options={"cpu_device_count": 2})
said = [[str(mesh.backend.library)], [str(mesh.reshaped(type(mesh.shape)(data=2)).shape)]]
for name in asked:
    try:
        started = backends.start(name, 2, {"cpu_device_count": 2})
        said.append([str(started.library)])
    except ParallamaError as error:
        said.append([type(error).__name__, error.exit_code, str(error)])
print(json.dumps(said))
sys.stdout.flush()
os._exit(0)
"""


def test_another_plugin_of_the_same_file_name_is_not_taken_for_the_one_that_runs(
    tmp_path: Path,
) -> None:
    """The real plugin is too new to run a program, but as Tenstorrent's file it makes a client."""
    real = plugins.find("xla_cpu_pjrt")
    assert real is not None
    folders = [tmp_path / name for name in ("first", "link", "second")]
    first, link, second = (folder / "pjrt_plugin_tt.so" for folder in folders)
    for folder in folders:
        folder.mkdir()
    first.symlink_to(real)
    link.symlink_to(first)
    plugin_maker.make(second)
    missing = tmp_path / "pjrt_plugin_tt.so"
    asked = [str(path) for path in (first, link, second, missing)] + ["tt"]
    variables = {"PJRT_NAMES_AND_LIBRARY_PATHS": f"tt:{second}"}
    done = python(PLUGINS, json.dumps([str(first), asked]), **variables)
    assert done.returncode == 0, done.stderr[-2000:]
    runs, reshaped, again, by_link, other, not_there, named = json.loads(done.stdout)
    assert runs == again == by_link == [str(first)]
    assert reshaped == ["2x1"]
    for refused in (other, named):
        assert refused[:2] == ["FitError", 4]
        assert repr(str(first)) in refused[2] and repr(str(second)) in refused[2]
    assert not_there[:2] == ["FitError", 4]


def test_a_plugin_file_does_not_pass_for_a_backend_that_it_only_shares_its_name_with() -> None:
    names = [plugins.name_of(Path("/a") / file) for file in ("cpu.so", "tpu.so", "tt.1.so", "x.so")]
    assert names == ["cpu.so", "tpu.so", "tt.1.so", "x"]


CPU_THEN_FILE = """
import os, sys
from parallama.engine.torch_xla import backends
from parallama.errors import FitError
backends.start("cpu", 1)
try:
    print(backends.start(sys.argv[1], 1).name)
except FitError:
    print("refused")
sys.stdout.flush()
os._exit(0)
"""


def test_a_plugin_file_called_cpu_does_not_get_the_cpu_backend(tmp_path: Path) -> None:
    done = python(CPU_THEN_FILE, str(plugin_maker.make(tmp_path / "cpu.so")))
    assert (done.returncode, done.stdout) == (0, "refused\n"), done.stderr[-2000:]


# -- what XLA logs

LOGS = """
import os, sys
for name in sys.argv[1].split():
    __import__(name)
import parallama
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
                     num_key_value_heads=2, intermediate_size=32, vocab_size=64)
model = parallama.shard_model(LlamaForCausalLM(config), parallama.DeviceMesh("1x2"))
import torch
print(model(input_ids=torch.arange(4)[None], use_cache=False).logits.cpu().shape[-1])
sys.stdout.flush()
os._exit(0)
"""
XLA_LINE = re.compile(r"^\d{4}-\d\d-\d\d .*: [IWEF] ", re.MULTILINE)


@pytest.mark.parametrize("before", ["", "torch_xla", "transformers"])
def test_from_python_xla_logs_nothing_about_what_it_compiles(before: str) -> None:
    done = python(LOGS, before)
    assert (done.returncode, done.stdout) == (0, "64\n"), done.stderr[-2000:]
    assert not XLA_LINE.search(done.stderr), done.stderr


@pytest.mark.parametrize("level", ["0", "1"])
@pytest.mark.parametrize("before", ["", "torch_xla"])
def test_a_log_level_of_the_users_stays(before: str, level: str) -> None:
    done = python(LOGS, before, TF_CPP_MIN_LOG_LEVEL=level)
    assert (done.returncode, done.stdout) == (0, "64\n"), done.stderr[-2000:]
    assert XLA_LINE.search(done.stderr)


# -- activations


@pytest.mark.parametrize("activation", ["gelu_pytorch_tanh", "gelu", "silu"])
def test_an_activation_with_options_is_computed_with_them(
    workers: Any, models: Any, activation: str
) -> None:
    tiny = models(hidden_act=activation, layers=1)
    text = reference.random_ids(1, 12, tiny.vocab)[0].tolist()
    (got,) = workers[1].call("device_cases:logits_of", folder=tiny.folder, mesh="1x1", texts=[text])
    wanted = reference.logits(tiny.model, torch.tensor([text]))[0]
    assert torch.allclose(got, wanted, rtol=0, atol=2e-5)
