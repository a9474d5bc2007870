"""Loading holds the model once on the host, not twice."""

import json
import subprocess
import sys

import pytest
from forks import script

# On the CPU backend the devices' memory is the host's too: one copy is the model on its devices.
LOAD = """
import json, sys
from parallama.engine.torch_xla.mesh import DeviceMesh
mesh = DeviceMesh(sys.argv[1])
import torch, transformers.models.llama.modeling_llama
from transformers import AutoModelForCausalLM
from transformers.integrations.gguf import reader
# What the first transfer and the first program take is not the model's.
first = mesh.put(torch.zeros(8, 8), (None, None)) + 1
mesh.run()
import parallama
llm = parallama.load(sys.argv[2], mesh=mesh)
stats = llm.load_stats
print(json.dumps({
    "growth": stats.peak_rss_bytes - stats.baseline_rss_bytes,
    "largest": stats.largest_tensor_bytes,
    "file": llm.source.location.stat().st_size,
    "devices": llm.param_bytes_per_device(),
    "plan": llm.plan.parameter_bytes(4),
}))
"""

PROMPTS = """
import resource, sys
import parallama
llm = parallama.load("smollm2", mesh=sys.argv[1])
prompt = [[7 * number % 4000 + 10 for number in range(240)]]
for _ in range(3):
    llm.generate(prompt, max_new_tokens=1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    llm.generate(prompt, max_new_tokens=1)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 4)
"""


@pytest.mark.parametrize("mesh", ["1x1", "1x8"])
def test_loading_never_holds_a_second_full_copy(mesh):
    done = script(LOAD, mesh, "smollm2")
    assert done.code == 0, done.err[-2000:]
    found = json.loads(done.out)
    assert found["devices"] == found["plan"]
    # The model on its devices, the mapped file, and three of the largest tensor (a fifth of this
    # model), as quantized numbers become fp32.
    devices = sum(found["devices"])
    assert found["growth"] < devices + found["file"] + 3 * found["largest"] < 2 * devices


def test_a_mesh_that_repeats_every_tensor_takes_no_copy_for_each_device(models):
    """On 8x1: besides the devices the largest tensor (128 MB), and half as much for what stays.

    Copies for each device took six times the largest.
    """
    folder = models(
        heads=8, kv_heads=8, hidden=512, intermediate=16384, vocab=65536, layers=1, tied=True
    ).folder
    done = script(LOAD, "8x1", folder)
    assert done.code == 0, done.err[-2000:]
    found = json.loads(done.out)
    assert found["devices"] == found["plan"] and found["largest"] == 65536 * 512 * 4
    assert found["growth"] < sum(found["devices"]) + 1.5 * found["largest"]


@pytest.mark.parametrize(
    "mesh",
    [
        "1x2",
        *(
            pytest.param(mesh, marks=pytest.mark.slow)
            for mesh in ("1x1", "1x3", "1x4", "1x8", "2x4", "4x2", "8x1")
        ),
    ],
)
def test_on_the_way_to_any_mesh_is_never_more_than_the_largest_tensor(mesh, tmp_path_factory):
    from parallama.bench.shapes import make

    folder = tmp_path_factory.getbasetemp() / "l200"
    if not folder.exists():
        make("l200", folder)
    done = script(LOAD, mesh, str(folder))
    assert done.code == 0, done.err[-2000:]
    found = json.loads(done.out)
    assert found["devices"] == found["plan"]
    assert found["growth"] < sum(found["devices"]) + found["largest"]


@pytest.mark.parametrize("mesh", [pytest.param("1x1", marks=pytest.mark.slow), "1x2"])
def test_a_prompt_takes_the_memory_that_the_one_before_it_had(mesh):
    """Products' packed weights come and go, and are not given back to the system each time.

    Then a prompt took 112,000 pages (450 MB), and the time to clear them.
    """
    done = script(PROMPTS, mesh)
    assert done.code == 0, done.err[-2000:]
    assert int(done.out) < 5_000


def test_the_peak_is_this_programs_own_and_not_that_of_what_started_it():
    show = "from parallama.host import peak_rss_bytes; print(peak_rss_bytes())"
    large = f"""
import os, sys
held = bytearray(os.urandom(1)) * (300 << 20)
os.execv(sys.executable, [sys.executable, "-c", {show!r}])
"""
    done = subprocess.run([sys.executable, "-c", large], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout) < 200 << 20
