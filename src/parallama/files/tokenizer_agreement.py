"""What counts where a tokenizer's files, or transformers' class of it, say different things.

tokenizer.json says how a text is split; tokenizer_config.json, if it says so, whether a text gets
a begin-of-text and an end-of-text token. transformers rebuilds some tokenizers by rules of their
class, and takes no notice of the two keys.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_PARTS = ("normalizer", "pre_tokenizer", "decoder")
_MODEL = (
    *("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"),
    *("fuse_unk", "byte_fallback", "ignore_merges"),
)


def by_its_files(tokenizer: Any, stage: Path) -> tuple[Any, list[str]]:
    """The tokenizer as its files describe it, and what they or transformers disagree on.

    Args:
        tokenizer: as transformers' AutoTokenizer loads the files.
        stage: where they are, with a tokenizer.json.
    """
    from transformers import TokenizersBackend

    notes = []
    if type(tokenizer) is not TokenizersBackend:
        plain = TokenizersBackend.from_pretrained(str(stage), local_files_only=True)
        if differing := _differing(tokenizer.backend_tokenizer, plain.backend_tokenizer):
            notes.append(
                f"tokenizer.json counts, which has another {' and '.join(differing)} than"
                f" transformers' {type(tokenizer).__name__}"
            )
            tokenizer = plain
    path = stage / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return tokenizer, notes + _apply_ends(tokenizer, config)


def _differing(ours: Any, theirs: Any) -> list[str]:
    """The parts in which two backends of the package tokenizers differ."""
    names = [name for name in _PARTS if _state(ours, name) != _state(theirs, name)]
    return names + (["model"] if _flags(ours) != _flags(theirs) else [])


def _flags(backend: Any) -> list[Any]:
    return [getattr(backend.model, name, None) or None for name in _MODEL]


def _state(backend: Any, name: str) -> Any:
    """A part as in a tokenizer.json, without what has no influence on tokens."""
    part = getattr(backend, name)
    state = None if part is None else json.loads(part.__getstate__())
    if name == "decoder" and isinstance(state, dict) and state.get("type") == "ByteLevel":
        return "ByteLevel"  # which reads none of its settings
    return _without_offsets(state)


def _without_offsets(state: Any) -> Any:
    if isinstance(state, dict):
        kept = {key: value for key, value in state.items() if key != "trim_offsets"}
        return {key: _without_offsets(value) for key, value in kept.items()}
    return [_without_offsets(value) for value in state] if isinstance(state, list) else state


def _apply_ends(tokenizer: Any, config: dict[str, Any]) -> list[str]:
    """Have the tokenizer add begin and end of a text as its config says. Returns what differed."""
    backend = tokenizer.backend_tokenizer
    # No text at all: whatever the tokenizer does with texts, this takes no time.
    added = backend.encode("").ids
    begins = added[:1] == [tokenizer.bos_token_id]
    ends = added[1 if begins else 0 :][-1:] == [tokenizer.eos_token_id]
    adds = {"add_bos_token": begins, "add_eos_token": ends}
    wanted = dict(adds)
    notes = []
    for key, token in (
        ("add_bos_token", tokenizer.bos_token),
        ("add_eos_token", tokenizer.eos_token),
    ):
        said = config.get(key)
        if said is None:
            continue
        if said and token is None:
            notes.append(f"tokenizer_config.json says {key}, and names no such token")
        elif said != adds[key]:
            does = "adds it" if adds[key] else "does not add it"
            notes.append(f"tokenizer_config.json counts: {key} is {said}; tokenizer.json {does}")
            wanted[key] = said
    if wanted != adds:
        for key, value in wanted.items():
            setattr(tokenizer, key, value)
    return notes
