"""Programs on real devices: what a decode step's optimized HLO does, and what a program refuses."""

from __future__ import annotations

import re
from typing import Any

import pytest
from messages import says
from workers import CaseError

from parallama.host import usable_cores

LAYERS, HEAD_DIM, LENGTH = 2, 8, 384
SMOL = {"heads": 9, "kv_heads": 3, "tied": True}
ONEDNN = "__onednn_fusion"
DIVIDES = {"heads": 16, "kv_heads": 8, "tied": True, "intermediate": 48, "vocab": 96}


class Dumps:
    """Optimized HLO of steps; each is compiled once."""

    def __init__(self, auditors: Any) -> None:
        self._auditors = auditors
        self._texts: dict[tuple[str, str, int, int, int], str] = {}

    def decode(self, folder: str, devices: int, batch: int, length: int = LENGTH) -> str:
        return self._step("decode", folder, devices, batch, length)

    def prefill(self, folder: str, devices: int, batch: int) -> str:
        """Of a chunk of a prompt that is not its first."""
        return self._step("prefill", folder, devices, batch)

    def _step(self, kind: str, folder: str, devices: int, batch: int, length: int = LENGTH) -> str:
        key = (kind, folder, devices, batch, length)
        if key not in self._texts:
            self._texts[key] = self._auditors(
                "device_cases:compile_step",
                folder,
                f"1x{devices}",
                kind=kind,
                batch=batch,
                length=length,
            )
        return self._texts[key]


@pytest.fixture(scope="module")
def dumps(auditors: Any) -> Dumps:
    return Dumps(auditors)


def count(hlo: str, operation: str) -> int:
    """How many instructions of this kind there are (an asynchronous one counts once)."""
    return len(re.findall(rf" {operation}(?:-start)?\(", hlo))


# With 8 rows oneDNN reads the cached values on 1 and 2 devices.
@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_a_decode_step_updates_the_cache_in_place(
    dumps: Dumps, models: Any, devices: int, batch: int
) -> None:
    tiny = models(**DIVIDES)
    hlo = dumps.decode(tiny.folder, devices, batch)
    heads = 8 // devices  # one a device on 1x8
    shape = f"f32[{batch},{heads},{LENGTH},{HEAD_DIM}]"
    header, body = hlo.split("\n", 1)
    aliases = re.search(r"input_output_alias={(.*?)}, entry", header)
    # The cache, and the counts of tokens that penalties read.
    assert aliases is not None and aliases[1].count("alias)") == 2 * LAYERS + 1
    assert count(body, "dynamic-update-slice") == batch * (2 * LAYERS + 1)
    assert (
        len(re.findall(rf"= {re.escape(shape)}\S* dynamic-update-slice\(", body))
        == batch * 2 * LAYERS
    )
    assert not re.findall(rf"= {re.escape(shape)}\S* copy(?:-start)?\(", body)


@pytest.mark.parametrize("devices", [1, 8])
def test_a_chunk_of_a_prompt_reads_the_cache_in_a_loop_and_writes_it_in_place(
    dumps: Dumps, models: Any, devices: int
) -> None:
    hlo = dumps.prefill(models(**DIVIDES).folder, devices, 1)
    shape = re.escape(f"f32[1,{8 // devices},{LENGTH},{HEAD_DIM}]")
    loops = [line for line in hlo.splitlines() if " while(" in line]
    assert sum("sampling" not in line for line in loops) == LAYERS
    aliases = re.search(r"input_output_alias={(.*?)}, entry", hlo)
    assert aliases is not None and aliases[1].count("alias)") == 2 * LAYERS + 1
    assert not re.findall(rf"= {shape}\S* copy(?:-start)?\(", hlo)
    assert not re.findall(
        r" (all-gather|all-to-all|collective-permute)\(", hlo.split("ENTRY")[0]
    )  # in the loops' bodies: devices go round as often as each needs


@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("sizes", [SMOL, DIVIDES], ids=["9/3", "16/8"])
def test_a_greedy_decode_step_has_the_fewest_collectives(
    dumps: Dumps, models: Any, sizes: dict[str, Any], devices: int
) -> None:
    hlo = dumps.decode(models(**sizes).folder, devices, 2)
    kinds = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
    # Two a layer and one for the embedding; the candidates of the pick are gathered once. What the
    # samplers exchange is in branches, which a greedy step doesn't take.
    step = hlo.split("ENTRY")[1]
    assert [count(step, kind) for kind in kinds] == [2 * LAYERS + 1, 1, 0, 0, 0]
    assert [count(hlo, kind) - count(step, kind) for kind in kinds] == [4, 0, 0, 0, 0]


