"""Loading reads only what the devices hold, each byte once, and one tensor at a time."""

import json
import math
from pathlib import Path

import pytest
import torch
from forks import command, script
from messages import check_refusal
from safetensors.torch import load_file, save_file

from parallama.errors import CheckpointError
from parallama.files.checkpoint import SafetensorsFolder
from parallama.files.find import find
from parallama.plan.heads import EMPTY
from parallama.plan.make_plan import make_plan
from parallama.plan.mesh_shape import MeshShape
from parallama.sharded import stream

DOWN, UP = "model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight"


def read_by(
    folder: str, mesh: str, devices: tuple[int, ...]
) -> tuple[dict[str, int], SafetensorsFolder]:
    """Bytes read of every tensor for some devices, whose parts must be what the plan says."""
    checkpoint = SafetensorsFolder(Path(folder))
    plan = make_plan(checkpoint.spec, MeshShape.parse(mesh))
    counts = {}
    for source in checkpoint.sources(checkpoint.spec):
        made = stream.parts(source, plan, torch.float32, devices)
        assert {part.shape for part in made.values()} == {
            torch.Size(plan[source.name].local_shape(plan.mesh))
        }
        counts[source.name] = source.bytes_read
    return counts, checkpoint


@pytest.mark.parametrize(
    ("mesh", "devices"), [("1x8", (3,)), ("1x8", (0, 7)), ("2x4", (1, 5, 6)), ("1x1", (0,))]
)
def test_a_process_that_owns_some_devices_reads_only_their_slices(models, mesh, devices):
    """Heads that divide: a device's slices are plain fractions of the files."""
    tiny = models(heads=16, kv_heads=8, intermediate=64, vocab=96)
    counts, checkpoint = read_by(tiny.folder, mesh, devices)
    shape = MeshShape.parse(mesh)
    columns = {device % shape.model for device in devices}
    for name, count in counts.items():
        size = math.prod(dict(checkpoint.spec.parameters())[name]) * 4
        split = not name.endswith("norm.weight")
        assert count == (size * len(columns) // shape.model if split else size), name


def test_repeated_heads_are_read_for_every_device_that_holds_them_and_zero_heads_never(models):
    """By devices that belong to eight processes."""
    folder = models(heads=9, kv_heads=3).folder
    each = [read_by(folder, "1x8", (device,)) for device in range(8)]
    counts, checkpoint = (
        {name: sum(found[name] for found, _ in each) for name in each[0][0]},
        each[0][1],
    )
    layout = make_plan(checkpoint.spec, MeshShape.parse("1x8")).head_layout
    head = checkpoint.spec.head_dim * checkpoint.spec.hidden * 4
    for name, sources in (("q_proj", layout.query_sources), ("k_proj", layout.kv_sources)):
        assert EMPTY in sources or len(set(sources)) < len(sources)
        assert counts[f"model.layers.0.self_attn.{name}.weight"] == head * sum(
            source != EMPTY for source in sources
        )


def test_a_file_that_only_one_device_needs_is_read_only_where_its_slices_are(models):
    """What the process has read, by the kernel's own count."""
    tiny = models(heads=16, kv_heads=8, intermediate=1 << 18, layers=1)
    checkpoint = SafetensorsFolder(Path(tiny.folder))
    plan = make_plan(checkpoint.spec, MeshShape.parse("1x8"))
    for name, kept in ((UP, torch.bfloat16), (DOWN, torch.float32)):
        source = next(each for each in checkpoint.sources(checkpoint.spec) if each.name == name)
        before = bytes_read_by_this_process()
        part = stream.parts(source, plan, kept, [2])[2]
        grown = bytes_read_by_this_process() - before
        assert part.numel() * 4 == source.bytes_read == source.nbytes // 8
        assert source.nbytes // 8 <= grown < source.nbytes // 8 + 65536


def bytes_read_by_this_process() -> int:
    """By system calls, from the page cache or the disk."""
    counts = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in counts if line.startswith("rchar:"))


@pytest.mark.parametrize(
    ("mesh", "dtype"),
    [
        ("1x8", "bfloat16"),
        ("2x4", "float32"),
        ("1x8", "float32"),
        ("1x1", "bfloat16"),
        ("1x1", "float32"),
    ],
)
def test_a_model_on_the_devices_is_the_files_to_the_bit_and_each_byte_was_read_once(
    tmp_path, models, workers, mesh, dtype
):
    tiny = models(heads=16, kv_heads=8, intermediate=64, vocab=96)
    stored = {
        name: tensor.bfloat16()
        for name, tensor in load_file(Path(tiny.folder) / "model.safetensors").items()
    }
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((Path(tiny.folder) / "config.json").read_bytes())
    worker = workers[MeshShape.parse(mesh).devices]
    found = worker.call("stream_cases:loaded", folder=str(tmp_path), mesh=mesh, dtype=dtype)
    assert found["tensors"].keys() == stored.keys()
    for name, tensor in found["tensors"].items():
        assert torch.equal(tensor, stored[name].to(getattr(torch, dtype))), name
    total = sum(tensor.nbytes for tensor in stored.values())
    assert found["bytes_read"] == total
    assert found["order"] == [name for name, _ in SafetensorsFolder(tmp_path).spec.parameters()]
    done = [done for done, _ in found["reported"]]
    assert (
        done == sorted(done)
        and done[-1] == total
        and {all_ for _, all_ in found["reported"]} == {total}
    )
    assert found["threads"] == worker.call("torch:get_num_threads")


