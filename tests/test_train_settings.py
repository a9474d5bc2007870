"""The config of `parallama train`: read as meant, written as read, or an error that says so."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import check_raised, says

from parallama.errors import ParallamaError
from parallama.train import settings as settings_of
from parallama.train import yaml_config
from parallama.train.declared import declarations
from parallama.train.schedule import Schedule
from parallama.train.settings import TrainSettings

LEAST = {"model": "smollm2", "data": "shipped:chat", "out": "run", "steps": 5}
TEXTS = st.text(
    st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12
) | st.sampled_from(
    [
        "1e3",
        "no",
        "null",
        "12",
        "1_000",
        "true",
        "~",
        "0x10",
        "1:30",
        "2026-11-24",
        " a",
        "#",
        ".nan",
    ]
)
LORAS = st.fixed_dictionaries(
    {
        "rank": st.integers(1, 64),
        "alpha": st.floats(0.1, 1e6),
        "dropout": st.floats(0, 0.99),
        "targets": st.just(["q_proj", "down_proj"]),
    }
)
DOCUMENTS = st.fixed_dictionaries(
    {
        "model": TEXTS,
        "data": TEXTS | st.lists(TEXTS, min_size=1, max_size=3),
        "out": TEXTS,
        "steps": st.integers(1, 10**6),
    },
    optional={
        "lr": st.floats(1e-12, 1e3),
        "remat": st.sampled_from(["none", "full"]) | st.integers(1, 40),
        "fsdp": st.booleans(),
        "lora": st.none() | LORAS,
        "max_grad_norm": st.none() | st.floats(1e-3, 10),
        "resume": TEXTS,
        "plan": st.none() | TEXTS,
        "report_to": st.lists(st.sampled_from(["tensorboard", "wandb"]), max_size=2),
    },
)


def options(**keys: Any) -> list[str]:
    return [part for key, value in (LEAST | keys).items() for part in (f"--{key}", str(value))]


@settings(deadline=None, max_examples=60)
@given(DOCUMENTS)
def test_what_dump_config_writes_is_read_back_the_same(document: dict[str, Any]) -> None:
    settings = settings_of.make(document)
    written = settings_of.dump(settings)
    assert settings_of.make(yaml_config.parse(written)) == settings
    assert yaml.safe_load(written) == settings.to_dict()  # by any other reader of YAML, too


def test_options_win_over_the_file_and_values_are_read_as_in_yaml(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: smollm2\ndata: [a.jsonl, b]\nout: run\nsteps: 100\nlr: 1e-4\nresume: no\n"
        "lora:\n  rank: 4\n  alpha: 8\n"
    )
    settings = settings_of.read(
        file,
        [
            "--lr=3e-5",
            "--fsdp",
            "--batch-size",
            "8",
            "--mesh",
            "8",
            "--lora.dropout",
            "0.1",
            "--out",
            "2026",
        ],
    )
    assert (
        settings.lr == 3e-5
        and settings.fsdp
        and settings.batch_size == 8
        and settings.mesh == "8"
        and settings.resume == "no"
    )
    assert settings.lora is not None and (
        settings.lora.rank,
        settings.lora.alpha,
        settings.lora.dropout,
    ) == (4, 8.0, 0.1)
    assert settings.sources == ["a.jsonl", "b"] and settings.out == "2026" and settings.steps == 100
    assert settings_of.read(file, ["--lora", "null"]).lora is None
    assert settings_of.read(file, ["--fsdp", "false"]).fsdp is False


BAD: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "an unknown key": ({"bach_size": 4}, ("'bach_size'", "'batch_size'")),
    "an unknown key within a key": ({"lora.rnk": 4}, ("'lora.rnk'", "'lora.rank'")),
    "a word for a number": ({"lr": "fast"}, ("'lr' is 'fast'",)),
    "a fraction of steps": ({"steps": 1.5}, ("'steps' is 1.5", "whole number")),
    "no steps": ({"steps": 0}, ("'steps' is 0", "at least 1")),
    "a number for a truth value": ({"fsdp": 1}, ("'fsdp' is 1", "true or false")),
    "a learning rate that is no number": ({"lr": ".nan"}, ("'lr' is nan", "above 0")),
    "a negative learning rate": ({"lr": -1e-4}, ("'lr' is -0.0001", "above 0")),
    "one of several words": (
        {"schedule": "cosin"},
        ("'schedule' is 'cosin'", "cosine, linear or constant"),
    ),
    "a remat between": ({"remat": 0}, ("'remat' is 0", "none, full")),
    "an unknown LoRA target": ({"lora.targets": "[q_prj]"}, ("q_prj", "q_proj")),
    "a batch that doesn't divide": (
        {"mesh": "3x2"},
        ("batch_size 4", "'data'", "3x2", "multiple of 3"),
    ),
    "a mesh that can't be read": ({"mesh": "2by4"}, ("mesh '2by4'",)),
    "a warm-up longer than the run": ({"warmup_steps": 6}, ("warmup_steps is 6", "steps is 5")),
    "no data": ({"data": "[]"}, ("'data'", "empty list")),
    "validation without data": ({"eval_every": 5}, ("eval_every is 5", "eval_data")),
    "validation data without validation": (
        {"eval_data": "shipped:text"},
        ("eval_data", "eval_every is 0"),
    ),
    "samples of nothing": ({"sample_every": 5}, ("sample_every is 5", "sample_prompts")),
    "a report to nobody": (
        {"report_to": "[tensorbord]"},
        ("'report_to' is ['tensorbord']", "tensorboard or wandb"),
    ),
}


@pytest.mark.parametrize(("keys", "parts"), BAD.values(), ids=BAD)
def test_a_wrong_config_says_what_was_expected(
    keys: dict[str, Any], parts: tuple[str, ...]
) -> None:
    with pytest.raises(ParallamaError) as caught:
        settings_of.read(None, options(**keys))
    assert says(caught.value, *parts) and caught.value.exit_code in (2, 4), caught.value


FILES: dict[str, tuple[str | bytes, str]] = {
    "a list": ("- a\n- b\n", "['a', 'b']"),
    "broken YAML": ("model: [a\n", "YAML"),
    "a key twice": ("model: a\nmodel: b\n", "'model'"),
    "not text": (b"\xff\xfe\x00", "YAML"),
    "an object to make": ("model: !!python/object/apply:os.system [true]\n", "YAML"),
    "nothing": ("", "model, data, out, steps"),
}


@pytest.mark.parametrize(("content", "part"), FILES.values(), ids=FILES)
def test_a_wrong_config_file_says_what_was_expected(
    content: str | bytes, part: str, tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ParallamaError) as caught:
        settings_of.read(file)
    check_raised(caught.value, 2, part)


@pytest.mark.parametrize(
    ("given", "part"),
    [
        (["steps", "5"], "'steps'"),
        ([*options(), "--steps", "6"], "--steps"),
        ([*options(), "--lr", "[1"], "--lr '[1'"),
        ([*options(), "--"], "'--'"),
    ],
)
def test_a_wrong_option_says_so(given: list[str], part: str) -> None:
    with pytest.raises(ParallamaError) as caught:
        settings_of.read(None, given)
    check_raised(caught.value, 2, part, "expected")


def test_a_config_file_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(ParallamaError, match="No such file or directory"):
        settings_of.read(tmp_path / "none.yaml")


def test_every_key_has_a_description() -> None:
    assert all(each.help for each in declarations(TrainSettings))


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 500),
    st.integers(0, 100),
    st.floats(0, 1),
    st.sampled_from(["cosine", "linear", "constant"]),
)
def test_the_learning_rate_rises_to_its_peak_and_never_again(
    steps: int, warmup: int, floor: float, kind: Any
) -> None:
    schedule = Schedule(kind=kind, peak=3e-4, steps=steps, warmup=min(warmup, steps), floor=floor)
    rates = [schedule(step) for step in range(steps)]
    assert all(0 < rate <= 3e-4 for rate in rates) or (floor == 0 and min(rates) >= 0)
    top = min(warmup, steps - 1)
    assert all(a < b for a, b in pairwise(rates[: top + 1]))
    assert all(a >= b for a, b in pairwise(rates[top:]))
    assert all(rate >= floor * 3e-4 * (1 - 1e-9) for rate in rates[warmup:])


def test_the_learning_rate_is_that_of_transformers_after_the_warm_up() -> None:
    import torch
    from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

    for kind, reference in (
        ("cosine", get_cosine_schedule_with_warmup),
        ("linear", get_linear_schedule_with_warmup),
    ):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
        theirs = reference(optimizer, num_warmup_steps=7, num_training_steps=50)
        ours = Schedule(kind=kind, peak=3e-4, steps=50, warmup=7)  # type: ignore[arg-type]
        for step in range(50):
            if step >= 7:
                assert math.isclose(ours(step), theirs.get_last_lr()[0], rel_tol=1e-9)
            optimizer.step()
            theirs.step()
