"""A function of tensors as a computation of its own, for loops and branches within a program.

torch has none that torch-xla would keep as one under SPMD. Where devices share the work, each runs
the body on its own part. A collective in it is fine where the devices that take part all run it,
and as often.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .mesh import DeviceMesh


class TracedBody:
    """A function, traced once with stand-ins of the same shapes: it must not close over tensors.

    Args:
        body: from so many tensors to others.
        inputs: what it is traced for.

    Attributes:
        operands: the inputs, and then the numbers in the body that torch-xla makes arguments of.
    """

    def __init__(
        self,
        mesh: DeviceMesh,
        body: Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]],
        inputs: Sequence[torch.Tensor],
    ) -> None:
        import torch_xla
        from torch_xla.core import xla_builder as xb

        stand_ins = [xb.create_placeholder_tensor(tensor.shape, tensor.dtype) for tensor in inputs]
        results = list(body(stand_ins))
        context = torch_xla._XLAC.lowering.LoweringContext("parallama_body")
        context.build(results)
        self._computation = xb.computation_from_module_proto("parallama_body", context.hlo())
        self._results = len(results)
        # Parameter number of the body -> place among the operands.
        places = {
            context.tensor_parameter_id(stand_in): place for place, stand_in in enumerate(stand_ins)
        }
        places.pop(-1, None)  # what the body doesn't read
        self.operands = list(inputs)
        for number, tensor in dict(context.device_parameter_id_tensor_mapping()).items():
            if number not in places:
                places[number] = len(self.operands)
                constant = tensor.to(inputs[0].device)
                self.operands.append(mesh.enter_manual(constant, (None,) * tensor.dim()))
        self._places = [places[number] for number in range(len(places))]

    def call(self, operands: Sequence[Any]) -> list[Any]:
        """The results, as operations of XLA's builder, from operations for `self.operands`."""
        from torch_xla.core import xla_builder as xb

        made = xb.Op.call(self._computation, [operands[place] for place in self._places])
        return [made.get_tuple_element(index) for index in range(self._results)]


def computed(
    name: str, lower: Callable[..., Any], operands: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """What `lower` makes of the operands on XLA's builder, a tuple, as tensors."""
    import torch_xla
    from torch_xla.core import xla_builder as xb

    computation = xb.create_computation(name, lower, xb.tensor_shape(operands))
    return list(
        torch_xla._XLAC._xla_user_computation(f"xla::_op_{name}", list(operands), computation)
    )
