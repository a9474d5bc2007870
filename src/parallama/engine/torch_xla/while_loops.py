"""Loops within a program: a body that is traced once, run as often as a device's number says.

torch has no loop that torch-xla would keep as one under SPMD.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .mesh import DeviceMesh

Body = Callable[
    [torch.Tensor, Sequence[torch.Tensor], Sequence[torch.Tensor]], Sequence[torch.Tensor]
]


def repeat(
    mesh: DeviceMesh,
    times: torch.Tensor,
    body: Body,
    given: Sequence[torch.Tensor],
    state: Sequence[torch.Tensor],
) -> list[torch.Tensor]:
    """`state`, after `body` was run so many times.

    The body is traced with stand-ins of the same shapes, so it must not close over tensors. Where
    devices share the work, each runs it on its own part, for as many times as its own `times` says:
    a collective in the body would hang.

    Args:
        times: int32 scalar.
        body: from the number of the round (int32 scalar), `given` and the state to the next state,
            of the same shapes and dtypes.
        given: what the body reads besides.
    """
    import torch_xla
    from torch_xla.core import xla_builder as xb

    round_ = mesh.enter_manual(torch.zeros((), dtype=torch.int32, device=times.device), ())
    inputs = [round_, *given, *state]
    stand_ins = [xb.create_placeholder_tensor(tensor.shape, tensor.dtype) for tensor in inputs]
    results = list(body(stand_ins[0], stand_ins[1 : 1 + len(given)], stand_ins[1 + len(given) :]))
    context = torch_xla._XLAC.lowering.LoweringContext("parallama_body")
    context.build(results)
    once = xb.computation_from_module_proto("parallama_body", context.hlo())

    # Parameter number of the body -> place among the loop's values: inputs, then held constants.
    places = {
        context.tensor_parameter_id(stand_in): place for place, stand_in in enumerate(stand_ins)
    }
    places.pop(-1, None)  # what the body doesn't read
    # Numbers in the body that torch-xla makes parameters of.
    constants = dict(context.device_parameter_id_tensor_mapping())
    held: list[torch.Tensor] = []
    for number, tensor in constants.items():
        if number not in places:
            places[number] = len(inputs) + len(held)
            held.append(mesh.enter_manual(tensor.to(times.device), (None,) * tensor.dim()))
    first_state = 2 + len(given)
    end = first_state + len(state)

    def lower(*operands: Any) -> Any:
        def left(number: Any, times: Any, *_: Any) -> Any:
            return number < times

        def run(number: Any, times: Any, *rest: Any) -> Any:
            values = [number, *rest]
            new = xb.Op.call(once, [values[places[parameter]] for parameter in range(len(places))])
            states = [new.get_tuple_element(index) for index in range(len(state))]
            following = number + xb.Op.one(number.builder(), xb.Type.S32)
            return following, times, *rest[: len(given)], *states, *rest[end - 2 :]

        times, round_, *rest = operands
        loop = xb.Op.mkwhile([round_, times, *rest], left, run)
        return xb.Op.tuple([loop.get_tuple_element(index) for index in range(first_state, end)])

    operands = [times, *inputs, *held]
    computation = xb.create_computation("parallama_repeat", lower, xb.tensor_shape(operands))
    return list(
        torch_xla._XLAC._xla_user_computation("xla::_op_parallama_repeat", operands, computation)
    )
