"""What another process, a program's text or a caller can do wrong is an error of ours, in three
lines that name it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference
import train_models
from conftest import Workers
from plugin_maker import make
from reference import TinyModels

from parallama.bench import load, profile
from parallama.bench.processes import EngineProcess
from parallama.engine.devices import plugins
from parallama.engine.devices.plugins import ApiVersion
from parallama.errors import (
    BackendError,
    CheckpointError,
    FitError,
    ParallamaError,
    RunError,
    UsageError,
    from_reply,
    to_reply,
)
from parallama.files.chat_template import Renderer
from parallama.prove import doctor, hlo
from parallama.prove import reference as theirs

COMMAND = str(Path(sys.executable).with_name("parallama"))
SELF_TEST = "parallama.engine.torch_xla.selftest"
END = "sys.stdout.flush(); os._exit(0)"
# What a child does in place of an answer -> what is told of it.
ENDS: dict[str, tuple[str, str]] = {
    "silence": (END, "printed nothing"),
    "garbage": (f"print('no JSON'); {END}", "'no JSON'"),
    "half a JSON": (f"""print('{{"checks": [{{"na', end=""); {END}""", '{"checks": [{"na'),
    "another JSON": (f"print('[1, 2]'); {END}", "[1, 2]"),
    "a deep JSON": (f"print('[' * 100_000); {END}", "[[[["),
    "an answer, and more": (f"""print('{{"seconds": 1}}\\nbye'); {END}""", "'bye'"),
    "an object without what was asked": (f"""print('{{"a": 1}}'); {END}""", "{'a': 1}"),
    "a signal": ("os.kill(os.getpid(), 9)", "died of SIGKILL"),
    "an exit code": ("sys.stderr.write('no luck\\n'); os._exit(7)", "exit code 7"),
}
each_end = pytest.mark.parametrize(("code", "told"), ENDS.values(), ids=ENDS)
Misbehave = Callable[[str, str], None]


@pytest.fixture
def misbehave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Misbehave:
    """`misbehave(module, code)`: processes that are started to run `module` run `code`
    before it.
    """

    def plant(module: str, code: str) -> None:
        folder = tmp_path / "site"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(
            f"import json, os, sys\nif {module!r} in sys.orig_argv:\n    {code}\n"
        )
        monkeypatch.setenv("PYTHONPATH", f"{folder}:{os.environ.get('PYTHONPATH', '')}")

    return plant


def is_told(error: BaseException, *parts: str) -> None:
    """At most three lines, that name all of this."""
    assert isinstance(error, ParallamaError), repr(error)
    assert len(str(error).splitlines()) <= 3 and "Traceback" not in str(error)
    for part in parts:
        assert part in str(error), (part, str(error))


# -- processes that give no answer, or another one


def test_a_plugin_that_ends_the_self_test_with_0_and_says_nothing_has_failed(
    tmp_path: Path,
) -> None:
    library = make(tmp_path / "exit.so", calls="exit")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PJRT_")}
    done = subprocess.run(
        [COMMAND, "doctor", "--backend", str(library), "--json"],
        capture_output=True,
        text=True,
        timeout=300,
        env=kept,
    )
    assert done.returncode == 1, done.stderr
    test = json.loads(done.stdout)["self_test"]
    assert (test["passed"], test["exit_code"], test["checks"]) == (False, 1, [])
    assert "exit code 0 and printed nothing" in test["error"]
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) <= 3


@each_end
def test_the_self_test_fails_with_what_came_in_place_of_an_answer(
    misbehave: Misbehave, code: str, told: str
) -> None:
    misbehave(SELF_TEST, code)
    test = doctor.self_test("cpu", {}, 60)
    assert (test.passed, test.exit_code, test.checks) == (False, 1, ())
    assert test.error is not None and told in test.error and len(test.error.splitlines()) <= 2


@pytest.mark.parametrize(
    "answer",
    [
        {"checks": []},
        {"checks": [{"name": "sum"}]},
        {"checks": "all"},
        {"error": 3, "exit_code": 5},
        {"error": "no device", "exit_code": 0},
    ],
)
def test_a_self_test_passes_by_whole_checks_only(
    misbehave: Misbehave, answer: dict[str, Any]
) -> None:
    misbehave(SELF_TEST, f"print({json.dumps(answer)!r}); {END}")
    test = doctor.self_test("cpu", {}, 60)
    assert (test.passed, test.exit_code) == (False, 1)
    assert test.error is not None and len(test.error.splitlines()) <= 2


def test_a_self_test_that_takes_too_long_is_told_with_its_limit(misbehave: Misbehave) -> None:
    misbehave(SELF_TEST, "import time; time.sleep(60)")
    test = doctor.self_test("cpu", {}, 0.5)
    assert (test.exit_code, test.checks) == (1, ()) and "0.5 s" in str(test.error)


@each_end
def test_a_reading_that_gives_no_figures_is_an_error_with_what_came(
    misbehave: Misbehave, tmp_path: Path, code: str, told: str
) -> None:
    misbehave("parallama.bench.load", code)
    with pytest.raises(RunError) as caught:
        load.run(
            str(tmp_path),
            meshes=["1x1"],
            dtype="float32",
            repeats=1,
            command="",
            progress=lambda _: None,
        )
    is_told(caught.value, "parallama", told)


def test_a_reading_that_takes_too_long_is_told_with_its_limit(
    misbehave: Misbehave, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    misbehave("parallama.bench.load", "import time; time.sleep(60)")
    monkeypatch.setattr(load, "_LIMIT_S", 0.5)
    with pytest.raises(RunError) as caught:
        load.run(
            str(tmp_path),
            meshes=["1x1"],
            dtype="float32",
            repeats=1,
            command="",
            progress=lambda _: None,
        )
    is_told(caught.value, "parallama", "0.5 s")


def test_a_plugin_that_ends_with_0_when_asked_for_its_version_gave_none(tmp_path: Path) -> None:
    library = make(tmp_path / "exit.so", get="exit")
    with pytest.raises(BackendError) as caught:
        plugins.check(library)
    is_told(caught.value, str(library), "no version", "exit code 0", "printed nothing")


@pytest.mark.parametrize("name", ["silence", "garbage", "half a JSON"])
def test_a_version_that_cannot_be_read_is_told(
    misbehave: Misbehave, tmp_path: Path, name: str
) -> None:
    code, told = ENDS[name]
    misbehave("parallama.engine.devices.plugins", code)
    with pytest.raises(BackendError) as caught:
        plugins.ask_version(make(tmp_path / "p.so"))
    is_told(caught.value, str(tmp_path / "p.so"), "no version", told)


def test_a_plugins_version_is_in_the_last_line_whatever_was_printed_before(
    misbehave: Misbehave, tmp_path: Path
) -> None:
    misbehave("parallama.engine.devices.plugins", "print('PJRT 1 2', flush=True)")
    assert plugins.ask_version(make(tmp_path / "p.so")) == ApiVersion(0, 75)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("silence", "has died"),
        ("garbage", "no JSON"),
        ("half a JSON", '{"checks": [{"na'),
        ("another JSON", "[1, 2]"),
        ("a deep JSON", "[[[["),
        ("a signal", "has died"),
        ("an exit code", "no luck"),
    ],
)
def test_an_engine_of_the_benchmark_that_answers_otherwise_is_an_error_with_what_came(
    misbehave: Misbehave, name: str, told: str
) -> None:
    to_socket = (
        "import socket; channel = socket.socket(socket.AF_UNIX); "
        "channel.connect(json.loads(sys.orig_argv[-1])['socket']); "
        "sys.stdout = channel.makefile('w'); "
    )
    misbehave("parallama.bench.worker", to_socket + ENDS[name][0])
    with pytest.raises(RunError) as caught:
        EngineProcess({"engine": "parallama"})
    is_told(caught.value, "parallama", told)


def test_perf_that_reports_no_samples_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command is one of the user's machine: here a script that records, and then reports as it
    is told.
    """
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for report, told in (
        ("exit 0", "ended with exit code 0"),
        ("echo no table", "no table"),
        ("echo broken >&2; exit 3", "exit code 3"),
        ("kill -9 $$", "SIGKILL"),
    ):
        perf = tmp_path / "perf"
        perf.write_text(
            f"#!/bin/sh\nif [ $1 = record ]; then trap 'exit 0' INT; sleep 9 & wait; fi\n{report}\n"
        )
        perf.chmod(0o755)
        with pytest.raises(RunError) as caught, profile.recording(os.getpid()):
            pass
        is_told(caught.value, "perf", told)