@pytest.mark.parametrize(("mesh", "programs"), [("8x1", 3), ("2x4", 1)])
def test_large_tensors_that_a_mesh_repeats_are_read_once_and_repeated_on_the_devices(
    models, workers, mesh, programs
):
    """One program for each shape whose first dim the devices put together.

    On 2x4 only that of `down_proj`, whose second dim is split already.
    """
    tiny = models(heads=9, kv_heads=3, hidden=288, intermediate=8200, vocab=9000, layers=1)
    stored = load_file(Path(tiny.folder) / "model.safetensors")
    found = workers[8].call("stream_cases:loaded", folder=tiny.folder, mesh=mesh, dtype="float32")
    assert found["programs"] == programs
    assert found["bytes_read"] == sum(tensor.nbytes for tensor in stored.values())
    assert found["measured"] == found["planned"]
    for name, tensor in stored.items():
        assert torch.equal(found["tensors"][name], tensor), name


@pytest.mark.parametrize(("mesh", "intermediate"), [("1x8", 64), ("8x1", 8192), ("1x1", 64)])
def test_a_tensor_that_the_readers_refuse_ends_the_load(
    tmp_path, models, workers, mesh, intermediate
):
    tiny = models(heads=16, kv_heads=8, intermediate=intermediate, vocab=96)
    stored = load_file(Path(tiny.folder) / "model.safetensors")
    stored[DOWN][0, -1] = float("nan")
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((Path(tiny.folder) / "config.json").read_bytes())
    with pytest.raises(Exception, match=f"tensor {DOWN} holds NaN or infinity") as caught:
        workers[MeshShape.parse(mesh).devices].call(
            "stream_cases:loaded", folder=str(tmp_path), mesh=mesh, dtype="float32"
        )
    assert caught.value.kind == CheckpointError.__name__
    assert workers[MeshShape.parse(mesh).devices].alive


# -- memory that one device takes over


