"""`parallama doctor`: what it reports, and that its self-test passes, fails, crashes and hangs."""

from __future__ import annotations

import io
import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import packaging
import pytest
import torch
from forks import Done, command
from messages import check_refusal, says
from plugin_maker import make

from parallama import host, isolated_process
from parallama.cli.doctor import render
from parallama.engine.devices import faults, plugins, versions
from parallama.engine.devices.faults import known
from parallama.engine.torch_xla import selftest
from parallama.prove import doctor
from parallama.prove.doctor import BackendState, Report

STOCK: dict[str, Any] = {
    "torch": "2.9.1",
    "torch_xla": "2.9.0",
    "transformers": "5.23.0",
    "partitioner": "gspmd",
    "features": [],
}


def run(*arguments: str) -> Done:
    return command(["doctor", *arguments])


@pytest.fixture(scope="module")
def report() -> Report:
    """One examination of the cpu backend, self-test included."""
    return doctor.examine("cpu")


@pytest.fixture(scope="module")
def too_new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real plugin of xla-cpu-pjrt as Tenstorrent's: it starts, and runs no program."""
    library = tmp_path_factory.mktemp("tt") / "pjrt_plugin_tt.so"
    real = plugins.find("xla_cpu_pjrt")
    assert real is not None
    library.symlink_to(real)
    return library


def rendered(report: Report) -> str:
    from rich.console import Console

    out = io.StringIO()
    render(report, Console(file=out, width=160))
    return out.getvalue()


# -- the self-test


def test_the_self_test_runs_three_checks_on_two_virtual_devices_and_passes(report: Report) -> None:
    test = report.self_test
    assert test.passed and (test.exit_code, test.error, test.mesh) == (0, None, "1x2")
    assert test.devices == ("CPU:0", "CPU:1")
    assert [check["name"] for check in test.checks] == [
        "sharded product",
        "all-reduce",
        "donated buffer",
    ]
    assert all(check["passed"] for check in test.checks)
    product, reduced, donated = (check["max_error"] for check in test.checks)
    # Float32 against float64: not the same numbers, unless nothing was computed.
    assert 0 < product < 1e-4 and 0 < reduced < 1e-4 and donated == 0
    assert test.took_s > 0


def test_a_wrong_result_fails_its_check() -> None:
    wanted = torch.ones(2, 3, dtype=torch.float64)
    assert selftest.compare("x", torch.full((2, 3), 1.5), wanted, 0.4).passed is False
    assert selftest.compare("x", torch.full((2, 3), 1.5), wanted, 0.6).passed is True
    nan = selftest.compare("x", torch.tensor([[1.0, 1.0, float("nan")]] * 2), wanted, 1e9)
    assert not nan.passed and nan.said == "the result is not finite"
    shape = selftest.compare("x", torch.ones(3), wanted, 1e9)
    assert not shape.passed and shape.said == "the result is [3], expected [2, 3]"


def test_a_plugin_that_cannot_run_a_program_fails_with_its_own_words_and_exit_code_1(
    too_new: Path,
) -> None:
    done = run("--backend", str(too_new), "--backend-option", "cpu_device_count=2", "--json")
    assert done.code == 1, done.err
    test = json.loads(done.out)["self_test"]
    assert not test["passed"] and test["exit_code"] == 1 and test["checks"] == []
    assert "size: expected" in test["error"] and "PJRT API version 0.81" in test["error"]
    assert done.err.startswith("parallama: ") and says(done.err, f"{str(too_new)!r}")


def test_a_plugin_that_crashes_is_reported_with_exit_code_1(tmp_path: Path) -> None:
    library = make(tmp_path / "crash.so")  # it fits, and has no functions
    done = run("--backend", str(library))
    assert done.code == 1
    assert done.err.startswith("parallama: ")
    assert says(done.err, f"{str(library)!r}", "SIGSEGV")
    assert "torch_xla" in done.out, "the page is printed all the same"


@pytest.mark.slow
def test_a_plugin_that_hangs_is_ended_at_the_limit(tmp_path: Path) -> None:
    library = make(tmp_path / "hang.so", calls="hang")
    test = doctor.self_test(str(library), {}, 25)
    assert test.exit_code == 1 and says(test.error, "25 s")


def test_a_backend_that_is_not_there_is_reported_with_exit_code_5() -> None:
    done = run("--backend", "tt", "--json")
    assert done.code == 5
    document = json.loads(done.out)
    assert document["passed"] is False and document["self_test"]["exit_code"] == 5
    assert done.err.startswith("parallama: ") and says(done.err, "'tt'", "pjrt-plugin-tt")
    assert {fault["name"] for fault in document["faults"]} >= {"tt-spmd-1x1", "tt-stock-torch-xla"}