def test_an_error_of_another_process_is_the_same_here_and_anything_else_a_run_error() -> None:
    same = from_reply(to_reply(FitError("too large")))
    assert (type(same), str(same)) == (FitError, "too large")
    for reply in (
        {"refused": "NoSuchError", "message": "x"},
        {"refused": "lines", "message": "x"},
        {"refused": "annotations", "message": "x"},
        {"refused": "RunError"},
        {"refused": ["RunError"], "message": "x"},
        {"refused": "RunError", "message": 3},
    ):
        error = from_reply(reply)  # type: ignore[arg-type]
        assert type(error) is RunError
        is_told(error, str(reply["refused"]))


# -- chat templates


def conversation(renderer: Renderer, text: str) -> str:
    return renderer.render([{"role": "user", "content": text}])


def test_a_line_that_something_else_prints_is_not_taken_for_a_conversations_text(
    misbehave: Misbehave,
) -> None:
    misbehave("parallama.files.chat_template", "print('welcome', flush=True)")
    renderer = Renderer("{{ messages[0].content }}", {}, "'tiny'")
    for text in ("a", "b"):
        with pytest.raises(RunError) as caught:
            conversation(renderer, text)
        is_told(caught.value, "chat templates", "welcome")
    renderer.close()


def test_what_is_printed_while_the_renderer_imports_does_not_stand_between_its_replies(
    misbehave: Misbehave,
) -> None:
    prints = "(os.write(1, b'hello\\n') and None) if name == 'jinja2' else None"
    finder = f"type('Finder', (), {{'find_spec': lambda self, name, *more: {prints}}})()"
    misbehave("parallama.files.chat_template", f"sys.meta_path.insert(0, {finder})")
    renderer = Renderer("{{ messages[0].content }}", {}, "'tiny'")
    assert [conversation(renderer, text) for text in "abc"] == ["a", "b", "c"]
    renderer.close()


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (END, "exit code 0"),
        ("os._exit(7)", "exit code 7"),
        ("os.kill(os.getpid(), 11)", "SIGSEGV"),
        (f"print('no JSON', flush=True); {END}", "no JSON"),
        (f"print('{{\"ready\": 1}}', flush=True); {END}", "ready"),
    ],
)
def test_a_renderer_that_does_not_start_is_told(misbehave: Misbehave, code: str, told: str) -> None:
    misbehave("parallama.files.chat_template", code)
    with pytest.raises(RunError) as caught:
        conversation(Renderer("x", {}, "'tiny'"), "a")
    is_told(caught.value, "chat templates", told)


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        (b"no JSON\n", "no JSON"),
        (b"{}\n", "{}"),
        (b'{"text": 3}\n', "3"),
        (b'{"text": "a"}\n{"text": "b"}\n', "text"),
        (b"[" * 90_000 + b"\n", "[[["),
        (b"\xff\n", "xff"),
        (b'{"text": "a', "exit code 0"),
        (b"", "exit code 0"),
    ],
)
def test_an_answer_that_is_no_text_is_told_with_the_models_name(
    misbehave: Misbehave, tmp_path: Path, reply: bytes, told: str
) -> None:
    (tmp_path / "reply").write_bytes(reply)
    misbehave(
        "parallama.files.chat_template",
        'os.write(1, b\'{"ready": ""}\\n\'); sys.stdin.readline(); '
        f"os.write(1, open({str(tmp_path / 'reply')!r}, 'rb').read()); {END}",
    )
    with pytest.raises(CheckpointError) as caught:
        conversation(Renderer("x", {}, "'tiny'"), "a")
    is_told(caught.value, "chat template", "'tiny'", told)