@pytest.mark.parametrize("batch", [1, 2])
def test_products_with_weights_are_not_fused_into_loops(
    dumps: Dumps, models: Any, batch: int
) -> None:
    """XLA:CPU would fuse matrix times vector with the norm before it, which makes it slower."""
    tiny = models(**DIVIDES)
    hlo = dumps.decode(tiny.folder, 1, batch)
    weights = {
        name
        for name, shape in re.findall(
            r"^ *(%\S+) = f32\[([\d,]+)\]\S* parameter\(", hlo.split("ENTRY")[1], re.M
        )
        if shape.count(",") == 1
    }
    products = [
        set(re.findall(r"%[\w.-]+", line.split(" dot(")[1])) & weights
        for line in hlo.split("ENTRY")[1].splitlines()
        if " dot(" in line
    ]
    assert len([used for used in products if used]) == batch * (7 * LAYERS + 1)


def by_onednn(hlo: str) -> tuple[int, int]:
    """Products with weights, and others."""
    fused = [line for line in hlo.splitlines() if ONEDNN in line]
    with_weights = [line for line in fused if re.search(r"= f32\[\d+,\d+\]", line)]
    return len(with_weights), len(fused) - len(with_weights)


@pytest.mark.parametrize(("devices", "batch"), [(2, 1), (2, 3), (2, 8), (8, 8)])
def test_onednn_multiplies_with_weights_where_devices_have_a_core_each_and_more_than_a_row(
    dumps: Dumps, models: Any, devices: int, batch: int
) -> None:
    found = by_onednn(dumps.decode(models(**DIVIDES).folder, devices, batch))
    # 32 matrices and more: the cached values of each layer.
    assert found == (
        7 * LAYERS + 1 if batch > 1 and usable_cores() <= devices else 0,
        LAYERS if batch * 8 // devices >= 32 else 0,
    )


@pytest.mark.skipif(
    usable_cores() == 1, reason="a single device has one core here, as in the test above"
)
@pytest.mark.parametrize(
    ("sizes", "batch", "length", "multiplies"),
    [
        ({}, 1, LENGTH, False),
        ({}, 2, LENGTH, False),  # of small weights two rows are faster one by one
        ({"hidden": 1024, "intermediate": 2048}, 2, LENGTH, True),
        ({}, 3, LENGTH, True),
        ({}, 8, LENGTH, True),
        ({}, 9, LENGTH, False),
        ({"head_dim": 64}, 3, 512, True),
        ({"head_dim": 64}, 3, 544, False),
        ({"intermediate": 5400}, 8, LENGTH, True),
        ({"intermediate": 5600}, 8, LENGTH, False),
    ],
)
def test_onednn_multiplies_on_a_device_of_several_cores_while_nothing_else_is_shared_among_them(
    dumps: Dumps, models: Any, sizes: dict[str, int], batch: int, length: int, multiplies: bool
) -> None:
    hlo = dumps.decode(models(**DIVIDES | sizes).folder, 1, batch, length)
    assert by_onednn(hlo)[0] == (7 * LAYERS + 1 if multiplies else 0)
    if intermediate := sizes.get(
        "intermediate"
    ):  # the largest loop of a layer is split from there on
        assert (
            bool(
                re.search(
                    rf"= f32\[{intermediate},{batch}\]\S* call\(", hlo[hlo.index("\nENTRY") :]
                )
            )
            is not multiplies
        )


def test_the_residual_stream_of_a_prompt_lies_as_products_results_do(
    dumps: Dumps, models: Any
) -> None:
    """Of 64 rows and more: `[hidden, rows]`.

    But for the embeddings, which are transposed, and the last position, nothing has its rows first.
    """
    tiny = models(**DIVIDES)
    hidden = tiny.model.config.hidden_size
    hlo = dumps.prefill(tiny.folder, 1, 4)
    entry = hlo[hlo.index("\nENTRY") :]
    found = {
        shape: re.findall(rf"= f32\[{shape}\]\S* (?!bitcast|parameter|get-tuple)([a-z-]+)\(", entry)
        for shape in (f"4,16,{hidden}", f"64,{hidden}", f"64,1,{hidden}", f"{hidden},64")
    }
    *first, turned = found.values()
    assert sum(map(len, first)) <= 1 and len(turned) >= 4 * LAYERS, found


