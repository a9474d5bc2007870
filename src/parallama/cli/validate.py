"""`parallama validate`: hold a model on its mesh against transformers on one device."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import text_files
from ..errors import UsageError, cause, lines
from ..plan.mesh_shape import MeshShape
from ..progress_bars import progress_bars
from . import options, output

if TYPE_CHECKING:
    from rich.console import Console

    from ..inference.llm import LLM
    from ..prove.gradient_parity import GradientFigures
    from ..prove.metrics import LogitFigures
    from ..prove.validation import Validation

DEFAULT_PROMPT_TOKENS = 256
_MOST_SEED = (1 << 64) - 1
_WORST = 5


def validate(
    *,
    tokens: Annotated[
        Path | None,
        typer.Option(
            "--tokens", help="A text, or a .json list of token ids.", show_default="a shipped text"
        ),
    ] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option("--prompt-tokens", help="Tokens taken in at once.", show_default="256", min=2),
    ] = None,
    decode: Annotated[
        int, typer.Option("--decode", help="Tokens then fed one by one, through the cache.", min=0)
    ] = 32,
    grads: Annotated[
        bool, typer.Option("--grads", help="Compare every parameter's gradient too.")
    ] = False,
    chosen: options.ModelOptions,
    seed: Annotated[
        int,
        typer.Option(
            "--seed",
            help="For token ids drawn where there is no tokenizer.",
            callback=options.within(0, _MOST_SEED),
        ),
    ] = 0,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Compare logits, decoding, every module and gradients with transformers on one device; exit
    code 1 if they differ by more than rounding.
    """
    _check_lengths(prompt_tokens, decode, chosen.positions())
    given = None if tokens is None else _read(tokens)
    with output.only_json(as_json), progress_bars(quiet) as progress:
        llm = chosen.load(progress=progress)
        from ..prove.validation import validate as run

        ids, origin = _ids(llm, given, prompt_tokens, decode, seed)
        found = run(llm, ids, decode=decode, gradients=grads)
    tokens_from = str(tokens) if tokens is not None else origin
    if as_json:
        output.print_json(found.to_dict() | {"tokens_from": tokens_from})
    else:
        from rich.console import Console

        _render(found, tokens_from, Console())
    if not found.passed:
        raise typer.Exit(1)


def _check_lengths(prompt_tokens: int | None, decode: int, positions: int | None) -> None:
    """Refuse more tokens than the model has positions, before it is loaded."""
    if positions is None:
        return
    least = 2  # tokens of a prompt
    options.refuse_over(
        positions - least, f"{least} less than the model's positions", decode=decode
    )
    options.refuse_over(
        positions - decode,
        f"the model's {positions} positions less those of --decode {decode}",
        prompt_tokens=prompt_tokens,
    )


def _read(file: Path) -> str | list[int]:
    """A file's text, or token ids if it is a `.json`."""
    try:
        text = text_files.read(file)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UsageError(
            lines(
                f"--tokens {str(file)!r} cannot be read: {reason}",
                "expected a text, or a .json list of token ids",
            )
        ) from None
    if file.suffix != ".json":
        return text
    try:
        ids = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(
            lines(
                f"--tokens {str(file)!r} is no JSON: {cause(error)}",
                "expected a list of token ids, as [1, 2, 3]",
            )
        ) from None
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise UsageError(
            lines(
                f"--tokens {str(file)!r} holds something else than token ids",
                "expected a list of them, as [1, 2, 3]",
            )
        )
    return ids


def _ids(
    llm: LLM, given: str | list[int] | None, prompt_tokens: int | None, decode: int, seed: int
) -> tuple[list[int], str]:
    """The tokens to run, and where they are from if none were given.

    As many as were asked for; without `--prompt-tokens` as many as there are and fit.
    """
    wanted = (prompt_tokens or DEFAULT_PROMPT_TOKENS) + decode
    if prompt_tokens is None:
        wanted = min(wanted, llm.max_model_len)
    if given is None and llm.tokenizer is None:
        import torch

        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(llm.plan.model.vocab, (wanted,), generator=generator)
        return drawn.tolist(), f"drawn with seed {seed}"
    if given is None:
        from ..prove.shipped_text import shipped

        given = shipped()
    ids = llm.encode(given)
    if prompt_tokens is not None and len(ids) < wanted:
        raise UsageError(
            lines(
                f"the text has {len(ids)} tokens",
                f"expected {wanted}: {prompt_tokens} at once, {decode} one by one",
            )
        )
    return ids[:wanted], "shipped text"


