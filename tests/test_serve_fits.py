"""How long requests may be on a server: what fits beside the weights, said before they are read."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import train_models
from forks import command
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import check_raised, check_refusal
from servers import Server
from test_plan import MESHES, specs

from parallama.errors import FitError
from parallama.host import available_bytes
from parallama.model.known_configs import CONFIGS, spec_of
from parallama.plan import cost
from parallama.plan.make_plan import make_plan
from parallama.plan.mesh_shape import MeshShape
from parallama.plan.program_shapes import slot_length
from parallama.plan.slot_fit import UNKNOWN_LEN, Room, Slots

LLAMA = make_plan(spec_of(CONFIGS["llama-3.1-8b"], "llama-3.1-8b"), MeshShape(model=8))


@settings(deadline=None)
@given(
    spec=specs(),
    mesh=MESHES,
    count=st.integers(1, 20),
    size=st.integers(0, 1 << 22),
    shared=st.booleans(),
)
def test_without_a_length_it_is_the_longest_that_fits(spec, mesh, count, size, shared):
    plan = make_plan(spec, mesh)
    slots = Slots(
        plan=plan, count=count, itemsize=4, room=Room(name="x", bytes=size, shared=shared)
    )

    def fits(tokens: int) -> bool:
        memory = cost.slot_memory(plan, slots=count, length=slot_length(tokens), itemsize=4)
        return memory.total * (mesh.devices if shared else 1) <= size

    try:
        found = slots.context(None)
    except FitError:
        assert not fits(1)
    else:
        assert fits(found) and (found == spec.max_positions or not fits(found + 1))
        assert slots.context(found) == found


def test_a_length_that_does_not_fit_is_refused_with_the_bytes_and_what_would():
    slots = Slots(plan=LLAMA, count=16, itemsize=2, room=Room(name="each chip", bytes=6 * 10**9))
    with pytest.raises(FitError) as caught:
        slots.context(131072)
    needed = cost.shown_bytes(slots.memory(131072).total)
    check_raised(caught.value, 4, "16 requests", "131,072", "mesh 1x8", needed, "each chip", "6 GB")
    length, count = (
        int(re.findall(rf"{option} (\d+)", str(caught.value))[0])
        for option in ("--max-model-len", "--max-num-seqs")
    )
    assert slots.context(length) == length == slots.context(None)
    assert replace(slots, count=count).context(131072) == 131072
    with pytest.raises(FitError) as caught:
        replace(slots, room=Room(name="each chip", bytes=10**9)).context(None)
    check_raised(caught.value, 4, "1 GB", "'model'")


def test_where_memory_is_not_known_a_context_is_moderate_and_said():
    slots = Slots(plan=LLAMA, count=16, itemsize=2)
    assert slots.context(None) == UNKNOWN_LEN == 4096
    assert slots.context(131072) == 131072
    assert all(each in slots.said(4096) for each in ("4,096 tokens", "16 slots", "--hardware"))


def test_a_container_has_what_it_is_left(tmp_path: Path):
    free = available_bytes(tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("70000000\n")
    assert available_bytes(tmp_path) == pytest.approx(free, rel=0.2)
    (tmp_path / "memory.max").write_text("100000000\n")
    assert available_bytes(tmp_path) == 30_000_000
    stat = "anon 5\ninactive_file 4000000\nactive_file 1000000\nmapped_file 3\n"
    (tmp_path / "memory.stat").write_text(stat)
    assert available_bytes(tmp_path) == 35_000_000


# -- the command


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return train_models.make(tmp_path_factory.mktemp("served") / "model")


def test_what_does_not_fit_is_refused_before_weights_are_read(model: str, tmp_path: Path):
    """The weights would be refused, too: they end with NaN."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in Path(model).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64] + b"\xff" * 64)
    asked = ["serve", str(folder), "--port", "0", "--quiet"]
    few = ["--hardware", "2MB", "--max-model-len", "2048"]
    done = command([*asked, *few])
    assert done.code == 4 and "loading" in done.err, done
    error = done.err.splitlines()[-2:]
    assert "16 requests of 2,048 tokens" in error[0] and "2MB" in error[0], done.err
    assert "--max-model-len" in error[1] or "--max-num-seqs" in error[1], done.err
    assert command([*asked, "--max-model-len", "64"]).code == 3
    check_refusal(command([*asked, "--hardware", "abacus"]), 2, "abacus")


def test_a_server_says_the_context_that_fits_and_has_it(model: str, tmp_path: Path):
    few = ["--max-num-seqs", "1", "--hardware", "1.5MB", "--no-metrics"]
    server = Server(model, *few, log=tmp_path / "log")
    try:
        (said,) = re.findall(r"context of ([\d,]+) tokens: 1 slot takes? ", server.log())
        with server.client() as client:
            (found,) = client.get("/v1/models").json()["data"]
    finally:
        server.child.kill()
    assert 128 <= found["max_model_len"] == int(said.replace(",", "")) < 2048
