"""Whatever is in a model folder, it loads, or it is an error that names the file and the tensor.

The table is `broken_folders`.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from broken_folders import CASES, HEAD, Case, make, make_good
from messages import says

from parallama.errors import CheckpointError, UsageError
from parallama.files import chat_template, nonfinite
from parallama.files.adapter import AdaptedCheckpoint
from parallama.files.chat_template import Renderer
from parallama.files.checkpoint import SafetensorsFolder
from parallama.files.find import find
from parallama.files.skeleton import make_skeleton
from parallama.model.config_checks import eos_ids

LIMIT_S = 10


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_good(tmp_path_factory.mktemp("good") / "model")
    everything(folder)  # what is imported on the way takes its time once
    return folder


def everything(folder: Path) -> dict[str, torch.Tensor]:
    """All that loading does with a folder, but for the devices; its parameters."""
    checkpoint = find(str(folder))
    assert isinstance(checkpoint, (SafetensorsFolder, AdaptedCheckpoint))
    tokenizer = checkpoint.tokenizer()
    eos_ids(
        checkpoint.generation.get("eos_token_id", checkpoint.config.eos_token_id),
        tokenizer,
        checkpoint.spec.vocab,
    )
    make_skeleton(checkpoint.config)
    found = list(nonfinite.finite_only(checkpoint.tensors(checkpoint.spec), checkpoint.file_of))
    assert sorted(name for name, _ in found) == sorted(
        name for name, _ in checkpoint.spec.parameters()
    )
    return dict(found)


def check_message(error: CheckpointError, case: Case) -> None:
    message = str(error)
    assert error.exit_code == 3
    assert 1 <= len(message.splitlines()) <= 3 and all(
        line.isprintable() for line in message.splitlines()
    )
    assert len(message) < 3000
    for part in case.says:
        assert part in message


def test_there_are_enough_cases():
    assert len([case for case in CASES.values() if case.says]) >= 150
    assert len([case for case in CASES.values() if not case.says]) >= 25


@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if case.says and case.where != "chat"]
)
def test_a_broken_folder_is_an_error_in_three_lines(name, good, tmp_path):
    case = make(name, tmp_path / "model", good)
    began = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        everything(tmp_path / "model")
    check_message(caught.value, case)
    assert time.monotonic() - began < LIMIT_S


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.says])
def test_a_legal_folder_loads(name, good, tmp_path):
    """It holds what the untouched folder holds.

    To the bit in its own dtype or a wider one, and to the last place of a narrower one.
    """
    make(name, tmp_path / "model", good)
    untouched, loaded = everything(good), everything(tmp_path / "model")
    assert loaded.keys() == untouched.keys() - ({HEAD} if name.startswith("tied ") else set())
    for each, tensor in loaded.items():
        place = torch.finfo(tensor.dtype)
        exact = tensor.dtype in (torch.float32, torch.float64)
        torch.testing.assert_close(
            tensor.float(),
            untouched[each],
            rtol=0.0 if exact else place.eps,
            atol=0.0 if exact else place.smallest_normal,
            msg=each,
        )


# Chat templates.

HELLO = [{"role": "user", "content": "a b"}]


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    made = Renderer("{{ eos_token }}", {"eos_token": "</s>"}, "'tiny'")
    yield made
    made.close()


def render(renderer: Renderer, template: str) -> str:
    """With another template, in the same process if that is alive."""
    renderer._given["template"] = template
    return renderer.render(HELLO)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.where == "chat"])
def test_a_hostile_chat_template_is_an_error_in_three_lines(
    name, good, tmp_path, renderer, monkeypatch
):
    monkeypatch.setattr(chat_template, "LIMIT_S", 1.5)
    make(name, tmp_path / "model", good)
    tokenizer = SafetensorsFolder(tmp_path / "model").tokenizer()
    with pytest.raises(UsageError if name == "chat template raises" else CheckpointError) as caught:
        render(renderer, tokenizer.get_chat_template())
    message = str(caught.value)
    assert (
        message.startswith("the chat template of 'tiny' ")
        and len(message.splitlines()) <= 3
        and len(message) < 1000
    )
    assert "/etc/passwd" not in message or "include" in name or "import" in name


def test_a_template_renders_after_a_hostile_one_and_from_any_thread(renderer, monkeypatch):
    monkeypatch.setattr(chat_template, "LIMIT_S", 1.5)
    with pytest.raises(CheckpointError, match="does not end within"):
        render(
            renderer,
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        )
    found: list[str] = []
    threads = [
        threading.Thread(
            target=lambda: found.append(
                render(renderer, "{{ messages[0].content }}{{ eos_token }}")
            )
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == ["a b</s>"] * 3


def test_a_template_cannot_open_files_and_its_process_ends_with_the_renderer():
    renderer = Renderer("{{ messages[0].content }}", {}, "'tiny'")
    assert (
        renderer.render([{"role": "user", "content": "\U0001f600 \u2028 \x00", "name": None}])
        == "\U0001f600 \u2028 \x00"
    )
    process = renderer._bounded.process
    assert isinstance(process, subprocess.Popen) and process.poll() is None
    limits = Path(f"/proc/{process.pid}/limits").read_text(encoding="utf-8")
    assert [
        line.split()[3:5] for line in limits.splitlines() if line.startswith("Max open files")
    ] == [["3", "3"]]
    del renderer
    assert process.poll() is not None


def test_messages_are_rendered_as_transformers_renders_them(good):
    template = (
        "{{ bos_token if bos_token is defined else '' }}"
        "{%- for message in messages %}<|{{ message.role }}|>\n"
        "{{ message['content'] | trim }}{{ message | tojson }}"
        "{% generation %}{{ eos_token }}{% endgeneration %}\n"
        "{%- if loop.last and add_generation_prompt %}<|assistant|>{% endif %}{% endfor %}"
        "{% set ns = namespace(x=1) %}{{ ns.x }}{{ tools is none }}"
    )
    tokenizer = SafetensorsFolder(good).tokenizer()
    messages = [
        {"role": "system", "content": " \u20ac <b> "},
        {"role": "user", "content": "x", "name": None},
    ]
    expected = tokenizer.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=True, tokenize=False
    )
    renderer = Renderer(template, tokenizer.special_tokens_map, "'tiny'")
    assert renderer.render(messages) == expected
    renderer.close()


# Memory.

PEAK = """\
import sys
from pathlib import Path
from parallama.errors import CheckpointError
def peak():  # this program's own; ru_maxrss would be its parent's, too
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


