"""Loading holds the model once on the host, not twice."""

import json
import subprocess
import sys

import pytest

# On the CPU backend the devices' memory is the host's too: one copy is the model on its devices.
LOAD = """
import json, sys
from parallama.mesh import DeviceMesh
mesh = DeviceMesh(sys.argv[1])
import torch, transformers.models.llama.modeling_llama
from transformers import AutoModelForCausalLM
from transformers.integrations.gguf import reader
mesh.put(torch.zeros(8, 8), (None, None))
import parallama
llm = parallama.load("smollm2", mesh=mesh)
stats = llm.load_stats
print(json.dumps({"growth": stats.peak_rss_bytes - stats.baseline_rss_bytes, "largest": stats.largest_tensor_bytes,
    "file": llm.source.location.stat().st_size, "devices": llm.param_bytes_per_device(), "plan": llm.plan.parameter_bytes(4)}))
"""


@pytest.mark.parametrize("mesh", ["1x1", "1x8"])
def test_loading_never_holds_a_second_full_copy(mesh):
    done = subprocess.run([sys.executable, "-c", LOAD, mesh], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["devices"] == found["plan"]
    # The model on its devices, the file, which is mapped, and the largest tensor (a fifth of this model): quantized numbers as they are turned into fp32.
    devices = sum(found["devices"])
    assert found["growth"] < devices + found["file"] + 3 * found["largest"] < 2 * devices


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