def test_a_bad_backend_option_is_a_usage_error() -> None:
    check_refusal(run("--backend-option", "count"), 2, "'count'")


# -- the report


def test_json_is_one_document_with_the_documented_keys(report: Report) -> None:
    document = json.loads(json.dumps(report.to_dict()))
    assert document["passed"] is True and document["backend"] == "cpu"
    documented = (Path(__file__).parents[1] / "docs" / "json.md").read_text()
    for key in keys(document):
        assert f"{key}`" in documented, key


def keys(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value) | {key for item in value.values() for key in keys(item)}
    return {key for item in value for key in keys(item)} if isinstance(value, list) else set()


def test_the_command_prints_the_same_and_exits_0_when_the_self_test_passed(report: Report) -> None:
    done = run("--json")
    assert (done.code, done.err) == (0, "")
    assert done.out.count("\n") == 1
    document = json.loads(done.out)
    volatile = {"memory_available_bytes", "self_test"}
    wanted = json.loads(json.dumps(report.to_dict()))
    assert {key: value for key, value in document.items() if key not in volatile} == {
        key: value for key, value in wanted.items() if key not in volatile
    }


def test_versions_are_those_installed_and_fit(report: Report) -> None:
    found = {item.name: item for item in report.versions}
    assert set(found) == {
        "python",
        "parallama",
        "torch",
        "torch_xla",
        "transformers",
        "safetensors",
        "tokenizers",
    }
    assert all(found[name].version == version(name) for name in found if name != "python")
    assert all(item.fits for item in report.versions)
    assert {(want.by, want.spec) for want in found["torch"].wanted} == {
        ("parallama", "==2.9.1"),
        ("torch_xla", "~=2.9.0"),
    }


def test_backends_say_whether_they_can_be_had_and_why_not(report: Report) -> None:
    found = {state.name: state for state in report.backends}
    assert found["cpu"].available is True
    assert (found["tpu"].available, found["tpu"].reason) == (False, "libtpu is not installed")
    assert (found["tt"].available, found["tt"].reason) == (
        False,
        "no plugin of Tenstorrent's is installed",
    )
    assert found["xla_cpu_pjrt"].available is False
    assert found["xla_cpu_pjrt"].reason.endswith(
        "speaks PJRT API 0.81, torch_xla 2.9.0 speaks 0.75"
    )
    assert found["neuron"].available is None, "only importing it would tell"


def test_a_plugin_that_fits_is_shown_with_its_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = make(tmp_path / "pjrt_plugin_tt.so", (0, 113))
    monkeypatch.setenv("PJRT_NAMES_AND_LIBRARY_PATHS", f"tt:{library}")
    found = {state.name: state for state in doctor.states()}
    assert found["tt"] == BackendState(
        name="tt",
        available=None,
        reason="the plugin fits; `parallama doctor --backend tt` tries the devices",
        library=str(library),
        pjrt_api="0.113",
    )


def test_the_page_shows_versions_backends_faults_and_checks(report: Report) -> None:
    page = rendered(report)
    for told in (
        "torch_xla      2.9.0",
        "libtpu is not installed",
        "CVE-2026-24747",
        "never unpickles",
        "all-reduce",
        "CPU:0 CPU:1; mesh 1x2",
        "passed in",
    ):
        assert re.sub(r" +", " ", told) in re.sub(r" +", " ", page), told
    broken = replace(
        report, self_test=replace(report.self_test, exit_code=1, error="wrong: all-reduce")
    )
    assert "failed in" in rendered(broken)


def test_the_machine_is_described(report: Report) -> None:
    name, features = host.processor()
    assert (report.cpu, report.cpu_features) == (name, tuple(features)) and name
    assert report.memory_bytes is not None and report.memory_available_bytes is not None
    assert (
        1e9
        < report.memory_available_bytes
        < report.memory_bytes
        == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    )


# -- versions