# -- the reference's process


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (END, "float32.safetensors"),
        (
            "open(sys.orig_argv[-1] + '/float32.safetensors', 'wb').write(b'\\x08' + bytes(12)); "
            + END,
            "float32.safetensors",
        ),
        ("os.kill(os.getpid(), 9)", "SIGKILL"),
        ("sys.stderr.write('no luck\\n'); os._exit(7)", "exit code 7"),
    ],
)
def test_a_reference_that_wrote_no_answers_is_an_error(
    misbehave: Misbehave, models: TinyModels, code: str, told: str
) -> None:
    misbehave("parallama.prove.reference", code)
    asked = theirs.ReferenceRequest(
        model=models().folder,
        ids=(1, 2, 3),
        prefill=3,
        traced=3,
        gradients=False,
        dtype="float32",
    )
    with pytest.raises(RunError) as caught, theirs.ReferenceProcess(asked) as process:
        process.outputs().logits("prefill")
    is_told(caught.value, "the reference", told)


# -- what users' data can reach is an error of ours, with `python -O` too


def module(dtype: str) -> hlo.Module:
    return hlo.parse(
        f"HloModule m\n\nENTRY %main () -> {dtype}[2] {{\n"
        f"  %all-reduce = (f32[2]{{0}}, {dtype}[]) all-reduce(%x), replica_groups={{}}\n}}\n"
    )


