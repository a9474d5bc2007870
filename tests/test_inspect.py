"""`parallama inspect`: what real devices hold, how it is told, and which misplacements it finds."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Done, command, environment
from inspect_cases import KEY, NORM, QUERY
from messages import check_refusal, says
from reference import TinyModels
from workers import CaseError, Workers

COMMAND = str(Path(sys.executable).with_name("parallama"))
SMOL: dict[str, Any] = {
    "heads": 9,
    "kv_heads": 3,
}  # intermediate 37 and vocabulary 101 are padded too
KEYS = {
    "model",
    "backend",
    "mesh",
    "dtype",
    "batch",
    "cache_positions",
    "devices",
    "tensors",
    "findings",
    "hlo",
}
PADDED = ["model.layers.0.*.*.weight", "model.embed_tokens.weight", "lm_head.weight", NORM]
MESHES = ["1x1", "1x2", "2x1", "1x8", "2x4", "8x1"]


def devices_of(mesh: str) -> int:
    data, _, model = mesh.partition("x")
    return int(data) * int(model)


@pytest.fixture(scope="module")
def look(workers: Workers, models: TinyModels) -> Any:
    """`look("1x8")`: an inspection of the tiny model, made once a mesh."""
    made: dict[str, dict[str, Any]] = {}

    def inspect(mesh: str) -> dict[str, Any]:
        if mesh not in made:
            worker, tiny = workers[devices_of(mesh)], models(**SMOL)
            made[mesh] = worker.call(
                "inspect_cases:inspected",
                folder=tiny.folder,
                mesh=mesh,
                batch=8,
                contents=[*PADDED, "cache.*.1"],
            )
        return made[mesh]

    return inspect


# -- how it lies


@pytest.mark.parametrize("mesh", MESHES)
def test_a_model_lies_as_planned_to_the_byte(look: Any, mesh: str) -> None:
    found = look(mesh)
    document, devices = found["document"], devices_of(mesh)
    assert found["findings"] == () and found["faults"] == []
    assert all(tensor["as_planned"] for tensor in document["tensors"])
    assert [device["param_bytes"] for device in document["devices"]] == found["planned"]
    assert [device["kv_bytes"] for device in document["devices"]] == found["planned_kv"]
    assert (
        len({device["name"] for device in document["devices"]})
        == devices
        == len(document["devices"])
    )


@pytest.mark.parametrize("mesh", MESHES)
def test_the_slices_are_those_of_the_shards_and_cover_every_tensor(look: Any, mesh: str) -> None:
    found = look(mesh)
    for tensor in found["document"]["tensors"]:
        covered = torch.zeros(tensor["shape"], dtype=torch.bool)
        for part in tensor["parts"]:
            slices = tuple(slice(*span) for span in part["slices"])
            assert tuple(covered[slices].shape) == tensor["local_shape"]
            covered[slices] = True
        assert covered.all(), tensor["name"]
        for part, shard in zip(
            tensor["parts"], found["shards"].get(tensor["name"], []), strict=False
        ):
            assert [last - first for first, last in part["slices"]] == list(shard.shape)


@pytest.mark.parametrize("mesh", MESHES)
def test_a_part_is_what_is_said_of_it_in_the_checkpoints_terms(
    look: Any, models: TinyModels, mesh: str
) -> None:
    """Every part has the measured digest when it is made again of the checkpoint and zeros."""
    weights = dict(models(**SMOL).model.named_parameters())
    checked = 0
    for name, parts in look(mesh)["contents"].items():
        for part in parts:
            if name.startswith("cache."):
                assert (
                    part["minimum"] == part["maximum"] == part["mean"] == 0.0
                    and part["zero_share"] == 1.0
                )
                continue
            made = torch.zeros([last - first for first, last in part["slices"]])
            for piece in product(*part["checkpoint"]):
                if all(stretch["source"] for stretch in piece):
                    at = (
                        slice(s["at"][0] - first, s["at"][1] - first)
                        for s, (first, _) in zip(piece, part["slices"], strict=True)
                    )
                    made[tuple(at)] = weights[name].detach()[
                        tuple(slice(*s["source"]) for s in piece)
                    ]
            assert hashlib.sha256(made.numpy().tobytes()).hexdigest() == part["sha256"], (
                name,
                part["device"],
            )
            assert part["bytes"] == made.numel() * 4
            assert (part["minimum"], part["maximum"]) == (made.min().item(), made.max().item())
            assert part["mean"] == pytest.approx(made.double().mean().item(), abs=1e-12)
            assert (
                part["zero_share"] == pytest.approx((made == 0).double().mean().item())
                and part["non_finite"] == 0
            )
            checked += 1
    assert checked >= 9 * devices_of(mesh)


def test_heads_are_named_with_zero_heads_and_repeats(look: Any) -> None:
    def held(mesh: str, name: str) -> list[tuple[Any, ...]]:
        return [
            (part["heads"]["kind"], part["heads"]["held"], part["heads"]["repeated"])
            for part in look(mesh)["contents"][name]
        ]

    query, key, out = (f"model.layers.0.self_attn.{module}_proj.weight" for module in "qko")
    row = [
        ("query", (0, 1, 2), ()),
        ("query", (3, 4, 5), ()),
        ("query", (6, 7, 8), ()),
        ("query", (None, None, None), ()),
    ]
    assert held("2x4", query) == held("2x4", out) == row * 2
    assert (
        held("2x4", key)
        == [("KV", (0,), ()), ("KV", (1,), ()), ("KV", (2,), ()), ("KV", (None,), ())] * 2
    )
    repeated = [("KV", (head,), (head,)) for head in (0, 0, 1, 1, 2, 2)] + [("KV", (None,), ())] * 2
    assert (
        held("1x8", key) == held("1x8", "cache.key.1") == held("1x8", "cache.value.1") == repeated
    )
    assert [heads for _, heads, _ in held("1x8", query)] == [
        (0, 1),
        (2, None),
        (3, 4),
        (5, None),
        (6, 7),
        (8, None),
        (None,) * 2,
        (None,) * 2,
    ]
    assert held("1x1", query) == [("query", tuple(range(9)), ())]
    assert look("1x8")["contents"][NORM][0]["heads"] is None


def test_a_cut_through_a_head_is_said(workers: Workers, models: TinyModels) -> None:
    plan = {"model.layers.*.self_attn.q_proj.weight": ["data", "model"]}
    found = workers[8].call(
        "inspect_cases:inspected",
        folder=models(**SMOL).folder,
        mesh="8x1",
        batch=8,
        plan=plan,
        contents=[QUERY],
    )
    parts = found["contents"][QUERY]
    assert [part["heads"]["whole"] for part in parts] == [False] * 8 and found["faults"] == []
    assert parts[1]["slices"] == ((9, 18), (0, 36)) and parts[1]["heads"]["held"] == (1, 2)


def test_replicas_have_one_digest_and_other_parts_another(look: Any) -> None:
    found = look("2x4")["contents"]
    query = [part["sha256"] for part in found["model.layers.0.self_attn.q_proj.weight"]]
    assert query[:4] == query[4:] and len(set(query)) == 4
    assert len({part["sha256"] for part in found[NORM]}) == 1


def test_the_cache_is_as_long_as_a_sessions(workers: Workers, models: TinyModels) -> None:
    found = workers[2].call(
        "inspect_cases:inspected",
        folder=models(**SMOL).folder,
        mesh="2x1",
        batch=4,
        max_model_len=300,
        dtype="bfloat16",
    )
    document = found["document"]
    assert (document["batch"], document["cache_positions"], document["dtype"]) == (
        4,
        512,
        "bfloat16",
    )
    cache = [tensor for tensor in document["tensors"] if tensor["name"].startswith("cache.")]
    assert [tensor["name"] for tensor in cache] == [
        "cache.key.0",
        "cache.value.0",
        "cache.key.1",
        "cache.value.1",
    ]
    for tensor in cache:
        assert (tensor["shape"], tensor["local_shape"]) == ((4, 3, 512, 8), (2, 3, 512, 8))
        assert tensor["partition"] == ("data", "model", None, None)
        assert tensor["bytes_per_device"] == (2 * 3 * 512 * 8 * 2,) * 2
    assert found["findings"] == ()


# -- misplacements


def planted(
    workers: Workers, models: TinyModels, fault: str, name: str, mesh: str = "1x8"
) -> dict[str, Any]:
    return workers[8].call(
        "inspect_cases:inspected",
        folder=models(**SMOL).folder,
        mesh=mesh,
        fault=fault,
        contents=[name],
    )


@pytest.mark.parametrize(
    ("fault", "name", "parts"),
    [
        ("axis", QUERY, ("device 0", "[0:128, 0:36]", "[0:16, 0:36]", "7 more devices")),
        ("shape", QUERY, ("[16, 36]", "[128, 36]")),
        ("dtype", NORM, ("bfloat16", "float32")),
    ],
)
def test_a_tensor_that_lies_otherwise_is_named_with_both_places(
    workers: Workers, models: TinyModels, fault: str, name: str, parts: tuple[str, ...]
) -> None:
    found = planted(workers, models, fault, name)
    (finding,) = found["findings"]
    assert says(finding, name.removeprefix("model."), *parts)
    assert [
        tensor["name"] for tensor in found["document"]["tensors"] if not tensor["as_planned"]
    ] == [name]
    assert all(
        (part["checkpoint"] is None) == (fault == "shape") for part in found["contents"][name]
    )


@pytest.mark.parametrize(
    ("fault", "name", "parts"),
    [
        ("copy", NORM, ("device 5", "device 4")),
        ("padding", QUERY, ("device 7", "7 numbers", "zero")),
        ("repeat", KEY, ("device 1", "device 0")),
    ],
)
def test_values_that_are_wrong_on_one_device_are_found(
    workers: Workers, models: TinyModels, fault: str, name: str, parts: tuple[str, ...]
) -> None:
    found = planted(workers, models, fault, name)
    assert found["findings"] == ()
    assert any(says(fault, name, *parts) for fault in found["faults"]), found["faults"]
    # A copy that differs from the one before it makes the next one differ too: no more than that.
    assert len(found["faults"]) <= 2


def test_numbers_that_are_not_finite_are_counted_apart(
    workers: Workers, models: TinyModels
) -> None:
    for part in planted(workers, models, "nan", NORM)["contents"][NORM]:
        assert (
            part["non_finite"] == 2
            and abs(part["mean"]) < 10
            and part["minimum"] < part["maximum"] < 10
        )
        json.dumps(part, allow_nan=False)


@pytest.mark.parametrize(
    "options",
    [[], ["--json"], ["--tensor", QUERY, "--device", "3"]],
    ids=["tables", "json", "tensor"],
)
def test_the_command_ends_with_1_and_says_what_lies_otherwise(
    workers: Workers, models: TinyModels, options: list[str]
) -> None:
    arguments = ["inspect", models(**SMOL).folder, "--mesh", "2x4", *options]
    code, out, err = workers[8].call("inspect_cases:command", arguments=arguments, fault="axis")
    assert (code, err) == (1, "")
    name = "layers.1.self_attn.q_proj.weight"
    found = json.loads(out)["findings"] if options == ["--json"] else [" ".join(out.split())]
    assert all(part in found[0] for part in (name, "device 0", "[0:96, 0:36]", "[0:24, 0:36]"))
    assert len(found) == 1 and "as planned." not in out
    if not options:
        rows = [
            line.split()
            for line in out.splitlines()
            if line.startswith("layers.") and line.split()[-1] in ("yes", "NO")
        ]
        assert [row[0] for row in rows if row[-1] == "NO"] == ["layers.1.self_attn.q_proj.weight"]


# -- the command line, from outside


@pytest.fixture(scope="module")
def document(
    models: TinyModels, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    """Of one run with everything, and the folder that it wrote into."""
    folder = tmp_path_factory.mktemp("inspect")
    tensor = ["--tensor", "model.layers.*.self_attn.q_proj.weight", "--device", "3"]
    files = ["--plot", "held.svg", "--hlo", "hlo", "--phase", "prefill"]
    more = [*tensor, *files, "--max-model-len", "100", "--json", "--quiet"]
    run = command(["inspect", models(**SMOL).folder, "--mesh", "1x4", *more], cwd=folder)
    assert (run.code, run.err) == (0, ""), run.err
    assert run.out.endswith("}\n") and run.out.count("\n") == 1
    return json.loads(run.out), folder


def test_the_document_has_its_keys(
    document: tuple[dict[str, Any], Path], models: TinyModels
) -> None:
    found, _ = document
    assert found.keys() == KEYS | {"details"}
    assert (found["model"], found["backend"], found["mesh"]) == (
        models(**SMOL).folder,
        "cpu",
        {"data": 1, "model": 4},
    )
    assert (found["dtype"], found["batch"], found["cache_positions"], found["findings"]) == (
        "float32",
        1,
        256,
        [],
    )
    assert [device["coordinates"] for device in found["devices"]] == [
        {"data": 0, "model": place} for place in range(4)
    ]
    assert all(
        device.keys() == {"id", "name", "coordinates", "param_bytes", "kv_bytes"}
        for device in found["devices"]
    )
    query = next(tensor for tensor in found["tensors"] if tensor["name"] == QUERY)
    assert query == {
        "name": QUERY,
        "shape": [96, 36],
        "local_shape": [24, 36],
        "bytes_per_device": [24 * 36 * 4] * 4,
        "partition": ["model", None],
        "as_planned": True,
        "parts": [
            {"device": device, "slices": [[24 * device, 24 * device + 24], [0, 36]]}
            for device in range(4)
        ],
    }
    assert [(detail["name"][13], detail["device"]) for detail in found["details"]] == [
        ("0", 3),
        ("1", 3),
    ]
    assert found["details"][0]["checkpoint"] == [
        [{"at": [72, 96], "source": None}],
        [{"at": [0, 36], "source": [0, 36]}],
    ]
    assert found["details"][0]["zero_share"] == 1.0


def test_the_hlo_of_the_phase_is_saved_and_the_picture_drawn(
    document: tuple[dict[str, Any], Path],
) -> None:
    found, folder = document
    assert found["hlo"] == "hlo/prefill.txt"
    assert [path.name for path in (folder / "hlo").iterdir()] == ["prefill.txt"]
    text = (folder / "hlo" / "prefill.txt").read_text()
    assert text.startswith("HloModule ") and text.count("\nENTRY ") == 1 and "all-reduce" in text
    picture = (folder / "held.svg").read_text()
    assert (
        "[96, 36], on a device [24, 36]" in picture
        and "layers.*.self_attn.q_proj.weight x2" in picture
        and "cache.key.* x2" in picture
    )


def test_the_tables_are_ascii_on_a_terminal_that_is_within_a_hundred_columns(
    models: TinyModels,
) -> None:
    run = subprocess.run(
        [COMMAND, "inspect", models(**SMOL).folder, "--mesh", "2x2"],
        capture_output=True,
        text=True,
        env=environment() | {"PYTHONIOENCODING": "ascii"},
    )
    assert (run.returncode, run.stderr) == (0, "") and run.stdout.isascii()
    assert max(len(line.rstrip()) for line in run.stdout.splitlines()) <= 100
    lines = [" ".join(line.split()) for line in run.stdout.splitlines()]
    rows = [" ".join(line.replace("|", " ").split()) for line in lines]
    assert "layers.*.self_attn.q_proj.weight x2 [96, 36] [48, 36] 13.8 kB yes" in rows
    start = lines.index("mesh 2x2: data down, model across")
    assert lines[start + 1 : start + 3] == ["| 0 | 1 |", "| 2 | 3 |"]
    at = next(
        number
        for number, line in enumerate(lines)
        if line.startswith("layers.*.self_attn.o_proj.weight x2") and "dim" in line
    )
    assert lines[at].endswith("dim 1 across") and lines[at + 1] == "| 0,2 | 1,3 |"
    at = next(
        number
        for number, line in enumerate(lines)
        if line.startswith("cache.key.* x2") and "dim" in line
    )
    assert lines[at + 1 : at + 3] == ["| 0 | 1 |", "| 2 | 3 |"]
    assert (
        "KV cache 2 rows of 512 positions, made to be looked at (--batch, --max-model-len)" in lines
    )
    assert lines[-1].endswith("as planned.")
    assert [row.split()[1] for row in rows if "CPU:" in row] == ["CPU:0", "CPU:1", "CPU:2", "CPU:3"]


def test_a_tensor_is_shown_on_every_device_in_words(workers: Workers, models: TinyModels) -> None:
    arguments = [
        "inspect",
        models(**SMOL).folder,
        "--mesh",
        "1x8",
        "--tensor",
        "model.layers.0.self_attn.[qk]_proj.weight",
    ]
    code, out, err = workers[8].call("inspect_cases:command", arguments=arguments)
    assert (code, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert [line for line in lines if line.startswith("device 5")] == [
        "device 5 CPU:5: [80:96, 0:36], 2,304 bytes",
        "device 5 CPU:5: [40:48, 0:36], 1,152 bytes",
    ]
    assert (
        "query heads 8, zeros" in lines
        and "checkpoint dim 0: 64:72 + 8 zeros; dim 1: 0:36" in lines
    )
    assert "KV heads 2; also elsewhere: 2" in lines
    assert sum(line.startswith("SHA-256 ") for line in lines) == 16
    assert "Tensors, one line a kind (measured)" not in lines and lines[-1].endswith("as planned.")


# -- refusals


REFUSALS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "batch": (["--mesh", "2x1", "--batch", "3"], ("--batch is 3", "2", "'data'")),
    "negative batch": (["--mesh", "2x1", "--batch", "-2"], ("--batch is -2", "2", "'data'")),
    "device alone": (["--device", "0"], ("--device", "--tensor")),
    "no such device": (
        ["--mesh", "1x2", "--tensor", NORM, "--device", "2"],
        ("--device 2", "1x2", "0 to 1"),
    ),
    "phase alone": (["--phase", "decode"], ("--phase", "--hlo")),
    "phase": (["--hlo", "new", "--phase", "train"], ("--phase 'train'", "prefill, decode")),
    "full folder": (["--hlo", "full"], ("--hlo full", "not empty")),
    "file": (["--hlo", "full/file"], ("--hlo full/file", "file")),
    "no parent": (["--hlo", "no/new"], ("--hlo no/new", "no folder no")),
    "long name": (["--hlo", "n" * 300], (f"--hlo {'n' * 300}", "File name too long")),
    "plot": (["--plot", "p.jpg"], ("--plot p.jpg", ".svg", ".png")),
    "mesh": (
        ["--mesh", "1x2", "-tp", "4"],
        ("--mesh 1x2", "2 devices", "--tensor-parallel-size", "4"),
    ),
    "length": (
        ["--mesh", "1x2", "--max-model-len", "5000"],
        ("--max-model-len is 5000", "expected"),
    ),
    "tensor": (["--mesh", "1x2", "--tensor", "q_proj"], ("--tensor 'q_proj'", "cache.key.0")),
}


@pytest.mark.parametrize(("options", "parts"), REFUSALS.values(), ids=REFUSALS)
def test_what_is_wrong_is_said(
    workers: Workers,
    models: TinyModels,
    tmp_path: Path,
    options: list[str],
    parts: tuple[str, ...],
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    arguments = ["inspect", models(**SMOL).folder, *options]
    done = Done(*workers[2].call("inspect_cases:command", arguments=arguments, at=str(tmp_path)))
    check_refusal(done, 2, *parts)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_no_hlo_where_xla_wrote_none_is_an_error(
    workers: Workers, models: TinyModels, tmp_path: Path
) -> None:
    with pytest.raises(CaseError) as raised:
        workers[1].call("inspect_cases:saved", folder=models(**SMOL).folder, to=str(tmp_path))
    assert raised.value.kind == "RunError" and says(raised.value.message, "decode", "keep_hlo")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_an_error(models: TinyModels, tmp_path: Path) -> None:
    done = command(["inspect", models(**SMOL).folder, "--hlo", "/proc/parallama"], cwd=tmp_path)
    check_refusal(done, 2, "--hlo /proc/parallama", "No such file or directory")