def test_a_version_that_does_not_fit_is_told_by_who_wants_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, number, wants in (
        ("torch", "2.8.0", ""),
        ("torch_xla", "2.9.0+git12", ""),
        ("transformers", "5.2.0", "tokenizers<0.20"),
    ):
        folder = tmp_path / f"{name}-{number}.dist-info"
        folder.mkdir()
        requires = (
            f"Requires-Dist: {wants}\nRequires-Dist: torch>=9; extra == 'x'\n"
            "Requires-Dist: not a requirement\n"
            if wants
            else ""
        )
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\nRequires-Python: >=3.99\n"
            f"{requires}"
        )
    monkeypatch.syspath_prepend(tmp_path)
    found = {item.name: item for item in versions.survey()}
    assert not any(found[name].fits for name in ("python", "torch", "transformers", "tokenizers"))
    assert found["torch_xla"].fits, "a fork of the same release"
    assert {(want.by, want.spec, want.fits) for want in found["torch"].wanted} == {
        ("parallama", "==2.9.1", False),
        ("torch_xla", "~=2.9.0", False),
    }
    assert ("transformers", "<0.20", False) in {
        (want.by, want.spec, want.fits) for want in found["tokenizers"].wanted
    }


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (
            "2.8.0",
            [
                "torch_xla 2.8.0 is installed",
                "expected 2.9.x, the release this package is made for",
            ],
        ),
        ("2.9.0+git12", None),
    ],
)
def test_another_torch_xla_is_refused_and_a_fork_of_the_same_release_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: str, said: list[str] | None
) -> None:
    folder = tmp_path / f"torch_xla-{number}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch_xla\nVersion: {number}\n")
    monkeypatch.syspath_prepend(tmp_path)
    if said is None:
        versions.check_torch_xla()
        return
    with pytest.raises(versions.BackendError) as caught:
        versions.check_torch_xla()
    assert str(caught.value).splitlines() == said
    assert doctor.states()[0] == BackendState(name="cpu", available=False, reason=said[0])


def test_a_missing_torch_xla_says_how_to_install_it(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p]\n"
        "from parallama.engine.devices import versions\nversions.check_torch_xla()"
    )
    source = Path(versions.__file__).parents[3]

    (tmp_path / "packaging").symlink_to(Path(packaging.__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{source}:{tmp_path}"},
        timeout=60,
    )
    assert "2.9.x" in done.stderr and "pip install torch_xla==2.9.0" in done.stderr


def test_the_partitioner_is_read_from_the_installed_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert versions.partitioner() == "gspmd"
    assert versions.onednn_fusions() is (platform.machine() == "x86_64")
    folder = tmp_path / "torch_xla-2.9.0+git12.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torch_xla\nVersion: 2.9.0+git12\n"
    )
    (folder / "RECORD").write_text("_XLAC.cpython-311-x86_64-linux-gnu.so,,\n")
    (tmp_path / "_XLAC.cpython-311-x86_64-linux-gnu.so").write_bytes(
        b"\0" * 100 + b"CONVERT_SHLO_TO_SHARDY\0"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert versions.partitioner() == "shardy" and not versions.onednn_fusions()


def test_a_version_that_cannot_be_read_is_older_than_none() -> None:
    assert versions.before("2.9.1", "2.10") and not versions.before("2.10.0", "2.10")
    assert not versions.before(None, "2.10") and not versions.before("unknown", "2.10")


# -- faults


def names(**given: Any) -> set[str]:
    return {fault.name for fault in known(**(STOCK | given))}


def test_each_fault_is_told_only_where_it_applies() -> None:
    cpu = names(backend="cpu")
    assert cpu == {
        "CVE-2026-24747",
        "gspmd",
        "compile-cache",
        "cpu-bf16",
        "cpu-one-process",
        "memory-info",
    }
    assert names(backend="tpu") == cpu - {"cpu-bf16", "cpu-one-process"}
    assert names(backend="tt") == {
        "CVE-2026-24747",
        "gspmd",
        "tt-stock-torch-xla",
        "tt-spmd-1x1",
        "memory-info",
    }
    assert names(backend="tt", partitioner="shardy") == {
        "CVE-2026-24747",
        "tt-spmd-1x1",
        "memory-info",
    }
    assert "CVE-2026-4372" in names(backend="cpu", transformers="5.2.1")
    assert "CVE-2026-24747" not in names(backend="cpu", torch="2.10.0")


def test_the_bf16_fault_says_what_the_processor_has() -> None:
    def said(features: list[str]) -> str:
        return next(
            fault.what
            for fault in known(**(STOCK | {"backend": "cpu", "features": features}))
            if fault.name == "cpu-bf16"
        )

    assert said(["avx2"]).endswith("this processor has no bf16 instructions either")
    assert said(["avx512_bf16", "amx_bf16"]).endswith(
        "though this processor has amx_bf16, avx512_bf16"
    )
    assert all(fault.what and fault.means for fault in faults.known(**(STOCK | {"backend": "tt"})))


# -- processes


def test_a_module_of_ours_that_fails_is_told_by_how_it_ended() -> None:
    ended = isolated_process.run_module(
        "parallama.engine.devices.plugins", "/nowhere.so", limit_s=60
    )
    assert (ended.code, ended.how, ended.out) == (1, "ended with exit code 1", "")
    assert ended.last_words.startswith("/nowhere.so: cannot open shared object file")
    assert isolated_process.Ended(code=-9, out="", err="").how == "died of SIGKILL"
    assert isolated_process.Ended(code=-63, out="", err="").how == "died of signal 63"
    assert isolated_process.Ended(code=None, out="", err="").how == "did not end in time"
