"""transformers' unmodified model, run on each device's own parts.

For the time of a pass the parts stand in for the model's parameters, and a function mode sends its
linears and its embedding to the passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch.overrides import TorchFunctionMode

from ...engine.torch_xla.ordering import TRIGONOMETRIC, kept_apart

_plain_linear = torch.nn.functional.linear
_PRODUCTS = {torch.Tensor.mul, torch.Tensor.__mul__, torch.mul}


class Products(Protocol):
    """What is computed in place of the model's own operations."""

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """A linear by a device's part of its weight."""
        ...

    def embedding(self, ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor | None:
        """Rows of the table, or None if it is not the model's."""
        ...

    def scaled(self, factor: Any, other: Any) -> torch.Tensor | None:
        """A product with a norm's weight, or None if it is another product."""
        ...


class ModelForm(TorchFunctionMode):
    """Within: the model's linears, embedding and norms are computed by `products`.

    Args:
        unfused_rotary: the rotary table is computed once, not in everything that reads it.
    """

    def __init__(self, products: Products, *, unfused_rotary: bool) -> None:
        super().__init__()
        self._products, self._unfused_rotary = products, unfused_rotary

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        found = None
        if function is _plain_linear:
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            return self._products.linear(given["input"], given["weight"], given.get("bias"))
        if function in _PRODUCTS and not kwargs:
            found = self._products.scaled(*args)
        elif function is torch.nn.functional.embedding:
            found = self._products.embedding(args[0], args[1])
        elif function in TRIGONOMETRIC and self._unfused_rotary:
            found = kept_apart(function(*args, **kwargs))
        return function(*args, **kwargs) if found is None else found


@contextmanager
def parts_in_place(base: Any, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Within: the model has these tensors as its parameters and buffers.

    Args:
        base: the transformers model without its head.
        tensors: by the name within the causal LM (`model.norm.weight`): every parameter, and the
            buffers that are to be replaced.
    """
    undo: list[Callable[[], None]] = []
    try:
        for module_name, module in base.named_modules():
            prefix = f"model.{module_name}." if module_name else "model."
            for holder in (module._parameters, module._buffers):
                for leaf, before in list(holder.items()):
                    if before is None or (
                        holder is module._buffers and prefix + leaf not in tensors
                    ):
                        continue
                    undo.append(_put_back(holder, leaf, before))
                    holder[leaf] = tensors[prefix + leaf]
        yield
    finally:
        for each in undo:
            each()


def _put_back(holder: dict[str, Any], key: str, value: Any) -> Callable[[], None]:
    return lambda: holder.__setitem__(key, value)
