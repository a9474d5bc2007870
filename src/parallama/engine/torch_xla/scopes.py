"""Names that what is traced carries into the HLO, where the backend was started with `keep_hlo`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch


@contextmanager
def scope(name: str) -> Iterator[None]:
    """What is traced within carries this name, behind those of the scopes around it."""
    import torch_xla

    inside = torch_xla._XLAC.profiler.scope_pusher(name)
    try:
        yield
    finally:
        del inside


def name_scopes(module: torch.nn.Module, prefix: str) -> None:
    """From here on every submodule's forward is traced within a scope of its name."""
    names = {part: f"{prefix}.{name}" if name else prefix for name, part in module.named_modules()}
    entered: list[AbstractContextManager[None]] = []

    def enter(part: torch.nn.Module, _arguments: Any) -> None:
        entered.append(scope(names[part]))
        entered[-1].__enter__()

    def leave(_part: torch.nn.Module, _arguments: Any, _result: Any) -> None:
        entered.pop().__exit__(None, None, None)

    for part in names:
        part.register_forward_pre_hook(enter)
        part.register_forward_hook(leave, always_call=True)