def _render(found: Validation, tokens_from: str, console: Console) -> None:
    from rich.text import Text

    mesh = MeshShape(found.mesh)
    verdict = Text("passed", style="bold green")
    if not found.passed:
        verdict = Text(f"FAILED: {', '.join(found.faults)}", style="bold red")
    title = f"{found.model} on {mesh} {found.backend}, {found.dtype}: "
    console.print(Text(title, overflow="fold") + verdict)
    run = f"{found.prefill_tokens} tokens at once, {found.decode_tokens} one by one ({tokens_from})"
    console.print(Text(f"{run}; against transformers on one device in float32", overflow="fold"))
    _logits(found, console)
    _modules(found, console)
    if found.gradients is not None:
        _gradients(found.gradients, found.tolerances.gradients_relative_l2, console)


def _logits(found: Validation, console: Console) -> None:
    runs: dict[str, LogitFigures | None] = {
        "prefill": found.prefill,
        "decode": found.decode,
        f"transformers {found.dtype}, prefill": found.dtype_prefill,
        f"transformers {found.dtype}, decode": found.dtype_decode,
    }
    kept = {name: figures for name, figures in runs.items() if figures is not None}
    rows = [
        (head, *(_number(getattr(figures, name)) for figures in kept.values()))
        for name, head in _FIGURES.items()
    ]
    limit = _number(found.tolerances.logits_relative_l2)
    rows.append(("tolerance of relative L2", *[limit] * len(kept)))
    _table(console, "Logits", ("", *kept), rows)


def _modules(found: Validation, console: Console) -> None:
    out = [module for module in found.modules if not module.ok]
    nearest = sorted(found.modules, key=lambda module: -module.alone_relative_l2 / module.tolerance)
    heads = (
        "module",
        "relative L2\non right inputs",
        "tolerance",
        "relative L2\nin the run",
        "largest\ndifference",
    )
    rows = [
        (
            module.name,
            _number(module.alone_relative_l2),
            _number(module.tolerance),
            _number(module.relative_l2),
            _number(module.max_abs_diff),
        )
        for module in (out or nearest)[:_WORST]
    ]
    shown = "the first" if out else "the nearest to theirs"
    title = f"Modules: {len(out)} of {len(found.modules)} out of tolerance; {shown}"
    _table(console, title, heads, rows)
    if found.first_fault is not None:
        console.print(
            f"first module out of tolerance: {found.first_fault}",
            style="bold",
            markup=False,
            highlight=False,
        )


def _gradients(gradients: list[GradientFigures], limit: float, console: Console) -> None:
    wrong = sum(not gradient.ok for gradient in gradients)
    worst = sorted(gradients, key=lambda gradient: (gradient.ok, -gradient.relative_l2))[:_WORST]
    rows = [
        (gradient.name, _number(gradient.relative_l2), _number(limit), _number(gradient.pcc))
        for gradient in worst
    ]
    title = f"Gradients: {wrong} of {len(gradients)} out of tolerance; the furthest"
    _table(console, title, ("parameter", "relative L2", "tolerance", "PCC"), rows)


def _table(
    console: Console, title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE, pad_edge=False)
    for index, head in enumerate(heads):
        table.add_column(head, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(Text(f"\n{title}", style="bold"))
    console.print(table)


_FIGURES = {
    "pcc": "PCC",
    "relative_l2": "relative L2",
    "max_abs_diff": "largest difference",
    "top1_agreement": "top-1 agreement",
    "top5_agreement": "top-5 agreement",
    "kl_nats": "KL, nats",
    "perplexity": "perplexity",
    "reference_perplexity": "perplexity of the reference",
}


def _number(value: Any) -> str:
    if value is None:
        return "-"
    if 0.01 <= abs(value) < 1000:
        return f"{value:.6f}"
    if value and abs(value) < 1:
        return f"{value:.2e}"
    return f"{value:,.1f}"