@pytest.mark.parametrize("devices", [1, 2])
def test_a_prompt_goes_through_the_end_of_the_last_layer_with_one_position_a_row(
    dumps: Dumps, models: Any, devices: int
) -> None:
    """From the last attention on only the positions that the next tokens follow are read.

    o_proj, gate, up and down have the batch's rows there, as the head has, not the prompt's.
    """
    batch = 4
    entry = dumps.prefill(models(**DIVIDES).folder, devices, batch).split("\nENTRY")[1]
    rows = [
        int(found)
        for found in re.findall(rf"= f32\[\d+,(\d+)\]\S* (?:dot\(|fusion\(.*{ONEDNN})", entry)
    ]
    assert rows.count(16 * batch) == 7 * LAYERS - 4
    assert rows.count(batch) == 4 + 1


def test_a_single_device_has_no_collectives(dumps: Dumps, models: Any) -> None:
    hlo = dumps.decode(models(**SMOL).folder, 1, 2)
    assert not re.findall(r" (all-reduce|all-gather|all-to-all|collective-permute)", hlo)


@pytest.mark.parametrize("mesh", ["1x1", "1x8", "2x4"])
def test_a_program_replays_with_new_arguments_and_no_new_compile(workers: Any, mesh: str) -> None:
    rows, columns = mesh.split("x")
    sums = workers[int(rows) * int(columns)].call("device_cases:replay", mesh=mesh, times=5)
    assert sums == [64 * total for total in (0, 1, 3, 6, 10)]


@pytest.mark.parametrize(("name", "donated"), [("x", True), ("state", False), ("state", True)])
@pytest.mark.parametrize(
    ("shape", "dtype", "said"),
    [
        ([4, 9], "float32", "float32[4, 9]"),
        ([4, 8], "int32", "int32[4, 8]"),
        ([32], "float32", "float32[32]"),
    ],
)
def test_a_program_refuses_an_argument_of_another_shape_or_dtype(
    workers: Any, name: str, donated: bool, shape: list[int], dtype: str, said: str
) -> None:
    with pytest.raises(CaseError) as caught:
        workers[1].call(
            "device_cases:wrong_shape", name=name, dtype=dtype, shape=shape, donated=donated
        )
    assert caught.value.kind == "ProgramError"
    assert says(caught.value.message, "add", repr(name), said, "float32[4, 8]")


def test_asking_for_an_undeclared_program_names_what_differs_from_the_nearest(
    workers: Any, models: Any
) -> None:
    with pytest.raises(CaseError) as caught:
        workers[1].call(
            "device_cases:undeclared",
            folder=models(**SMOL).folder,
            batch=1,
            length=512,
            declare=True,
        )
    assert caught.value.kind == "ProgramError"
    assert says(caught.value.message, "2 programs", "length is 512", "256", "warm_up")


def test_asking_before_any_warm_up_says_so(workers: Any, models: Any) -> None:
    with pytest.raises(CaseError) as caught:
        workers[1].call(
            "device_cases:undeclared",
            folder=models(**SMOL).folder,
            batch=1,
            length=512,
            declare=False,
        )
    assert caught.value.kind == "ProgramError" and says(caught.value.message, "warm_up")


def test_a_step_that_would_go_through_the_host_is_refused_every_time(workers: Any) -> None:
    """Its result would be a constant of the executable.

    torch-xla keeps the names of such operations for the life of the process.
    """
    for said in workers[1].call("device_cases:untraceable", times=2):
        assert says(said, "bits", "torch-xla"), said


@pytest.mark.parametrize("mesh", ["1x1", "1x2"])
def test_two_programs_over_the_same_state_see_what_the_other_made(workers: Any, mesh: str) -> None:
    """torch-xla gives a buffer the id of the last tensor that was read through it.

    By ids, the second program would keep the first state for ever.
    """
    found = workers[int(mesh[-1])].call("device_cases:two_programs", mesh=mesh)
    assert found == {"read": [32, 32, 64], "updated": [32, 64, 128]}


@pytest.mark.parametrize(
    ("reads", "wanted"),
    [
        ({"a": ["a", "b"], "b": ["b"]}, {"a": 140, "b": 200}),
        ({"a": ["a", "b", "c"], "b": ["b", "c"], "c": ["c"]}, {"a": 203, "b": 260, "c": 300}),
    ],
)
def test_outputs_are_paired_with_the_buffers_of_their_names_in_whatever_order_they_are_read(
    workers: Any, reads: dict[str, list[str]], wanted: dict[str, float]
) -> None:
    assert workers[2].call("device_cases:paired", mesh="1x2", reads=reads) == wanted


def test_outputs_that_cannot_be_paired_are_an_error(workers: Any) -> None:
    with pytest.raises(CaseError) as caught:
        workers[2].call(
            "device_cases:paired", mesh="1x2", reads={"a": ["a"], "b": ["c"], "c": ["b"]}
        )
    assert caught.value.kind == "ProgramError" and says(caught.value.message, "paired", "b, c")
