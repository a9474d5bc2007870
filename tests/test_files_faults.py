"""Files that end too early while they are read, and files that must not be lost when written."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from broken_folders import CONFIG, make_good, make_sharded

from parallama.errors import CheckpointError, UsageError
from parallama.files import gguf_header, manifest
from parallama.files.checkpoint import SafetensorsFolder
from parallama.files.disk import Disk
from parallama.files.export import export_checkpoint, export_weights
from parallama.files.find import find
from parallama.files.weight_writer import Kind, write
from parallama.train.logs import JsonLog, read_log

NORM = "model.norm.weight"

# A file that is cut between opening and reading, in a process of its own: a mapping would end it.

CUT = """
import os, sys
from pathlib import Path
import torch
from parallama.errors import ParallamaError
from parallama.files.find import find
from parallama.plan.mesh_shape import MeshShape
from parallama.plan.make_plan import make_plan
from parallama.sharded import stream

path, file, size, mesh = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
try:
    checkpoint = find(str(path))
    plan = make_plan(checkpoint.spec, MeshShape.parse(mesh))
    sources = checkpoint.sources(checkpoint.spec)
    os.truncate(file, size)
    for source in sources:
        stream.parts(source, plan, torch.bfloat16, range(plan.mesh.devices))
        source.release()
