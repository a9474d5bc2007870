"""A compiled training step is what was predicted, to the byte.

One reduction over data, two all-reduces a layer going forward and two going back.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from test_train_step import PADDED, REPEATED

CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("2x2", PADDED, {"fsdp": True, "grad_accum": 2, "remat": "full"}),
    ("1x4", REPEATED, {"sequence_parallel": True, "remat": "full"}),
    ("2x2", PADDED, {"lora": {"rank": 2, "targets": ("q_proj", "down_proj")}}),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("1x2", PADDED, {"remat": "full"}),
            ("2x4", REPEATED, {"fsdp": True, "sequence_parallel": True, "grad_accum": 2}),
            (
                "2x2",
                REPEATED,
                {"lora": {"rank": 2, "targets": ("v_proj", "o_proj")}, "fsdp": True, "remat": 2},
            ),
            ("2x2", PADDED, {"dtype": "bfloat16", "sequence_parallel": True}),
            ("2x2", PADDED, {"dtype": "bfloat16", "fsdp": True}),
        )
    ),
]


@pytest.mark.parametrize(("mesh", "sizes", "options"), CASES)
def test_a_training_step_is_what_was_predicted_to_the_byte(
    auditors: Any, models: Any, mesh: str, sizes: dict[str, Any], options: dict[str, Any]
) -> None:
    found = auditors(
        "trained", models(**sizes).folder, mesh, options={"batch_size": 4, "seq_len": 16} | options
    )
    assert found["passed"], found["findings"]
    assert found["found"] and found["programs"] == 1 and found["aliased"] == found["cache_tensors"]
    over_data = Counter(
        each["module"]
        for each in found["found"]
        if each["axis"] == "data" and each["module"].endswith("(gradient)")
    )
    assert all(count == 1 for count in over_data.values())
