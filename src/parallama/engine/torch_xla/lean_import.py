"""Importing torch_xla without two of its modules that are slow to import and not needed here."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


def import_torch_xla() -> None:
    """Import torch_xla, unless it is imported already.

    Whoever imports the two modules later gets them. They need torch's own compiler (functorch,
    torch._inductor), which takes longer to import than all the rest. One exports programs as
    StableHLO: torch_xla takes functions of it, which import it now when they are called. The other
    replaces torch's GRU, which stays.
    """
    if "torch_xla" in sys.modules:
        return
    import torch

    gru = ModuleType("torch_xla.experimental.gru")
    vars(gru)["GRU"] = torch.nn.GRU
    stand_ins = {each.__name__: each for each in (gru, _ImportedLater("torch_xla.stablehlo"))}
    sys.modules.update(stand_ins)
    try:
        import torch_xla  # noqa: F401
    finally:
        for name in stand_ins:
            del sys.modules[name]


def runtime_runs() -> bool:
    """Whether torch-xla has made its client, which reads the environment.

    Importing it alone doesn't make one; accelerate imports it.
    """
    if "torch_xla" not in sys.modules:
        return False
    import torch_xla

    return bool(torch_xla._XLAC._xla_runtime_is_initialized())


class _ImportedLater(ModuleType):
    """A stand-in for a module, whose functions import it when they are called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def imported_later(*args: Any, **kwargs: Any) -> Any:
            return getattr(importlib.import_module(self.__name__), name)(*args, **kwargs)

        return imported_later
