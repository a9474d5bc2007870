"""What `test_slot_programs` runs in a worker whose programs are dumped."""

from __future__ import annotations

from typing import Any

from audit_cases import model_of

from parallama.inference.programs import make_programs
from parallama.inference.slot_shapes import SlotShapes
from parallama.inference.slots import SlotSession
from parallama.prove.audit import audit
from parallama.sharded.device_weights import bytes_per_device


def judged(folder: str, mesh: str, slots: int, positions: int) -> dict[str, Any]:
    """Audits of every program of a session with slots, and what the session holds."""
    model = model_of(folder, mesh, None, "float32")
    steps = model.steps()
    programs = make_programs(steps)
    shards = steps.mesh.shape.data
    shapes = SlotShapes.of(slots=slots, positions=positions, shards=shards)
    session = SlotSession(steps, programs, shapes)
    held = [
        steps.mesh.local_bytes(tensor)
        for tensor in (*session.tensors(), session.biases.tensor, session.prompt_biases.tensor)
    ]
    keys = [shapes.prefill(size) for size in shapes.sizes]
    keys += [*(shapes.decode(rows) for rows in shapes.row_counts()), shapes.copy()]
    audits = {}
    for key in keys:
        phase: Any = {"slot_prefill": "prefill", "slot_decode": "decode"}.get(key.kind, "copy")
        name = f"{phase} {key.rows or key.new}"
        audits[name] = audit(steps, programs, phase, key).to_dict()
    return {
        "audits": audits,
        "params": bytes_per_device(steps.mesh, steps.weights),
        "slots": [sum(sizes) for sizes in zip(*held, strict=True)],
    }
