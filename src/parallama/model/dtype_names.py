"""Names of dtypes as others write them, for an error that names ours. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..errors import UsageError, lines, shown

_SAME: Mapping[str, str] = {
    **dict.fromkeys(("bf16", "bfloat", "brain", "b16"), "bfloat16"),
    **dict.fromkeys(("fp32", "f32", "float", "single", "full", "32"), "float32"),
    **dict.fromkeys(("fp16", "f16", "half", "16", "float16"), "float16"),
}
_NEARBY: Mapping[str, str] = {
    "float16": "bfloat16 takes as many bytes, and has float32's range",
    "quantized": "quantized weights are not supported; bfloat16 takes half of float32",
}


def unknown_dtype(given: object, known: Iterable[str], *, called: str = "dtype") -> UsageError:
    """The error for a dtype that there is not.

    Args:
        known: those that there are.
        called: the option's name.
    """
    names = list(known)
    plain = str(given).lower().removeprefix("torch.").removeprefix("jnp.")
    meant = _SAME.get(plain, plain)
    hint = f"did you mean {meant}?" if meant in names else _NEARBY.get(meant, "")
    if not hint and any(plain.startswith(kind) for kind in ("int", "fp8", "float8", "q", "nf4")):
        hint = _NEARBY["quantized"]
    *others, last = names
    return UsageError(
        lines(
            f"{called} {shown(given)} is unknown", f"expected {', '.join(others)} or {last}", hint
        )
    )