except ParallamaError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def cut_while_loading(path: Path, file: Path, size: int, mesh: str) -> tuple[int, str]:
    """How a process ends that loads a checkpoint of which a file is cut, and what it says."""
    done = subprocess.run(
        [sys.executable, "-c", CUT, str(path), str(file), str(size), mesh],
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize("mesh", ["1x1", "1x2"])
def test_a_safetensors_file_that_is_cut_while_it_is_loaded_is_an_error(tmp_path, mesh):
    """Whole pages are gone: a process that had mapped them would die."""
    folder = make_good(tmp_path / "model", CONFIG | {"hidden_size": 256, "intermediate_size": 512})
    code, said = cut_while_loading(folder, folder / "model.safetensors", 1 << 16, mesh)
    assert code == 3 and said.startswith("model.safetensors is damaged: it was cut"), said


def test_a_gguf_file_that_is_cut_while_it_is_loaded_is_an_error(tmp_path):
    file = tmp_path / "tiny.gguf"
    shutil.copyfile(find("smollm2").location, file)
    code, said = cut_while_loading(file, file, file.stat().st_size // 2, "1x1")
    assert code == 3 and said.startswith("tiny.gguf is damaged: it was cut"), said


CUT_RUN = """
import os, sys
from pathlib import Path
from checkpoint_cases import snapshot
from parallama.errors import CheckpointError
from parallama.train import checkpoints

path = checkpoints.write(Path(sys.argv[1]), snapshot(3), keep_last=1)
tensors = checkpoints.read_tensors(path, checkpoints.verify(path))
next(tensors)
for file in path.glob("*.safetensors"):
    os.truncate(file, 0)
try:
    list(tensors)
except CheckpointError as error:
    print(error)
"""


def test_a_checkpoint_of_a_run_that_is_cut_while_it_is_read_is_an_error(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", CUT_RUN, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parent,
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    assert f"checkpoint {str(tmp_path / 'step-00000003')!r} cannot be read" in done.stdout


def test_a_file_that_grew_or_was_replaced_after_it_was_opened_is_read_as_it_was(tmp_path):
    folder = make_good(tmp_path / "model")
    file = folder / "model.safetensors"
    checkpoint = SafetensorsFolder(folder)
    expected = dict(checkpoint.tensors(checkpoint.spec))
    sources = checkpoint.sources(checkpoint.spec)
    (folder / "new").write_bytes(b"x" * file.stat().st_size)
    (folder / "new").replace(file)
    for source in sources:
        assert torch.equal(source.read(), expected[source.name])


def test_every_slice_of_a_tensor_is_what_the_whole_tensor_has_there(tmp_path):
    folder = make_good(tmp_path / "model")
    checkpoint = SafetensorsFolder(folder)
    for source in checkpoint.sources(checkpoint.spec):
        whole = source.read()
        for first in range(3):
            slices = tuple(slice(min(first, size), max(size - 2, first)) for size in whole.shape)
            before = source.bytes_read
            part = source.read(slices)
            assert torch.equal(part, whole[slices]) and part.is_contiguous()
            assert source.bytes_read - before == part.nbytes


def test_a_gguf_vocabulary_with_tokens_of_megabytes_is_refused_by_its_header(tmp_path):
    """transformers derives merges from a vocabulary by trying every split of every token."""

    def text(content: bytes) -> bytes:
        return struct.pack("<Q", len(content)) + content

    def vocabulary(*tokens: bytes) -> bytes:
        array = struct.pack("<IIQ", 9, 8, len(tokens)) + b"".join(map(text, tokens))
        return struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + text(b"tokenizer.ggml.tokens") + array

    file = tmp_path / "tiny.gguf"
    file.write_bytes(vocabulary(b"a", b" " * 4096))
    assert gguf_header.check(file) == file.stat().st_size
    file.write_bytes(vocabulary(b"a", b"a" * (1 << 20)))
    with pytest.raises(CheckpointError, match=r"tiny\.gguf .* texts that are too long"):
        gguf_header.check(file)


def test_a_reader_of_a_gguf_header_gets_a_file_of_its_own(tmp_path):
    original = find("smollm2").location
    with gguf_header.private_copy(original) as copy:
        header = copy.read_bytes()
        assert copy.name == original.name and copy != original
    assert not copy.exists()
    with original.open("rb") as file:
        assert header == file.read(len(header))


def test_rows_of_a_gguf_that_are_no_whole_blocks_are_an_error(tmp_path):
    """Quantized numbers come in blocks of 32 or 256 in a row."""
    gguf = pytest.importorskip("gguf")
    file = tmp_path / "odd.gguf"
    writer = gguf.GGUFWriter(str(file), "llama")
    head, hidden, inter, vocab = 4, 8, 40, 24
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inter)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocab)
    shapes = {
        "token_embd.weight": (vocab, hidden),
        "output_norm.weight": (hidden,),
        "output.weight": (vocab, hidden),
        "blk.0.attn_norm.weight": (hidden,),
        "blk.0.ffn_norm.weight": (hidden,),
        "blk.0.attn_q.weight": (2 * head, hidden),
        "blk.0.attn_k.weight": (head, hidden),
        "blk.0.attn_v.weight": (head, hidden),
        "blk.0.attn_output.weight": (hidden, 2 * head),
        "blk.0.ffn_gate.weight": (inter, hidden),
        "blk.0.ffn_up.weight": (inter, hidden),
        "blk.0.ffn_down.weight": (hidden, inter),
    }
    for name, shape in shapes.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = find(str(file))
    assert len(checkpoint.sources(checkpoint.spec)) == len(shapes)
    content = file.read_bytes()
    entry = b"blk.0.ffn_down.weight" + struct.pack("<IQQ", 2, inter, hidden)
    quantized = entry + struct.pack("<I", 8)  # Q8_0
    assert content.count(entry) == 1
    file.write_bytes(content.replace(entry + struct.pack("<I", 0), quantized))
    checkpoint = find(str(file))
    with pytest.raises(
        CheckpointError, match=r"odd\.gguf: tensor blk\.0\.ffn_down\.weight has rows"
    ):
        checkpoint.sources(checkpoint.spec)


# Exports and logs: at every moment whole or not there, and on the disk before they get their name.


class Watched:
    """A disk that notes its operations, and looks at something before each.

    Attributes:
        operations: name and path of each.
    """

    def __init__(self, look: Callable[[], None]) -> None:
        self.operations: list[tuple[str, Path]] = []
        self._look = look
        self.disk = Disk(self._before)

    def _before(self, operation: str, path: Path) -> None:
        self._look()
        self.operations.append((operation, path))


def unsynced(operations: list[tuple[str, Path]]) -> set[Path]:
    """Files and folders that something was done to after they were last synced."""
    changed: set[Path] = set()
    for operation, path in operations:
        if operation in ("sync", "sync folder"):
            changed.discard(path)
        elif operation == "write":
            changed.add(path)
        else:
            changed |= {path, path.parent} if operation == "create" else {path.parent}
    return changed


def dressed(folder: Path) -> Path:
    """A model with everything that an export copies."""
    make_good(folder)
    make_sharded(folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    return folder


def test_an_export_is_at_every_moment_whole_or_not_there_and_synced_before_it_gets_its_name(
    tmp_path,
):
    source, out = find(str(dressed(tmp_path / "model"))), tmp_path / "new" / "deep" / "out"

    def look() -> None:
        assert not out.exists() or manifest.check(out)

    watched = Watched(look)
    exported = export_checkpoint(source, out, shard_bytes=1000, disk=watched.disk)
    operations = watched.operations
    renames = [at for at, (operation, path) in enumerate(operations) if path == out]
    assert [operations[at][0] for at in renames] == ["rename"]
    before, after = operations[: renames[0]], operations[renames[0] :]
    unfinished = {path.parent for operation, path in before if path.name == "config.json"}.pop()
    written = {
        str(path.relative_to(unfinished)) for operation, path in before if operation == "sync"
    }
    hidden = {f".{manifest.NAME}.part"}
    assert written - hidden == set(exported.files) - {manifest.NAME} and len(written) > 8
    assert hidden < written and "additional_chat_templates/tool_use.jinja" in written
    assert {path for path in unsynced(before) if path.is_relative_to(unfinished)} == set()
    assert before[-1] == ("sync folder", unfinished)
    synced = [path for operation, path in after if operation == "sync folder"]
    assert synced == [out.parent, out.parent.parent, tmp_path]
    assert manifest.check(out) is not None and sorted(manifest.read(out) or ()) == sorted(
        set(exported.files) - {manifest.NAME}
    )


def test_an_export_of_a_gguf_is_synced_before_it_gets_its_name(tmp_path):
    out = tmp_path / "out"
    watched = Watched(lambda: None)
    exported = export_checkpoint(find("smollm2"), out, dtype="bfloat16", disk=watched.disk)
    at = watched.operations.index(("rename", out))
    before = watched.operations[:at]
    synced = {path.name for operation, path in before if operation == "sync"}
    assert set(exported.files) - {manifest.NAME} <= synced and "tokenizer.json" in synced
    assert unsynced(before) == {tmp_path}


def test_an_export_that_is_killed_before_any_of_its_operations_leaves_nothing_under_its_name(
    tmp_path,
):
    """Real processes, real signals, a few moments of each kind."""
    model = dressed(tmp_path / "model")
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from parallama.files.disk import Disk\n"
        "from parallama.files.export import export_checkpoint\n"
        "from parallama.files.find import find\n"
        "source, root = find(sys.argv[1]), Path(sys.argv[2])\n"
        "for at in range(1000):\n"
        "    left = [at]\n"
        "    def before(operation, path):\n"
        "        if left[0] == 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        left[0] -= 1\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        export_checkpoint(source, root / str(at), disk=Disk(before))\n"
        "        os._exit(0)\n"
        "    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])\n"
        "    print(at, ended, flush=True)\n"
        "    if ended == 0: break\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(model), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    ends = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert [code for _, code in ends] == [-9] * (len(ends) - 1) + [0] and len(ends) > 30
    whole = [at for at, _ in ends if (tmp_path / "out" / str(at)).exists()]
    for at in whole:
        assert manifest.check(tmp_path / "out" / str(at)) is not None
    # Nothing up to the rename; from then on, all of it.
    assert whole == list(range(whole[0], len(ends))) and whole[0] > len(ends) - 5


def test_a_config_with_what_utf_8_does_not_have_is_exported_as_it_is(tmp_path):
    folder = make_good(tmp_path / "model", CONFIG | {"note": "half a pair: \ud800, and \u20ac"})
    export_checkpoint(find(str(folder)), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["note"] == "half a pair: \ud800, and \u20ac"


def test_a_log_that_is_cut_back_is_at_every_moment_the_old_or_the_new_one(tmp_path):
    path = tmp_path / "log.jsonl"
    entries = [{"step": step, "loss": 1.5} for step in range(1, 6)]
    old = "".join(json.dumps(entry) + "\n" for entry in entries)
    new = "".join(json.dumps(entry) + "\n" for entry in entries[:3])
    path.write_text(old + '{"step": 6, "lo')
    (tmp_path / ".log.jsonl.part").write_text("what a run that was killed has left")

    def look() -> None:
        assert path.read_text() in (old + '{"step": 6, "lo', new)

    watched = Watched(look)
    JsonLog(tmp_path, 3, watched.disk).close()
    assert path.read_text() == new and [entry["step"] for entry in read_log(tmp_path)] == [1, 2, 3]
    at = watched.operations.index(("rename", path))
    assert not unsynced(watched.operations[:at]) - {tmp_path}
    assert ("sync folder", tmp_path) in watched.operations[at:]


def test_a_new_log_has_its_name_on_the_disk(tmp_path):
    watched = Watched(lambda: None)
    JsonLog(tmp_path, 0, watched.disk).close()
    assert ("sync folder", tmp_path) in watched.operations


# Guards that are there with -O, too.

KINDS = {"a": Kind(shape=(2, 3), dtype=torch.float32), "b": Kind(shape=(4,), dtype=torch.float16)}
GOOD = {"a": torch.zeros(2, 3), "b": torch.ones(4)}


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ([("a", GOOD["a"])], "missing tensors: b"),
        ([*GOOD.items(), ("a", GOOD["a"])], "tensor 'a' comes twice"),
        ([*GOOD.items(), ("c", GOOD["a"])], "unexpected tensor 'c'"),
        ([("a", torch.zeros(3, 2)), ("b", GOOD["b"])], "tensor a has shape [3, 2]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tensors_that_are_not_the_ones_to_write_are_an_error(tmp_path, tensors, says):
    with pytest.raises(UsageError) as caught:
        write(tmp_path, tensors, KINDS)
    assert says in str(caught.value)


def test_tensors_that_are_not_the_models_are_not_exported(tmp_path):
    source = find(str(make_good(tmp_path / "model")))
    right = dict(source.tensors(source.spec))
    for change in (
        {"evil": torch.zeros(3)},
        {NORM: torch.zeros(3)},
        {NORM: None},
    ):
        tensors = {name: tensor for name, tensor in (right | change).items() if tensor is not None}
        with pytest.raises(UsageError, match=r"(evil|norm)"):
            export_weights(tensors.items(), source, tmp_path / "out", dtype=torch.float32)
        assert not (tmp_path / "out").exists()
    for dtype in (torch.int8, {}):
        with pytest.raises(UsageError, match="dtype"):
            export_weights(right.items(), source, tmp_path / "out", dtype=dtype)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
