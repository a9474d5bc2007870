"""10,000 mutants of a good folder's header, index and config: each loads or is a CheckpointError.

The mutations know the structure: they change, drop, repeat and swap keys and values of the JSON,
take values from a list of bad ones, move offsets, and only now and then flip bytes. Every mutant
follows from its number, which a failure names.
"""

from __future__ import annotations

import contextlib
import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from broken_folders import CONFIG, INDEX, SINGLE, make_good, make_sharded, packed, read_parts

from parallama.errors import CheckpointError
from parallama.files.checkpoint import SafetensorsFolder, config_from_dict
from parallama.files.model_files import read_json
from parallama.files.skeleton import make_skeleton
from parallama.files.weight_files import survey
from parallama.model.config_checks import check_generation
from parallama.model.known_configs import spec_of
from parallama.model.spec import ModelSpec

HEADERS, INDEXES, CONFIGS, GENERATIONS = 4000, 2000, 3000, 1000
BAD: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        7,
        8,
        16,
        23,
        24,
        25,
        1 << 31,
        1 << 53,
        1 << 63,
        1 << 64,
        10**400,
        0.0,
        -0.0,
        0.5,
        1e-5,
        1e308,
        -1e308,
    ),
    *(
        float("nan"),
        float("inf"),
        float("-inf"),
        "",
        " ",
        "0",
        "8",
        "F32",
        "BF16",
        "F16",
        "I8",
        "float32",
        "llama",
        "qwen3",
        "silu",
        "yarn",
        "linear",
    ),
    *(
        "../x",
        "/etc/passwd",
        "model.safetensors",
        "a" * 300,
        "\0",
        "\n",
        "\ud800",
        "\u202e",
        "__class__",
        "os.system",
        "auto",
    ),
    *(
        [],
        [0],
        [0, 0],
        [8, 8],
        [24, 8],
        [1] * 50,
        [[]],
        {},
        {"": {}},
        {"rope_type": "linear", "factor": 2.0},
        {"type": "yarn", "factor": 4},
    ),
]
MORE_KEYS = [
    *(
        "rope_scaling",
        "rope_parameters",
        "quantization_config",
        "sliding_window",
        "layer_types",
        "attention_bias",
        "mlp_bias",
        "head_dim",
        "dtype",
    ),
    *(
        "auto_map",
        "_attn_implementation",
        "attn_implementation",
        "pad_token_id",
        "pretraining_tp",
        "num_experts",
        "to_dict",
        "__class__",
        "is_causal",
    ),
    *(
        "partial_rotary_factor",
        "attention_dropout",
        "initializer_range",
        "use_cache",
        "max_window_layers",
        "use_sliding_window",
        "id2label",
    ),
    *(
        "original_max_position_embeddings",
        "tie_word_embeddings",
        "output_attentions",
        "return_dict",
        "per_layer_config",
        "sub_configs",
        "_name_or_path",
    ),
]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a JSON document."""
    found = [path] if path else []
    if isinstance(value, dict):
        for key in value:
            found += places(value[key], (*path, key))
    elif isinstance(value, list):
        for index in range(len(value)):
            found += places(value[index], (*path, index))
    return found


def mutate(document: Any, draw: random.Random, keys: list[str]) -> Any:
    """One to three changes of a JSON document."""
    document = copy.deepcopy(document)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        found = places(document)
        if not found:
            return document
        *way, last = draw.choice(found)
        parent = document
        for step in way:
            parent = parent[step]
        old = parent[last]
        action = draw.randrange(7)
        if action == 0:
            parent[last] = copy.deepcopy(draw.choice(BAD))
        elif action == 1 and isinstance(old, int):
            parent[last] = (
                old + draw.choice((-8, -4, -1, 1, 4, 8, 1 << 32)) if draw.random() < 0.7 else -old
            )
        elif action == 2 and isinstance(parent, dict):
            del parent[last]
        elif action == 3 and isinstance(parent, dict):
            parent[draw.choice((*keys, *map(str, parent)))] = old
        elif action == 4:
            other = document
            for step in (way_to := draw.choice(found))[:-1]:
                other = other[step]
            parent[last], other[way_to[-1]] = other[way_to[-1]], parent[last]
        elif action == 5 and isinstance(old, list):
            parent[last] = draw.choice((old[:-1], [*old, *old], [old], list(reversed(old))))
        elif isinstance(parent, dict):
            parent[draw.choice((*keys, str(last) + "x"))] = copy.deepcopy(draw.choice(BAD))
        # Swapping a value with one around it would make a circle, which is no JSON.
        if not _is_tree(document):
            return copy.deepcopy(draw.choice(BAD))
    return document


def _is_tree(value: Any, above: tuple[int, ...] = ()) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (
        id(value) not in above
        and len(above) < 40
        and all(
            _is_tree(each, (*above, id(value))) for each in inner if isinstance(each, (dict, list))
        )
    )


def text_of(document: Any, draw: random.Random) -> bytes:
    """As JSON; one in ten with its bytes changed."""
    text = bytearray(json.dumps(document).encode())
    if draw.random() < 0.1:
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(len(text))
            text[place : place + draw.choice((0, 1, 1, 2))] = draw.choice(
                (b"", b"\xff", b"{", b"}", b"[", b",", b'"', b"\0", b"9", text[:place][-20:])
            )
    return bytes(text)


def outcomes(count: int, attempt: Callable[[random.Random], None]) -> tuple[int, int]:
    """How many mutants loaded, and how many were refused as they should be."""
    loaded = refused = 0
    for number in range(count):
        try:
            attempt(random.Random(number))
            loaded += 1
        except CheckpointError as error:
            assert 1 <= len(str(error).splitlines()) <= 3 and len(str(error)) < 3100, number
            refused += 1
        except BaseException as error:
            pytest.fail(f"mutant {number}: {type(error).__name__}: {error}")
    return loaded, refused


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_good(tmp_path_factory.mktemp("fuzz") / "model")


def test_there_are_ten_thousand_mutants():
    assert HEADERS + INDEXES + CONFIGS + GENERATIONS == 10_000


def test_a_mutant_of_the_header_loads_or_is_refused(good):
    header, data = read_parts(good)
    checkpoint = SafetensorsFolder(good)
    file = good / SINGLE
    whole = file.read_bytes()

    def attempt(draw: random.Random) -> None:
        text = text_of(mutate(header, draw, list(header)), draw)
        content = packed(text, data)
        if draw.random() < 0.05:
            content = content[: draw.randrange(len(content))]
        elif draw.random() < 0.05:
            content = packed(
                text,
                data,
                length=draw.choice(
                    (0, 1, len(text) - 1, len(text) + 1, 1 << 31, 1 << 63, (1 << 64) - 1)
                ),
            )
        file.write_bytes(content)
        checkpoint.weights = survey(good, checkpoint.spec)
        assert len(dict(checkpoint.tensors(checkpoint.spec))) == 21

    loaded, refused = outcomes(HEADERS, attempt)
    file.write_bytes(whole)
    assert loaded > HEADERS // 100 and refused > HEADERS // 2


def test_a_mutant_of_the_index_loads_or_is_refused(good, tmp_path):
    folder = make_good(tmp_path / "sharded")
    make_sharded(folder)
    document = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    spec = SafetensorsFolder(folder).spec
    names = sorted(set(document["weight_map"].values()))

    def attempt(draw: random.Random) -> None:
        changed = mutate(document, draw, ["weight_map", "metadata", *names])
        if (
            draw.random() < 0.2
            and isinstance(changed, dict)
            and isinstance(changed.get("weight_map"), dict)
        ):
            changed["weight_map"][draw.choice((*document["weight_map"], "x"))] = draw.choice(
                (*names, "../" + names[0], "gone.safetensors", 7)
            )
        (folder / INDEX).write_bytes(text_of(changed, draw))
        survey(folder, spec)

    loaded, refused = outcomes(INDEXES, attempt)
    assert loaded > INDEXES // 100 and refused > INDEXES // 2


def test_a_mutant_of_the_config_makes_a_model_or_is_refused(good):
    path = good / "config.json"
    whole = path.read_bytes()

    def attempt(draw: random.Random) -> None:
        path.write_bytes(text_of(mutate(CONFIG | {"rope_scaling": None}, draw, MORE_KEYS), draw))
        document = read_json(path)
        try:
            config = config_from_dict(document, "config.json")
        finally:
            with contextlib.suppress(
                CheckpointError
            ):  # what `parallama plan` does without transformers
                spec_of(document, "config.json")
        spec = ModelSpec.from_config(config)
        survey(good, spec)
        if draw.random() < 0.3:
            make_skeleton(config)

    loaded, refused = outcomes(CONFIGS, attempt)
    path.write_bytes(whole)
    assert loaded > CONFIGS // 100 and refused > CONFIGS // 5


def test_a_mutant_of_the_generation_config_is_good_or_refused(good):
    path = good / "generation_config.json"
    whole = path.read_bytes()
    document = {
        "eos_token_id": [2],
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
    }

    def attempt(draw: random.Random) -> None:
        path.write_bytes(text_of(mutate(document, draw, list(document)), draw))
        check_generation(read_json(path), path.name, CONFIG["vocab_size"])

    loaded, refused = outcomes(GENERATIONS, attempt)
    path.write_bytes(whole)
    assert loaded > GENERATIONS // 100 and refused > GENERATIONS // 5
