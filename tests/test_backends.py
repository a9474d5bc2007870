"""Starting devices in a process that has done things before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from forks import script
from messages import says

from parallama.engine.devices import discovery, plugins
from parallama.engine.torch_xla import backends, flags
from parallama.errors import BackendError, UsageError
from parallama.host import usable_cores

START = """
import os, sys
import torch, torch_xla
{before}
from parallama.engine.torch_xla import backends
from parallama.errors import FitError
try:
    print(backends.start("cpu", 2).devices, os.environ["XLA_FLAGS"])
except FitError as error:
    print(error)
sys.stdout.flush()
os._exit(0)  # joining XLA's threads can take long on a busy machine
"""


TWO_DEVICES = " ".join(
    f"{key}={value}"
    for key, value in {
        "PJRT_DEVICE": "CPU",
        "CPU_NUM_DEVICES": "2",
        **flags.cpu_threads(2, usable_cores(), os.environ),
    }.items()
)


def started(before: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", START.format(before=before)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_devices_start_after_another_package_has_imported_torch_xla_and_with_our_flags() -> None:
    devices, *flags = started("os.environ['XLA_FLAGS'] = '--xla_cpu_use_xnnpack=true'").split()
    assert devices == "2"
    assert flags == [
        "--xla_cpu_use_xnnpack=true",
        "--xla_disable_hlo_passes=tree_reduction_rewriter",
    ]


@pytest.mark.slow
def test_devices_do_not_start_once_torch_xla_runs_with_others() -> None:
    assert says(started("torch.ones(1).to('xla')"), "2 CPU device(s)", TWO_DEVICES)


ALONE = """
import os
import torch
from parallama.engine.torch_xla import backends
backends.start("cpu", 1)
print(int(torch.ones(3).to("xla").sum()), flush=True)
os._exit(0)
"""


def test_one_device_starts_below_a_process_that_has_several() -> None:
    """As a command does that a notebook with a model on several devices runs."""
    inherited = os.environ | {"XLA_USE_SPMD": "1", "CPU_NUM_DEVICES": "2", "PJRT_DEVICE": "CPU"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=120, env=inherited
    )
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr


LATER = """
import os, sys
from pathlib import Path
import torch
from parallama.engine.torch_xla import backends
backends.start("cpu", 1)
late = ("torch._inductor.lowering", "functorch.compile", "torch_xla.stablehlo",
        "torch_xla.experimental.gru")
print([name for name in late if name in sys.modules])
import torch_xla
example = (torch.ones(2, 3),)
exported = torch.export.export(torch.nn.Linear(3, 4), example)
torch_xla.save_as_stablehlo(exported, Path(sys.argv[1]))
print("torch_xla.stablehlo" in sys.modules)
from torch_xla.experimental.gru import GRU
print(torch.nn.GRU.__module__, GRU.__module__)
sys.stdout.flush()
os._exit(0)
"""


def test_what_torch_xla_imports_for_exports_and_grus_is_imported_when_it_is_used(
    tmp_path: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LATER, str(tmp_path / "exported")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "[]",
        "True",
        "torch.nn.modules.rnn torch_xla.experimental.gru",
    ]
    assert list((tmp_path / "exported" / "functions").iterdir())


def test_a_large_product_is_right_after_more_split_loops_than_a_threads_queue_holds() -> None:
    done = script(Path(__file__).with_name("long_program.py").read_text(), "1100", limit_s=900)
    assert done.code == 0, done.err[-3000:]
    found = json.loads(done.out)
    assert found["wrong"] == 0 and found["largest"] > 1


# -- plugins. The real one of the package xla-cpu-pjrt is too new to run a program, but makes a
# client. Under the name of Tenstorrent's file, whose backend takes newer plugins, it shows that
# everything is set and passed on before the client is made.

PLUGINS = """
import json, os, sys
from pathlib import Path
library, steps, variables = sys.argv[1], *map(json.loads, sys.argv[2:])
sys.path.insert(0, str(Path(library).parent))
os.environ |= variables
from parallama.engine.torch_xla import backends
from parallama.errors import ParallamaError
said = []
for name, devices, options, grid in steps:
    try:
        name, grid = name.format(library=library), grid and tuple(grid)
        got = backends.start(name, devices, options, grid=grid)
        found = [got.name, got.devices, str(got.library), str(got.api), dict(got.options)]
        said.append([*found, backends.device_names()])
    except ParallamaError as error:
        said.append([type(error).__name__, error.exit_code, *str(error).splitlines()])
import torch_xla.runtime as xr
names = ("PJRT_DEVICE", "XLA_STABLEHLO_COMPILE", "CONVERT_SHLO_TO_SHARDY", "MESH_SHAPE",
         "ENABLE_AUTO_PARALLEL", "TT_METAL_RUNTIME_ROOT")