def run(code: str, *arguments: object) -> str:
    """Run a program without torch, for its memory."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_file_of_nothing_but_header_takes_no_more_memory_than_twice_its_size(good, tmp_path):
    """Lists and braces of a hostile header would become Python objects of twenty times its size."""
    size = 64 << 20
    for number, piece in enumerate(
        (b"[],", b'{"a":[]},', b'"x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},')
    ):
        folder = tmp_path / str(number)
        make("as it is", folder, good)
        header = b'{"x":' + piece * (size // len(piece))
        (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
        del header
        code = PEAK + (
            "from parallama.files.model_files import read_config\n"
            "from parallama.files.weight_files import survey\n"
            "from parallama.model.known_configs import spec_of\n"
            "folder = Path(sys.argv[1]); spec = spec_of(read_config(folder), 'config.json')\n"
            "before = peak()\n"
            "try: survey(folder, spec)\n"
            "except CheckpointError as error: print(peak() - before, str(error).count('damaged'))\n"
        )
        grown, damaged = map(int, run(code, folder).split())
        assert damaged == 1 and size // 2 < grown * 1024 < 2 * size


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_json_of_nothing_but_brackets_takes_little_memory_and_a_longer_one_is_not_read(
    file, good, tmp_path
):
    make("as it is", tmp_path / "model", good)
    code = PEAK + (
        "from parallama.files.model_files import read_json\n"
        "before = peak()\n"
        "try: read_json(Path(sys.argv[1]) / sys.argv[2])\n"
        "except CheckpointError as error: print(error)\n"
        "print(peak() - before)\n"
    )
    grown = []
    for pieces in ((2 << 20) // 3 - 8, 64 << 20):
        (tmp_path / "model" / file).write_bytes(b"[" + b"[]," * pieces + b"[]]")
        *said, kilobytes = run(code, tmp_path / "model", file).splitlines()
        grown.append(int(kilobytes) * 1024)
    assert grown[0] < 64 << 20 and grown[1] < 8 << 20
    assert says(said[0], file, 2 << 20)