@pytest.mark.parametrize("shape", [(), (0, 3), (1, 7), (33, 65)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_one_device_takes_a_host_tensor_over_without_a_copy_and_frees_it_when_it_is_gone(
    workers, dtype, shape
):
    found = workers[1].call("stream_cases:taken_over", dtype=dtype, shape=shape)
    assert found["same_memory"] and found["kept"] and found["freed"]
    assert torch.equal(found["read"], found["given"]) and torch.equal(
        found["computed"], found["given"] + found["given"]
    )


def test_a_program_that_memory_taken_over_is_donated_to_copies_it_once_and_never_writes_to_it(
    workers,
):
    """Afterwards the program updates its own buffer in place, as it does any other."""
    found = workers[1].call("stream_cases:given_away", size=1 << 16, times=3)
    assert found["started_there"] and found["unchanged"] and found["freed"]
    assert found["places"] == [0, 1, 1, 1]
    assert torch.equal(found["state"], torch.arange(float(1 << 16)) * 8 + 7)


def test_an_optimizer_that_changes_what_was_taken_over_leaves_the_hosts_memory_as_it_was(workers):
    found = workers[1].call("stream_cases:changed_in_place", size=1 << 12)
    assert torch.equal(found["host"], torch.arange(float(1 << 12)))
    assert torch.equal(found["parameter"], torch.arange(float(1 << 12)) - 3.0)


def test_memory_taken_over_stays_until_the_last_program_that_reads_it_is_done(workers):
    assert workers[1].call("stream_cases:dropped_in_flight", size=700, products=40) == {
        "there": True,
        "right": True,
        "freed": True,
    }


@pytest.mark.parametrize(("mesh", "plain"), [("1x1", "taken over"), ("1x2", "refused")])
def test_only_whole_aligned_tensors_are_taken_over_and_only_where_there_is_one_device(
    workers, mesh, plain
):
    found = workers[MeshShape.parse(mesh).devices].call(
        "stream_cases:refused_to_take_over", mesh=mesh
    )
    assert found == {
        "shares": mesh == "1x1",
        "plain": plain,
        "turned": "refused",
        "within another": "refused",
    }


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_model_on_one_device_needs_its_file_no_more_and_is_laid_out_anew_to_the_bit(
    tmp_path, models, workers, dtype, tied
):
    tiny = models(heads=16, kv_heads=8, intermediate=64, vocab=96, tied=tied)
    stored = load_file(Path(tiny.folder) / "model.safetensors")
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes((Path(tiny.folder) / name).read_bytes())
    found = workers[1].call(
        "stream_cases:rewritten",
        folder=str(tmp_path),
        dtype=dtype,
        plan={UP: "replicate", UP.replace("up_", "gate_"): "replicate"},
    )
    assert found["before"].keys() == stored.keys()
    for name, tensor in stored.items():
        for state in ("before", "after", "moved"):
            assert torch.equal(found[state][name], tensor.to(getattr(torch, dtype))), (state, name)
    assert found["tensors"] == len(stored) and found["tokens"][0] == found["tokens"][1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_model_on_one_device_takes_its_own_bytes_and_gives_them_back(models, workers, dtype):
    tiny = models(heads=16, kv_heads=8, hidden=256, intermediate=1 << 14, vocab=1 << 14, layers=4)
    found = workers[1].call("stream_cases:dropped", folder=tiny.folder, dtype=dtype)
    assert found["devices"] > 3 * found["largest"]
    assert abs(found["loaded"] - found["before"] - found["devices"]) < 0.25 * found["devices"]
    assert found["gone"] - found["before"] < 0.25 * found["devices"]


def test_a_gguf_tensor_is_dequantized_once_and_forgotten():
    checkpoint = find("smollm2")
    source = next(source for source in checkpoint.sources(checkpoint.spec) if source.name == UP)
    assert source.bytes_read == 0
    whole = source.read()
    once = source.bytes_read
    assert 0 < once < whole.nbytes // 4  # Q4_1: 5 bits a weight
    assert torch.equal(source.read((slice(3, 9), slice(5, 50))), whole[3:9, 5:50])
    assert source.bytes_read == once
    source.release()
    source.read()
    assert source.bytes_read == 2 * once


LOAD = """
import json, sys
from parallama.engine.torch_xla.mesh import DeviceMesh
mesh = DeviceMesh("1x8")
import torch, transformers.models.llama.modeling_llama
from transformers import AutoModelForCausalLM
from parallama.host import rss_bytes
import parallama
llm = parallama.load(sys.argv[1], mesh=mesh, dtype=sys.argv[2])
stats = llm.load_stats
print(json.dumps({
    "baseline": stats.baseline_rss_bytes,
    "peak": stats.peak_rss_bytes,
    "devices": sum(llm.param_bytes_per_device()),
    "largest": stats.largest_tensor_bytes,
    "read": stats.bytes_read,
}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_twelve_hundred_million_parameters_load_within_a_quarter_over_their_bytes(
    tmp_path_factory, dtype
):
    """bf16, five files, on 1x8. The devices' memory is the process's: a quarter of it is left."""
    from parallama.bench.shapes import make

    folder = tmp_path_factory.getbasetemp() / "l1b-bf16"
    if not folder.exists():
        assert make("l1b-bf16", folder) > 1_200_000_000
    assert len(list(folder.glob("*.safetensors"))) == 5
    done = script(LOAD, str(folder), dtype, limit_s=900)
    assert done.code == 0, done.err[-2000:]
    found = json.loads(done.out)
    assert found["read"] == sum(
        math.prod(shape) * 2 for _, shape in SafetensorsFolder(folder).spec.parameters()
    )
    assert found["devices"] >= found["read"] * (1 if dtype == "bfloat16" else 2)
    assert found["peak"] < 1.25 * found["devices"] + found["baseline"]
    assert found["peak"] < found["devices"] + found["largest"] + found["baseline"]


@pytest.mark.parametrize(
    "meshes", [["1x2"], pytest.param(["1x2", "1x1"], marks=pytest.mark.slow)], ids=" ".join
)
def test_bench_load_measures_ours_onto_every_mesh_and_safetensors_on_the_same_files(
    models, tmp_path, meshes
):
    """With a tensor that holds NaN, which is refused, or let pass where that is asked for."""
    folder = models(heads=16, kv_heads=8, intermediate=64, vocab=96).folder
    stored = load_file(Path(folder) / "model.safetensors")
    stored[DOWN][0, -1] = float("nan")
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((Path(folder) / "config.json").read_bytes())
    few = ["bench", str(tmp_path), "--load", "--repeats", "1", "--quiet"]
    check_refusal(command(few), 3, DOWN, "NaN")
    done = command([*few, "--allow-nonfinite", "--mesh", ",".join(meshes), "--json"])
    assert done.code == 0, done.err
    told = json.loads(done.out)["meshes"]
    total = sum(tensor.nbytes for tensor in stored.values())
    norms = sum(tensor.nbytes for name, tensor in stored.items() if name.endswith("norm.weight"))
    assert [(found["mesh"], found["device_bytes"]) for found in told] == [
        ("1x2", total + norms),
        ("1x1", total),
    ][: len(meshes)]
    for found in told:
        ours, *theirs = found["readings"]
        assert found["bytes"] == total
        assert ours["reader"] == "parallama" and ours["ratio"] is None
        assert [reading["reader"] for reading in theirs] == ["safetensors", "safetensors-pread"]
        for reading in theirs:
            assert reading["ratio"] == pytest.approx(reading["seconds"] / ours["seconds"])
            assert reading["bytes_per_s"] == pytest.approx(total / reading["seconds"])
