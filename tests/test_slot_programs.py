"""What generate and serve run, held against the plan: collectives, the cache in place, memory."""

from __future__ import annotations

from typing import Any

import pytest

from parallama.model.spec import ModelSpec
from parallama.plan import cost
from parallama.plan.make_plan import make_plan
from parallama.plan.mesh_shape import MeshShape

SLOTS, POSITIONS = 4, 100


@pytest.mark.parametrize("mesh", ["1x1", "1x2", "2x2"])
def test_slots_are_what_was_predicted_to_the_byte(auditors: Any, models: Any, mesh: str) -> None:
    """Every program's collectives and copies, and what the session holds on each device."""
    tiny = models(heads=6, kv_heads=3)
    shape = MeshShape.parse(mesh)
    found = auditors(
        "slot_program_cases:judged", tiny.folder, mesh, slots=SLOTS, positions=POSITIONS
    )
    for name, document in found["audits"].items():
        assert document["findings"] == (), (name, document)
        assert (document["programs"], document["aliased"]) == (1, document["cache_tensors"]), name
    per_shard = [1, 2, 4] if shape.data == 1 else [2, 4]
    names = ["prefill 32", "prefill 128", *(f"decode {rows}" for rows in per_shard)]
    assert list(found["audits"]) == [*names, "copy 1"]
    plan = make_plan(ModelSpec.from_config(tiny.model.config), shape)
    predicted = cost.memory(plan, batch=SLOTS, max_model_len=POSITIONS, itemsize=4)
    assert found["params"] == [predicted.params] * shape.devices
    assert found["slots"] == [predicted.kv + predicted.state] * shape.devices
