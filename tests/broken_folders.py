"""Model folders, good and broken: a tiny one made byte by byte, and a table of ways to break it.

Run as a script, it lists the cases, or writes the folder of one:
`python tests/broken_folders.py [NAME FOLDER]`.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": 24,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "eos_token_id": 2,
}
WORDS = [
    "<unk>",
    "<s>",
    "</s>",
    "a",
    "b",
    "c",
    "d",
    "e",
    "f",
    "g",
    "h",
    "i",
    "j",
    "k",
    "l",
    "m",
    "n",
    "o",
    "p",
    "q",
    "r",
    "s",
    "t",
    "u",
]
TOKENIZER: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
        {
            "id": 0,
            "content": "<unk>",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        },
        {
            "id": 2,
            "content": "</s>",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        },
    ],
    "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None,
    "decoder": None,
    "model": {
        "type": "WordLevel",
        "vocab": {word: index for index, word in enumerate(WORDS)},
        "unk_token": "<unk>",
    },
}
TOKENIZER_CONFIG: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "unk_token": "<unk>",
    "eos_token": "</s>",
}
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
Q = "model.layers.0.self_attn.q_proj.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FIRST = EMBEDDING
INV_FREQ = "model.layers.0.self_attn.rotary_emb.inv_freq"
NUMPY = {"F32": "<f4", "F64": "<f8", "F16": "<f2"}


@dataclass
class Tensor:
    """A tensor of a file: what the header says of it, and its bytes."""

    dtype: str
    shape: list[int]
    data: bytes


def parameters(config: Mapping[str, Any] = CONFIG) -> dict[str, list[int]]:
    """The names and shapes of a Llama's parameters, written down apart from the package."""
    hidden, inter, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    query, kv = (
        config["num_attention_heads"] * config["head_dim"],
        config["num_key_value_heads"] * config["head_dim"],
    )
    shapes = {EMBEDDING: [vocab, hidden]}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}self_attn.q_proj.weight": [query, hidden],
            f"{prefix}self_attn.k_proj.weight": [kv, hidden],
            f"{prefix}self_attn.v_proj.weight": [kv, hidden],
            f"{prefix}self_attn.o_proj.weight": [hidden, query],
            f"{prefix}mlp.gate_proj.weight": [inter, hidden],
            f"{prefix}mlp.up_proj.weight": [inter, hidden],
            f"{prefix}mlp.down_proj.weight": [hidden, inter],
            f"{prefix}input_layernorm.weight": [hidden],
            f"{prefix}post_attention_layernorm.weight": [hidden],
        }
    shapes["model.norm.weight"] = [hidden]
    if not config["tie_word_embeddings"]:
        shapes[HEAD] = [vocab, hidden]
    return shapes


def encode(values: np.ndarray, dtype: str) -> bytes:
    if dtype == "BF16":
        return (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return values.astype(NUMPY[dtype]).tobytes()


def random_tensor(shape: list[int], dtype: str = "F32", seed: int = 0) -> Tensor:
    return Tensor(
        dtype, list(shape), encode(np.random.default_rng(seed).standard_normal(shape), dtype)
    )


def good_tensors(config: Mapping[str, Any] = CONFIG, dtype: str = "F32") -> dict[str, Tensor]:
    return {
        name: random_tensor(shape, dtype, seed)
        for seed, (name, shape) in enumerate(parameters(config).items())
    }


def header_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    header, at = {}, 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [at, at + len(tensor.data)],
        }
        at += len(tensor.data)
    return header


def packed(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file of a header (bytes, or what becomes JSON) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Any = None) -> None:
    header = (
        header_of(tensors) if metadata is None else {"__metadata__": metadata} | header_of(tensors)
    )
    path.write_bytes(packed(header, b"".join(tensor.data for tensor in tensors.values())))