environment = {name: os.environ.get(name) for name in names}
print(json.dumps({"said": said, "environment": environment, "spmd": xr.is_spmd()}))
sys.stdout.flush()
os._exit(0)
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pjrt_plugin_tt.so` as Tenstorrent's package has it, and packages with entry points."""
    folder = tmp_path_factory.mktemp("tt")
    real = plugins.find("xla_cpu_pjrt")
    assert real is not None
    (folder / "tt-metal").mkdir()
    (folder / "pjrt_plugin_tt.so").symlink_to(real)
    (folder / "mine-1.dist-info").mkdir()
    (folder / "mine-1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: mine\nVersion: 1\n"
    )
    (folder / "mine-1.dist-info" / "entry_points.txt").write_text(
        "[torch_xla.plugins]\nmine = mine:Mine\nbroken = no_such_module:Plugin\n"
        "nowhere = mine:Nowhere\n"
    )
    (folder / "mine.py").write_text(
        "from torch_xla.experimental.plugins import DevicePlugin\n"
        "print('hello on standard output')\n"
        "class Mine(DevicePlugin):\n"
        f"    def library_path(self):\n        return {str(real)!r}\n"
        "class Nowhere(DevicePlugin):\n"
        "    def library_path(self):\n        raise OSError('the driver is not installed')\n"
    )
    return folder / "pjrt_plugin_tt.so"


def run_plugins(
    library: Path,
    *steps: tuple[str, int | None, dict[str, Any], tuple[int, int] | None],
    **more: str,
) -> dict[str, Any]:
    done = script(PLUGINS, str(library), json.dumps(steps), json.dumps(more))
    assert done.code == 0, done.err[-2000:]
    return json.loads(done.out)


def test_a_tenstorrent_plugin_by_path_gets_its_options_and_environment_before_its_client_is_made(
    library: Path,
) -> None:
    options = {"cpu_device_count": 2}
    run = run_plugins(
        library,
        ("{library}", 2, options, (1, 2)),
        ("{library}", 2, options, (1, 2)),
        ("tt", 2, {}, None),
        ("cpu", 2, {}, None),
    )
    first, again, other_options, other_backend = run["said"]
    assert first == again == ["tt", 2, str(library), "0.81", options, ["CPU:0", "CPU:1"]]
    assert other_options[:2] == other_backend[:2] == ["FitError", 4]
    assert says("\n".join(other_options[2:]), "2 tt ", "other backend options")
    assert says("\n".join(other_backend[2:]), "2 tt ", "2 cpu ")
    assert run["spmd"] is True
    assert run["environment"] == {
        "PJRT_DEVICE": "TT",
        "XLA_STABLEHLO_COMPILE": "1",
        "CONVERT_SHLO_TO_SHARDY": None,
        "MESH_SHAPE": "1,2",
        "ENABLE_AUTO_PARALLEL": "TRUE",
        "TT_METAL_RUNTIME_ROOT": str(library.parent / "tt-metal"),
    }


def test_plugins_that_do_not_fit_are_refused_and_the_device_count_is_the_machines(
    library: Path,
) -> None:
    steps = [
        ("mine", None, {}, None),
        ("broken", None, {}, None),
        ("nowhere", None, {}, None),
        ("neuron", None, {}, None),
    ]
    run = run_plugins(
        library,
        *steps,
        ("tt", 3, {"cpu_device_count": 2}, None),
        ("tt", 2, {}, None),
        PJRT_NAMES_AND_LIBRARY_PATHS=f"tt:{library}",
    )
    mine, broken, nowhere, neuron, three, late = run["said"]
    for (kind, code, *lines), parts in (
        (mine, ("0.81", "0.75")),
        (broken, ("'broken'", "no_such_module:Plugin")),
        (nowhere, ("'nowhere'", "the driver is not installed")),
        (neuron, ("'neuron'", "'libneuronxla'")),
    ):
        assert (kind, code) == ("BackendError", 5) and says("\n".join(lines), *parts), lines
    assert three[:2] == late[:2] == ["FitError", 4]
    assert says("\n".join(three[2:]), "3 devices", "'tt' has 2")
    assert says("\n".join(late[2:]), "'tt'", "load the model first")


def test_one_device_of_a_plugin_runs_without_spmd_and_a_variable_of_the_user_stays(
    library: Path,
) -> None:
    run = run_plugins(
        library, ("{library}", 1, {"cpu_device_count": 1}, (1, 1)), XLA_STABLEHLO_COMPILE="0"
    )
    assert run["said"][0][:2] == ["tt", 1]
    assert run["spmd"] is False
    assert (
        run["environment"]["MESH_SHAPE"] is None
        and run["environment"]["XLA_STABLEHLO_COMPILE"] == "0"
    )


def test_a_client_that_cannot_be_made_is_told_with_the_plugins_words(library: Path) -> None:
    run = run_plugins(library, ("{library}", None, {"cpu_device_count": "many"}, None))
    kind, code, *lines = run["said"][0]
    assert (kind, code) == ("BackendError", 5)
    # Text where a number was expected: the plugin's own words.
    assert says("\n".join(lines), "'tt'", "Unexpected index", library, "0.81")


def test_backends_that_are_not_there_say_what_to_do() -> None:
    for name, parts in {
        "tpu": ("libtpu", "pip install 'torch_xla[tpu]==2.9.0'"),
        "tt": ("pjrt-plugin-tt", "pjrt_plugin_tt.so"),
        "abacus": ("cpu, tpu, tt, xla_cpu_pjrt", ".so"),
    }.items():
        with pytest.raises(BackendError) as caught:
            discovery.find(name)
        assert says(caught.value, repr(name), *parts)


def test_environment_variables_name_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PJRT_NAMES_AND_LIBRARY_PATHS", "tpu:/a/tpu.so,mine:/b/mine.so")
    assert discovery.library_of("mine") == Path("/b/mine.so") and discovery.library_of(
        "tpu"
    ) == Path("/a/tpu.so")
    monkeypatch.setenv("TPU_LIBRARY_PATH", "/c/libtpu.so")
    assert discovery.library_of("tpu") == Path("/c/libtpu.so")


def test_the_cpu_takes_no_options() -> None:
    with pytest.raises(UsageError) as caught:
        backends.start("cpu", 1, {"count": 8})
    assert says(caught.value, "'count'", "cpu")