def test_a_token_among_a_collectives_results_has_no_bytes() -> None:
    assert [each.bytes for each in module("token").collectives] == [8]
    assert [each.bytes for each in module("opaque").collectives] == [8]


def test_a_dtype_that_is_not_known_is_an_error_with_its_name() -> None:
    with pytest.raises(RunError) as caught:
        sum(each.bytes for each in module("strange").collectives)
    is_told(caught.value, "strange")


def test_text_that_is_no_hlo_is_an_error_with_its_beginning() -> None:
    with pytest.raises(RunError) as caught:
        hlo.parse("module @jit_step {}\n")
    is_told(caught.value, "module @jit_step", "HloModule")


def test_modules_are_not_compared_on_more_positions_than_are_kept(
    workers: Workers, models: TinyModels
) -> None:
    kind, code, message = workers[1].call(
        "prove_fault_cases:too_many_positions", folder=models().folder
    )
    assert (kind, code) == ("UsageError", UsageError.exit_code)
    assert "129" in message and "128" in message and len(message.splitlines()) <= 3


# -- programs are counted by who had them compiled


def test_a_scorer_counts_its_own_programs_and_no_others(
    workers: Workers, models: TinyModels
) -> None:
    texts = [(ids, 1) for ids in reference.random_prompts((20, 18, 9, 8), 101)]
    found = workers[2].call(
        "prove_fault_cases:scored_beside_others", folder=models().folder, mesh="1x2", texts=texts
    )
    assert found["by_others"] > 0
    assert (found["compiled"], found["after_warmup"]) == (2, 0)
    assert found["compiled"] + found["by_others"] == found["all"]


def test_the_harness_counts_its_own_programs_and_no_others(
    workers: Workers, tmp_path: Path
) -> None:
    folder = train_models.make(tmp_path / "model")
    found = workers[2].call("prove_fault_cases:evaluated_beside_others", folder=folder, mesh="1x2")
    assert found["by_others"] > 0 and found["compiled"] > 0 and found["after_warmup"] == 0
    assert found["compiled"] + found["by_others"] == found["all"]