def read_parts(folder: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of the single file."""
    content = (folder / SINGLE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_json(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document), encoding="utf-8")


def make_good(
    folder: Path, config: Mapping[str, Any] = CONFIG, tensors: Mapping[str, Tensor] | None = None
) -> Path:
    """A whole tiny model with tokenizer and chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", dict(config))
    save(folder / SINGLE, good_tensors(config) if tensors is None else tensors, {"format": "pt"})
    write_json(folder / "tokenizer.json", TOKENIZER)
    write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
    write_json(
        folder / "generation_config.json",
        {"eos_token_id": [2], "do_sample": True, "temperature": 0.7, "top_p": 0.9},
    )
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


def make_sharded(folder: Path, count: int = 3) -> dict[str, str]:
    """Cut the single file into shards with an index; gives the weight map."""
    tensors = good_tensors()
    (folder / SINGLE).unlink()
    shards: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for place, (name, tensor) in enumerate(tensors.items()):
        shards[place * count // len(tensors)][name] = tensor
    claimed = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{count:05}.safetensors"
        save(folder / file, shard)
        claimed |= dict.fromkeys(shard, file)
    write_json(folder / INDEX, {"metadata": {"total_size": 1}, "weight_map": claimed})
    return claimed


# The table: name -> how to break (or only change) the good folder, and what must come of it.


@dataclass(frozen=True)
class Case:
    """A way to change a good folder, and the outcome.

    Attributes:
        says: parts of the error's message; none if the folder must load.
        where: the part that refuses: `open` (config, headers, index), `read` (tensors),
            `tokenizer` or `chat`.
    """

    change: Callable[[Path], None]
    says: tuple[str, ...] = ()
    where: str = "open"


CASES: dict[str, Case] = {}


def case(name: str, change: Callable[[Path], None], *says: str, where: str = "open") -> None:
    assert name not in CASES, name
    CASES[name] = Case(change, says, where)


def _edit_config(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        document = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        write_json(
            folder / "config.json",
            {key: value for key, value in (document | values).items() if value is not ...},
        )

    return change


def _edit_json(file: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        document = json.loads((folder / file).read_text(encoding="utf-8"))
        write_json(
            folder / file,
            {key: value for key, value in (document | values).items() if value is not ...},
        )

    return change


def _content(file: str, content: bytes | str) -> Callable[[Path], None]:
    return lambda folder: (
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
        and None
    )


def _entry(name: str, **fields: Any) -> Callable[[Path], None]:
    """Change what the header says of a tensor."""

    def change(folder: Path) -> None:
        header, data = read_parts(folder)
        header[name] = {
            key: value for key, value in (header[name] | fields).items() if value is not ...
        }
        (folder / SINGLE).write_bytes(packed(header, data))

    return change


def _header(edit: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Change the header's text, with its length."""

    def change(folder: Path) -> None:
        header, data = read_parts(folder)
        (folder / SINGLE).write_bytes(packed(edit(json.dumps(header).encode()), data))

    return change


def _length(value: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = (folder / SINGLE).read_bytes()
        (folder / SINGLE).write_bytes(value.to_bytes(8, "little") + content[8:])

    return change


def _cut(keep: Callable[[bytes], int]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = (folder / SINGLE).read_bytes()
        (folder / SINGLE).write_bytes(content[: keep(content)])

    return change


def _tensors(
    edit: Callable[[dict[str, Tensor]], None],
    config: Mapping[str, Any] = CONFIG,
    metadata: Any = None,
) -> Callable[[Path], None]:
    """Change the tensors themselves; the header follows."""

    def change(folder: Path) -> None:
        tensors = good_tensors(config)
        edit(tensors)
        write_json(folder / "config.json", dict(config))
        save(folder / SINGLE, tensors, metadata)

    return change


def _index(edit: Callable[[Path, dict[str, str]], Any]) -> Callable[[Path], None]:
    """Cut into shards, then change the index: `edit` gives its weight map (None: as it left it)."""

    def change(folder: Path) -> None:
        claimed = make_sharded(folder)
        edited = edit(folder, claimed)
        if edited is not None:
            write_json(folder / INDEX, {"metadata": {}, "weight_map": edited})

    return change


def _replace(file: str, how: Callable[[Path], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        how(folder / file)

    return change


def _link_outside(file: str) -> Callable[[Path], None]:
    """The file moves beside the folder, and a link to it stays."""

    def change(folder: Path) -> None:
        if not (folder / file).exists():
            (folder / file).write_text("{}", encoding="utf-8")
        outside = folder.parent / f"{folder.name}-outside-{file}"
        (folder / file).rename(outside)
        (folder / file).symlink_to(outside)

    return change


def _headers_cases() -> None:
    header_end = lambda content: 8 + int.from_bytes(content[:8], "little")  # noqa: E731
    for name, keep in {
        "nothing": lambda content: 0,
        "1 byte": lambda content: 1,
        "7 bytes": lambda content: 7,
        "8 bytes": lambda content: 8,
        "9 bytes": lambda content: 9,
        "half of the header": lambda content: header_end(content) // 2,
        "all but the header's last byte": lambda content: header_end(content) - 1,
        "the header alone": lambda content: header_end(content),
        "one byte of data": lambda content: header_end(content) + 1,
        "all but one byte": lambda content: len(content) - 1,
        "half": lambda content: len(content) // 2,
    }.items():
        case(f"file cut: {name} is left", _cut(keep), SINGLE, "damaged")
    for place, (name, shape) in enumerate(parameters().items()):
        case(
            f"file cut behind tensor {place}",
            _cut(
                lambda content, end=name: (
                    header_end(content)
                    + json.loads(content[8 : header_end(content)])[end]["data_offsets"][1]
                    - 4
                )
            ),
            SINGLE,
            "damaged",
            name,
        )
        assert shape
    case(
        "file with a byte too many",
        _replace_data(lambda data: data + b"\0"),
        SINGLE,
        "1 bytes behind its last tensor",
    )
    case(
        "file with a page too many",
        _replace_data(lambda data: data + bytes(4096)),
        SINGLE,
        "4096 bytes",
    )
    for value in (
        0,
        1,
        7,
        1 << 31,
        (1 << 32) - 1,
        100_000_001,
        1 << 62,
        (1 << 63) - 1,
        1 << 63,
        (1 << 64) - 1,
    ):
        case(f"header length {value}", _length(value), SINGLE, "damaged")
    case(
        "header length one too many",
        lambda folder: _length(int.from_bytes((folder / SINGLE).read_bytes()[:8], "little") + 1)(
            folder
        ),
        SINGLE,
    )
    case(
        "header length one too few",
        lambda folder: _length(int.from_bytes((folder / SINGLE).read_bytes()[:8], "little") - 1)(
            folder
        ),
        SINGLE,
    )
    for name, text in {
        "no JSON": b"not json at all!",
        "a list": b"[]",
        "a number": b"7777",
        "null": b"null",
        "a text": b'"abc"',
        "deep lists": b"[" * 100_000,
        "deep objects": b'{"a":' * 50_000,
        "an open object": b'{"a": {"dtype": "F32"',
        "a trailing comma": b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]},}',
        "no UTF-8": b'{"\xff\xfe": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}',
        "zeros": bytes(64),
        "a NaN": b'{"a": NaN}',
        "single quotes": b"{'a': {'dtype': 'F32', 'shape': [0], 'data_offsets': [0, 0]}}",
        "a raw newline in a name": b'{"a\nb": '
        b'{"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}',
        "a name without value": b'{"a"}',
        "two objects": b"{}{}",
        "a bad escape": b'{"\\q": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}',
    }.items():
        case(f"header is {name}", _header(lambda _old, new=text: new), SINGLE, "damaged")
    entry = b'"x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}'
    case(
        "header names a tensor twice",
        _header(lambda old: b"{" + entry + b"," + entry + b"," + old[1:]),
        SINGLE,
        "'x' twice",
    )
    case(
        "header names a tensor twice, once escaped",
        _header(lambda old: b"{" + entry + b"," + entry.replace(b"x", b"\\u0078") + b"," + old[1:]),
        SINGLE,
        "'x' twice",
    )
    case(
        "header has metadata twice",
        _header(lambda old: b'{"__metadata__": {}, ' + old[1:]),
        SINGLE,
        "twice",
    )
    case(
        "header has a field twice",
        _header(lambda old: old.replace(b'"dtype"', b'"dtype": "F32", "dtype"', 1)),
        SINGLE,
        "field twice",
        FIRST,
    )
    case(
        "header has text behind its end", _header(lambda old: old + b"x"), SINGLE, "behind its end"
    )
    case(
        "header has a name of 5,000 letters",
        _header(lambda old: b'{"' + b"n" * 5000 + entry[2:] + b"," + old[1:]),
        SINGLE,
        "damaged",
    )
    case(
        "header names 100,000 tensors",
        _header(
            lambda old: (
                b"{"
                + b",".join(entry.replace(b"x", b"%d" % number) for number in range(100_000))
                + b","
                + old[1:]
            )
        ),
        SINGLE,
        "more than",
    )
    for name, metadata in {
        "a list": [],
        "a number": 7,
        "numbers": {"a": 7},
        "objects": {"a": {}},
        "null": None,
    }.items():
        case(f"metadata is {name}", _entry_raw("__metadata__", metadata), SINGLE, "__metadata__")


def _replace_data(edit: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        header, data = read_parts(folder)
        (folder / SINGLE).write_bytes(packed(header, edit(data)))

    return change


def _entry_raw(name: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        header, data = read_parts(folder)
        (folder / SINGLE).write_bytes(packed(header | {name: value}, data))

    return change


def _entries_cases() -> None:
    size = 24 * 8 * 4
    for name, offsets in {
        "beyond the file": [0, 1 << 60],
        "backwards": [size, 0],
        "negative": [-8, 8],
        "of three": [0, 4, 8],
        "of one": [0],
        "of texts": ["0", "768"],
        "of floats": [0.0, 768.0],
        "of booleans": [False, True],
        "null": None,
        "an object": {},
        "of 2^64": [0, 1 << 64],
        "of 4,000 digits": [0, 10**4000],
        "with a gap before": [4, size],
        "over the next": [0, size + 4],
        "short": [0, size - 4],
    }.items():
        case(f"offsets {name}", _entry(FIRST, data_offsets=offsets), SINGLE, FIRST)
    case(
        "offsets the same for two",
        lambda folder: _entry(Q, data_offsets=read_parts(folder)[0][EMBEDDING]["data_offsets"])(
            folder
        ),
        SINGLE,
    )

    def shift_last(folder: Path) -> None:
        header, data = read_parts(folder)
        last = list(header)[-1]
        header[last]["data_offsets"] = [offset + 8 for offset in header[last]["data_offsets"]]
        (folder / SINGLE).write_bytes(packed(header, data + bytes(8)))

    case("offsets leave a gap", shift_last, SINGLE, "belong to no tensor", HEAD)

    def overlap(folder: Path) -> None:
        header, data = read_parts(folder)
        last = list(header)[-1]
        header[last]["data_offsets"] = [offset - 8 for offset in header[last]["data_offsets"]]
        (folder / SINGLE).write_bytes(packed(header, data[:-8]))

    case("offsets overlap", overlap, SINGLE, "overlaps", HEAD)
    for name, shape in {
        "empty": [],
        "negative": [-24, -8],
        "of floats": [24.0, 8.0],
        "of texts": ["24", "8"],
        "null": None,
        "a number": 192,
        "of booleans": [True, True],
        "huge": [1 << 62, 1 << 62],
        "of 4,000 digits": [10**4000, 8],
        "one too many": [25, 8],
        "zero": [0, 8],
        "of 100 dims": [1] * 98 + [24, 8],
        "nested": [[24], 8],
    }.items():
        case(f"shape {name}", _entry(FIRST, shape=shape), SINGLE, FIRST)
    case(
        "shape turned round",
        _entry(FIRST, shape=[8, 24]),
        SINGLE,
        FIRST,
        "expected [24, 8], from the config",
    )
    case("shape flat", _entry(FIRST, shape=[192]), SINGLE, FIRST, "from the config")
    for dtype in ("F31", "", "f32", None, 7, [], "BFLOAT16", "Q4_1", "\u202eF32"):
        case(f"dtype {dtype!r}", _entry(FIRST, dtype=dtype), SINGLE, FIRST, "dtype")
    for dtype in ("I32", "U32"):
        case(
            f"dtype {dtype}, of a number's size",
            _entry(FIRST, dtype=dtype),
            SINGLE,
            FIRST,
            f"of dtype {dtype}",
        )
    for dtype in ("F16", "F64", "I8", "C64", "F4", "BOOL"):
        case(f"dtype {dtype}, of another size", _entry(FIRST, dtype=dtype), SINGLE, FIRST)
    for field in ("dtype", "shape", "data_offsets"):
        case(f"entry without {field}", _entry(FIRST, **{field: ...}), SINGLE, FIRST)
    case("entry with a field more", _entry(FIRST, code="os.system"), SINGLE, FIRST, "code")
    for name, value in {"null": None, "a list": [], "a text": "x", "empty": {}}.items():
        case(f"entry is {name}", _entry_raw(FIRST, value), SINGLE, FIRST)


def _tensor_cases() -> None:
    case("tensor missing", _tensors(lambda tensors: tensors.pop(Q) and None), "missing tensors", Q)
    case(
        "all tensors missing",
        _tensors(lambda tensors: tensors.clear()),
        SINGLE,
        "no tensors",
    )
    for name in (
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "transformer.wte.weight",
        "",
        " ",
        "a\tb",
        "\ud800",
    ):
        case(
            f"tensor {name!r} unexpected",
            _tensors(lambda tensors, new=name: tensors.update({new: random_tensor([3])})),
            SINGLE,
            "unexpected",
        )
    case(
        "tensor with terminal escapes in its name",
        _tensors(
            lambda tensors: tensors.update({"\x1b[2J\x1b[31m\n\nfake line": random_tensor([3])})
        ),
        SINGLE,
        "unexpected tensor \\x1b[2J",
    )
    case(
        "quantized tensors beside",
        _tensors(
            lambda tensors: tensors.update({Q.replace("weight", "qweight"): random_tensor([3])})
        ),
        "qweight",
    )
    case(
        "experts",
        _tensors(
            lambda tensors: tensors.update(
                {"model.layers.0.mlp.experts.0.w1.weight": random_tensor([3])}
            )
        ),
        "experts.0",
    )
    case(
        "fused QKV",
        _tensors(
            lambda tensors: tensors.update(
                {Q.replace("q_proj", "qkv_proj"): random_tensor([16, 8])}
            )
        ),
        "qkv_proj",
    )
    for name, number in {"NaN": np.nan, "infinity": np.inf, "minus infinity": -np.inf}.items():
        for dtype in ("F32", "F16", "BF16", "F64"):

            def spoil(
                tensors: dict[str, Tensor], number: float = number, dtype: str = dtype
            ) -> None:
                values = np.ones(8 * 8)
                values[37] = number
                tensors[Q] = Tensor(dtype, [8, 8], encode(values, dtype))

            case(
                f"{name} in {dtype}",
                _tensors(spoil),
                SINGLE,
                Q,
                "NaN or infinity (1 of 64",
                where="read",
            )
    tied = CONFIG | {"tie_word_embeddings": True}
    case(
        "tied head that differs",
        _tensors(lambda tensors: tensors.update({HEAD: random_tensor([24, 8], seed=99)}), tied),
        *(SINGLE, HEAD, "differs from"),
        where="read",
    )
    case(
        "tied head of another dtype",
        _tensors(lambda tensors: tensors.update({HEAD: random_tensor([24, 8], "F16")}), tied),
        *(SINGLE, HEAD, "differs from"),
        where="read",
    )
    case(
        "tied head of another shape",
        _tensors(lambda tensors: tensors.update({HEAD: random_tensor([8, 8])}), tied),
        SINGLE,
        HEAD,
        "shape",
    )


def _index_cases() -> None:
    for name in (
        "../model.safetensors",
        "..",
        ".",
        "/etc/passwd",
        "/model.safetensors",
        "sub/m.safetensors",
        "model.bin",
        "",
        "a\\b.safetensors",
    ):
        case(
            f"index names {name!r}",
            _index(lambda _folder, claimed, new=name: claimed | {Q: new}),
            INDEX,
            "names the file",
        )
    for name in (
        "missing.safetensors",
        "with\0null.safetensors",
        "n" * 400 + ".safetensors",
        "\ud800.safetensors",
        "a\nb.safetensors",
    ):
        case(
            f"index names {name[:20]!r}",
            _index(lambda _folder, claimed, new=name: claimed | {Q: new}),
            INDEX,
            "names",
        )
    for name, content in {
        "empty": "",
        "open": "{",
        "deep": "[" * 100_000,
        "a list": "[]",
        "a number": "7",
        "null": "null",
        "an object without a map": "{}",
        "a map of numbers": '{"weight_map": {"a": 7}}',
        "a map of lists": '{"weight_map": {"a": ["model.safetensors"]}}',
        "a list as map": '{"weight_map": ["model.safetensors"]}',
        "one key twice": '{"weight_map": {"a": "b.safetensors", "a": "c.safetensors"}}',
        "two maps": '{"weight_map": {}, "weight_map": {}}',
        "a huge number": '{"weight_map": ' + "9" * 5000 + "}",
        "UTF-16": "\ufeff{}",
    }.items():
        case(f"index is {name}", _content(INDEX, content), INDEX)
    case(
        "index is 20 MB",
        _content(INDEX, b'{"weight_map": {' + b" " * (20 << 20) + b"}}"),
        INDEX,
        "more than",
    )
    case("index is no UTF-8", _content(INDEX, b'{"weight_map": {"\xff": "a.safetensors"}}'), INDEX)
    case(
        "index with an empty map",
        _content(INDEX, '{"weight_map": {}}'),
        "missing tensors",
        EMBEDDING,
    )
    case(
        "index without a shard",
        _index(lambda folder, claimed: (folder / claimed[Q]).unlink()),
        INDEX,
        "which is missing",
    )
    case(
        "index without a tensor",
        _index(lambda _folder, claimed: {key: value for key, value in claimed.items() if key != Q}),
        Q,
        "nothing of it",
    )
    case(
        "index with a tensor too many",
        _index(lambda _folder, claimed: claimed | {"x": claimed[Q]}),
        INDEX,
        "holds tensor x",
    )
    case(
        "tensor in another shard than claimed",
        _index(lambda _folder, claimed: claimed | {Q: claimed[HEAD]}),
        Q,
        "says that",
    )

    def in_two(folder: Path, claimed: dict[str, str]) -> None:
        save(folder / claimed[HEAD], {HEAD: good_tensors()[HEAD], Q: random_tensor([8, 8])})

    case("tensor in two shards", _index(in_two), Q)
    case(
        "index names a folder",
        _index(lambda folder, claimed: _replace(claimed[Q], Path.mkdir)(folder)),
        "is a folder",
    )
    case(
        "index names a FIFO",
        _index(lambda folder, claimed: _replace(claimed[Q], os.mkfifo)(folder)),
        "is a FIFO",
    )
    case(
        "index names a link out of the folder",
        _index(lambda folder, claimed: _link_outside(claimed[Q])(folder)),
        "out of the model folder",
    )
    case(
        "index names a link to nothing",
        _index(
            lambda folder, claimed: _replace(claimed[Q], lambda path: path.symlink_to("gone"))(
                folder
            )
        ),
        "nothing",
    )
    case(
        "index names a link to itself",
        _index(
            lambda folder, claimed: _replace(claimed[Q], lambda path: path.symlink_to(path.name))(
                folder
            )
        ),
        "cannot be read",
    )
    case(
        "index and a single file",
        _index(lambda folder, _claimed: save(folder / SINGLE, good_tensors())),
        SINGLE,
        "doesn't name it",
    )
    case("index is a FIFO", _replace(INDEX, os.mkfifo), INDEX, "is a FIFO")
    case(
        "index is a link out of the folder", _link_outside(INDEX), INDEX, "out of the model folder"
    )
    case(
        "index is a link to a device",
        _replace(INDEX, lambda path: path.symlink_to("/dev/zero")),
        INDEX,
        "is a device",
    )


def _file_cases() -> None:
    case("single file is a FIFO", _replace(SINGLE, os.mkfifo), SINGLE, "is a FIFO")
    case("single file is a folder", _replace(SINGLE, Path.mkdir), SINGLE, "is a folder")
    case(
        "single file is a link out of the folder",
        _link_outside(SINGLE),
        SINGLE,
        "out of the model folder",
    )
    case(
        "single file is a link to a device",
        _replace(SINGLE, lambda path: path.symlink_to("/dev/zero")),
        SINGLE,
        "is a device",
    )
    case(
        "single file is missing", lambda folder: (folder / SINGLE).unlink(), "no *.safetensors file"
    )
    for name in (
        "pytorch_model.bin",
        "model.pt",
        "consolidated.00.pth",
        "last.ckpt",
        "weights.pkl",
    ):
        case(
            f"pickle only: {name}",
            lambda folder, new=name: (folder / SINGLE).rename(folder / new) and None,
            "only pickle weights",
            name,
        )
    for weights in ("adapter_model.bin", "adapter_model.safetensors"):
        case(f"no adapter's config: {weights}", _adapter(weights), "adapter_config.json", "LORA")
    case("adapter beside a model", _content("adapter_config.json", "{}"), "holds an adapter")


def _adapter(weights: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / SINGLE).rename(folder / weights)
        (folder / "config.json").rename(folder / "adapter_config.json")

    return change


def _config_cases() -> None:
    case("config is missing", lambda folder: (folder / "config.json").unlink(), "no config.json")
    case("config is a folder", _replace("config.json", Path.mkdir), "config.json is a folder")
    case("config is a FIFO", _replace("config.json", os.mkfifo), "config.json is a FIFO")
    case(
        "config is a link out of the folder",
        _link_outside("config.json"),
        "config.json",
        "out of the model folder",
    )
    for name, content in {
        "empty": b"",
        "open": b"{",
        "no UTF-8": b"\xff\xfe",
        "deep": b"[" * 100_000,
        "a number of 5,000 digits": b'{"hidden_size": ' + b"9" * 5000 + b"}",
        "a list": b"[]",
        "a text": b'"llama"',
        "a number": b"7",
        "null": b"null",
        "one key twice": b'{"model_type": "llama", "model_type": "llama"}',
        "20 MB": b'{"a": "' + b"x" * (20 << 20) + b'"}',
    }.items():
        case(f"config is {name}", _content("config.json", content), "config.json")
    for key in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "num_key_value_heads",
    ):
        for name, value in {
            "0": 0,
            "-1": -1,
            "a text": "8",
            "a float": 8.5,
            "true": True,
            "a list": [8],
            "2^60": 1 << 60,
        }.items():
            case(f"config: {key} is {name}", _edit_config(**{key: value}), key)
    for key in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
    ):
        case(
            f"config: {key} is missing",
            _edit_config(**{key: ...}),
            "config" if key != "num_hidden_layers" else "",
        )
    for name, values in {
        "one layer more": {"num_hidden_layers": 3},
        "4,096 layers": {"num_hidden_layers": 4096},
        "one layer fewer": {"num_hidden_layers": 1},
        "a larger vocabulary": {"vocab_size": 25},
        "the largest vocabulary": {"vocab_size": 1 << 26},
        "wider": {"hidden_size": 16},
        "a wider MLP": {"intermediate_size": 16},
        "longer heads": {"head_dim": 8},
        "tied, but with a head": {"tie_word_embeddings": True},
        "biases": {"attention_bias": True},
        "biases of the MLP": {"mlp_bias": True},
    }.items():
        case(
            f"config says otherwise than the tensors: {name}",
            _edit_config(**values),
            "tensor",
            where="read" if "tied" in name else "open",
        )
    case(
        "config: heads don't divide",
        _edit_config(num_attention_heads=3, num_key_value_heads=2),
        "num_attention_heads",
        "num_key_value_heads",
    )
    case(
        "config: more KV heads than heads",
        _edit_config(num_key_value_heads=4),
        "num_attention_heads",
    )
    case("config: head_dim is odd", _edit_config(head_dim=3), "head_dim")
    for model_type in ("gpt2", "mixtral", "../llama", "", None, 7, ["llama"], {"a": 1}, "LLAMA"):
        case(
            f"config: model_type is {model_type!r}",
            _edit_config(model_type=model_type),
            "model_type",
        )
    for name, rope in {
        "of an unknown type": {"rope_type": "twisted", "factor": 2.0},
        "of a type that is a list": {"rope_type": ["linear"], "factor": 2.0},
        "a text": "linear",
        "a list": [1, 2],
        "linear by 0": {"rope_type": "linear", "factor": 0},
        "linear by 0.0": {"rope_type": "linear", "factor": 0.0},
        "linear by -1": {"rope_type": "linear", "factor": -1.0},
        "linear by a text": {"rope_type": "linear", "factor": "2"},
        "linear by nothing": {"rope_type": "linear"},
        "linear by NaN": {"rope_type": "linear", "factor": float("nan")},
        "linear by infinity": {"rope_type": "linear", "factor": float("inf")},
        "llama3 without its numbers": {"rope_type": "llama3", "factor": 8.0},
        "llama3 with texts": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": "1",
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        "yarn by 0": {"rope_type": "yarn", "factor": 0.0, "original_max_position_embeddings": 32},
    }.items():
        case(f"config: rope_scaling is {name}", _edit_config(rope_scaling=rope), "config")
    for name, value in {
        "0": 0,
        "negative": -1.0,
        "a text": "10000",
        "NaN": float("nan"),
        "infinity": float("inf"),
        "true": True,
    }.items():
        case(f"config: rope_theta is {name}", _edit_config(rope_theta=value), "rope_theta")
    for name, value in {
        "a text": "small",
        "negative": -1.0,
        "NaN": float("nan"),
        "true": True,
        "a list": [1e-5],
        "2": 2,
    }.items():
        case(f"config: rms_norm_eps is {name}", _edit_config(rms_norm_eps=value), "rms_norm_eps")
    for value in (7, "no-such-activation", None, ["silu"], "__class__", "os.system"):
        case(f"config: hidden_act is {value!r}", _edit_config(hidden_act=value), "hidden_act")
    for value in ("float31", "os.system", "load", 7, ["float32"], "int8"):
        case(f"config: torch_dtype is {value!r}", _edit_config(torch_dtype=value), "dtype")
    for value in (24, -1, "2", 2.0, True, [2, 24], [[2]], {"a": 2}, 1 << 70):
        case(
            f"config: eos_token_id is {value!r}",
            _edit_config(eos_token_id=value),
            "config.json",
            "eos_token_id",
        )
    for value in (24, -2, "2", [2]):
        case(f"config: pad_token_id is {value!r}", _edit_config(pad_token_id=value), "pad_token_id")
    case(
        "config: a quantization",
        _edit_config(quantization_config={"quant_method": "gptq"}),
        "quantization_config",
    )
    case(
        "config: max_position_embeddings is 0",
        _edit_config(max_position_embeddings=0),
        "max_position_embeddings",
    )
    case(
        "config: max_position_embeddings is a text",
        _edit_config(max_position_embeddings="64"),
        "max_position_embeddings",
    )
    case(
        "config: tie_word_embeddings is a text",
        _edit_config(tie_word_embeddings="yes"),
        "tie_word_embeddings",
    )
    case(
        "config: attention_dropout is a text",
        _edit_config(attention_dropout="much"),
        "attention_dropout",
    )
    # Keys that name code are never looked at.
    code = {
        "AutoConfig": "evil.Config",
        "AutoModelForCausalLM": "evil.Model",
        "AutoTokenizer": ["evil.Tokenizer", None],
    }
    case("config: auto_map", _edit_config(auto_map=code, trust_remote_code=True))
    case(
        "config: an attention implementation of the hub",
        _edit_config(_attn_implementation="evil/kernel", attn_implementation="evil/kernel"),
    )
    case(
        "config: internal keys",
        _edit_config(
            _attn_implementation_internal="evil/kernel", _experts_implementation="evil/kernel"
        ),
    )
    case(
        "config: keys that are methods",
        _edit_config(to_dict=7, __class__="evil", from_dict="evil", __dict__={}, validate=1),
    )
    case(
        "config: keys that name code",
        _edit_config(
            custom_pipelines={"a": {"impl": "evil.P"}}, library="os", base_model_tp_plan="evil"
        ),
    )


def _generation_cases() -> None:
    for name, content in {
        "a list": "[]",
        "a number": "7",
        "null": "null",
        "open": "{",
        "empty": "",
    }.items():
        case(
            f"generation config is {name}",
            _content("generation_config.json", content),
            "generation_config.json",
        )
    for key, value in (
        *(
            ("eos_token_id", 24),
            ("eos_token_id", [-1]),
            ("eos_token_id", "2"),
            ("temperature", "hot"),
            ("temperature", -1),
            ("top_k", -5),
        ),
        *(
            ("top_k", 1.5),
            ("top_p", 0),
            ("top_p", 2),
            ("min_p", "x"),
            ("repetition_penalty", 0),
            ("do_sample", "yes"),
            ("temperature", [1]),
        ),
        *(("temperature", float("nan")), ("repetition_penalty", float("inf"))),
    ):
        change = _edit_json("generation_config.json", **{key: value})
        case(f"generation config: {key} is {value!r}", change, "generation_config.json", key)
    case(
        "generation config is a FIFO",
        _replace("generation_config.json", os.mkfifo),
        "generation_config.json is a FIFO",
    )
    case(
        "generation config is a link out of the folder",
        _link_outside("generation_config.json"),
        "out of the model folder",
    )
    case(
        "generation config is missing", lambda folder: (folder / "generation_config.json").unlink()
    )
    case(
        "generation config: keys that name code",
        _edit_json("generation_config.json", custom_generate="evil/repo", trust_remote_code=True),
    )


def _tokenizer_cases() -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        case(f"{file} is empty", _content(file, b""), "tokenizer", where="tokenizer")
        case(f"{file} is a list", _content(file, b"[]"), "tokenizer", where="tokenizer")
        case(f"{file} is no UTF-8", _content(file, b"\xff\xfe\xff"), "tokenizer", where="tokenizer")
        case(f"{file} is deep", _content(file, b"[" * 100_000), "tokenizer", where="tokenizer")
        case(f"{file} is a FIFO", _replace(file, os.mkfifo), f"{file} is a FIFO", where="tokenizer")
        case(
            f"{file} is a folder",
            _replace(file, Path.mkdir),
            f"{file} is a folder",
            where="tokenizer",
        )
        case(
            f"{file} is a link out of the folder",
            _link_outside(file),
            file,
            "out of the model folder",
            where="tokenizer",
        )
    for file in (
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "tokenizer.model",
        "chat_template.jinja",
    ):
        case(f"{file} is a FIFO", _replace(file, os.mkfifo), f"{file} is a FIFO", where="tokenizer")
        case(
            f"{file} is a link to a device",
            _replace(file, lambda path: path.symlink_to("/dev/zero")),
            file,
            where="tokenizer",
        )

    def template_folder_outside(folder: Path) -> None:
        outside = folder.parent / f"{folder.name}-outside"
        outside.mkdir()
        (outside / "secret.jinja").write_text("secret", encoding="utf-8")
        (folder / "additional_chat_templates").symlink_to(outside)

    case(
        "additional templates lead out of the folder",
        template_folder_outside,
        "additional_chat_templates",
        where="tokenizer",
    )
    for key in (
        "vocab_file",
        "tokenizer_file",
        "merges_file",
        "spm_file",
        "special_tokens_map_file",
    ):
        case(
            f"tokenizer config: {key} elsewhere",
            _edit_json("tokenizer_config.json", **{key: "/etc/passwd"}),
        )
    for name, values in {
        "a class of its own": {
            "tokenizer_class": "Evil",
            "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]},
        },
        "code": {"auto_map": ["evil.Tokenizer", None]},
        "a class that is a number": {"tokenizer_class": 7},
        "added tokens that are texts": {"added_tokens_decoder": {"x": "y"}},
        "added tokens that are a list": {"added_tokens_decoder": [1, 2]},
        "an end-of-text token that is a number": {"eos_token": 7},
    }.items():
        case(
            f"tokenizer config: {name}",
            _edit_json("tokenizer_config.json", **values),
            "tokenizer",
            where="tokenizer",
        )
    model = copy.deepcopy(TOKENIZER["model"])
    for name, values in {
        "no model": {"model": ...},
        "an unknown model": {"model": {"type": "Evil"}},
        "a vocabulary of texts": {"model": model | {"vocab": {"a": "b"}}},
        "negative ids": {"model": model | {"vocab": {"a": -1}}},
        "ids of 2^40": {"model": model | {"vocab": {"a": 1 << 40}}},
        "a bad regular expression": {
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": "("},
                "behavior": "Isolated",
                "invert": False,
            }
        },
        "a broken charsmap": {
            "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
        },
    }.items():
        case(
            f"tokenizer: {name}",
            _edit_json("tokenizer.json", **values),
            "tokenizer",
            where="tokenizer",
        )
    case(
        "tokenizer: end of text out of range", _out_of_range_eos, "eos_token_id", where="tokenizer"
    )


def _out_of_range_eos(folder: Path) -> None:
    _edit_config(eos_token_id=None)(folder)
    (folder / "generation_config.json").unlink()
    added = [
        entry | {"id": 5000} if entry["content"] == "</s>" else entry
        for entry in TOKENIZER["added_tokens"]
    ]
    vocab = {
        word: index for word, index in TOKENIZER["model"]["vocab"].items() if word != "</s>"
    } | {"</s>": 5000}
    _edit_json("tokenizer.json", added_tokens=added, model=TOKENIZER["model"] | {"vocab": vocab})(
        folder
    )


def _template(text: str) -> Callable[[Path], None]:
    return _content("chat_template.jinja", text)


def _chat_cases() -> None:
    for name, text in {
        "loops for ever": "{% for a in range(99999) %}{% for b in range(99999) %}"
        "{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
        "prints for ever": "{% for a in range(99999) %}{% for b in range(99999) %}"
        "xxxxxxxxxxxxxxxxxxxxxxxx{% endfor %}{% endfor %}",
        "makes a long text": "{{ 'x' * 10**10 }}",
        "makes a huge number": "{{ 10 ** (10 ** 9) }}",
        "pads a text": "{{ 'x'.ljust(10**10) }}",
        "formats a wide text": "{{ '%10000000000d' % 1 }}",
        "calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "is deep": "{% if a %}" * 5000,
        "is no template": "{% for %}",
        "reaches for classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "reaches for globals": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "includes a file": "{% include '/etc/passwd' %}",
        "imports a file": "{% import '/etc/passwd' as x %}",
        "raises": "{{ raise_exception('not for me') }}",
        "divides by zero": "{{ 1 // 0 }}",
        "changes a message": "{{ messages.append(1) }}",
        "writes too much": "{{ 'x' * (40 * 1000 * 1000) }}",
    }.items():
        case(f"chat template {name}", _template(text), "chat template", where="chat")


def _legal_cases() -> None:
    case("as it is", lambda folder: None)
    case(
        "inv_freq buffers", _tensors(lambda tensors: tensors.update({INV_FREQ: random_tensor([2])}))
    )
    case(
        "one inv_freq buffer for all layers",
        _tensors(
            lambda tensors: tensors.update({"model.rotary_emb.inv_freq": random_tensor([2], "F16")})
        ),
    )
    case("no metadata", _tensors(lambda tensors: None))
    case("empty metadata", _tensors(lambda tensors: None, metadata={}))
    case(
        "metadata of many kinds",
        _tensors(
            lambda tensors: None,
            metadata={"format": "pt", "": "", "a{b}": '[,]:"\\ \u20ac \U0001f600'},
        ),
    )
    case(
        "metadata of a megabyte",
        _tensors(lambda tensors: None, metadata={"notes": "{}[],:" * 170_000}),
    )
    case("header with spaces at its end", _header(lambda old: old + b" " * 77))
    case(
        "header with other white space",
        _header(lambda old: old.replace(b", ", b"\n,\t\r ").replace(b"}}", b"} \n }")),
    )
    case(
        "header with escaped names",
        _header(lambda old: old.replace(b"model.norm.weight", b"model\\u002enorm.weight")),
    )
    case(
        "header in another order than the tensors",
        _header(lambda old: json.dumps(dict(reversed(json.loads(old).items()))).encode()),
    )
    case(
        "tensors in another order",
        lambda folder: save(folder / SINGLE, dict(reversed(good_tensors().items()))),
    )
    case("F16 beside BF16 and F32", lambda folder: save(folder / SINGLE, _mixed()))
    case("F64", lambda folder: save(folder / SINGLE, good_tensors(dtype="F64")))
    case("shards", _index(lambda _folder, _claimed: None))
    case(
        "shards, index in another order",
        _index(lambda _folder, claimed: dict(reversed(claimed.items()))),
    )

    def odd_names(folder: Path, claimed: dict[str, str]) -> dict[str, str]:
        names = dict(
            zip(
                sorted(set(claimed.values())),
                ["z.safetensors", "model-1.safetensors", "\u20ac a.safetensors"],
                strict=True,
            )
        )
        for old, new in names.items():
            (folder / old).rename(folder / new)
        return {key: names[value] for key, value in claimed.items()}

    case("shards of odd names", _index(odd_names))
    case("shards without an index", _index(lambda folder, _claimed: (folder / INDEX).unlink()))

    def empty_shard(folder: Path, claimed: dict[str, str]) -> dict[str, str]:
        save(folder / "empty.safetensors", {INV_FREQ: random_tensor([2])})
        return claimed | {INV_FREQ: "empty.safetensors"}

    case("shard of buffers only", _index(empty_shard))
    case(
        "index that names the single file",
        lambda folder: write_json(
            folder / INDEX, {"weight_map": dict.fromkeys(good_tensors(), SINGLE)}
        ),
    )
    case("extra files", _extra_files)
    case(
        "extra weights that nothing names",
        lambda folder: save(folder / "adapter_model.safetensors", {"x": random_tensor([2])}),
    )
    case("links inside the folder", lambda folder: _inner_link(folder))
    tied = CONFIG | {"tie_word_embeddings": True}
    case("tied weights stored once", _tensors(lambda tensors: None, tied))
    case(
        "tied weights stored twice",
        _tensors(lambda tensors: tensors.update({HEAD: copy.copy(tensors[EMBEDDING])}), tied),
    )
    case(
        "tied weights stored once, as the head",
        _tensors(lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}), tied),
    )
    case("no tokenizer", _no_tokenizer)
    case(
        "tokenizer config: a class that is a module",
        _edit_json("tokenizer_config.json", tokenizer_class="os.system"),
    )
    case(
        "tokenizer config: code for another class",
        _edit_json("tokenizer_config.json", auto_map={"AutoProcessor": "evil.Processor"}),
    )
    case("config: pad_token_id is -1", _edit_config(pad_token_id=-1))
    case(
        "config: sizes that are silent",
        _edit_config(head_dim=..., max_position_embeddings=..., rms_norm_eps=..., hidden_act=...),
    )
    case("config: rope linear", _edit_config(rope_scaling={"type": "linear", "factor": 2.0}))
    case(
        "config: keys of training",
        _edit_config(
            use_cache=False, transformers_version="4.0", _name_or_path="/secret", bos_token_id=1
        ),
    )


def _mixed() -> dict[str, Tensor]:
    kinds = ("F16", "BF16", "F32")
    return {
        name: random_tensor(shape, kinds[place % 3], place)
        for place, (name, shape) in enumerate(parameters().items())
    }


def _extra_files(folder: Path) -> None:
    for name in (
        "README.md",
        "training_args.bin",
        "optimizer.pt",
        ".gitattributes",
        "modeling_evil.py",
        "tf_model.h5",
    ):
        (folder / name).write_bytes(b"raise SystemExit")
    (folder / "original").mkdir()
    os.mkfifo(folder / "original" / "consolidated.00.pth")
    os.mkfifo(folder / "pipe")


def _inner_link(folder: Path) -> None:
    (folder / "data").mkdir()
    (folder / SINGLE).rename(folder / "data" / "weights")
    (folder / SINGLE).symlink_to(Path("data") / "weights")


def _no_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()


for _add in (
    _headers_cases,
    _entries_cases,
    _tensor_cases,
    _index_cases,
    _file_cases,
    _config_cases,
    _generation_cases,
    _tokenizer_cases,
):
    _add()
_chat_cases()
_legal_cases()


def make(name: str, folder: Path, good: Path | None = None) -> Case:
    """Write a case's folder, from a copy of a good one."""
    if good is None:
        make_good(folder)
    else:
        shutil.copytree(good, folder)
    CASES[name].change(folder)
    return CASES[name]


if __name__ == "__main__":
    if len(sys.argv) == 3:
        found = make(sys.argv[1], Path(sys.argv[2]))
        print(f"expected: {', '.join(found.says) or 'it loads'}")
    else:
        for name, each in CASES.items():
            print(f"{name}: {'refused' if each.says else 'loads'}")
        print(f"{len(CASES)} cases", file=sys.stderr)
