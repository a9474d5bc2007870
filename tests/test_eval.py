"""`parallama eval`: the harness finds on a sharded model what it finds with its own `hf` model."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from forks import command, environment, script
from messages import check_refusal, says
from workers import CaseError, Workers

from parallama.errors import UsageError
from parallama.evaluate.evaluation import EvalOptions
from parallama.plan.program_shapes import text_size

OPTIMIZE = True  # of the workers' programs

HERE = Path(__file__).parent
LIMIT = 64
OFFLINE = ("parallama_facts", "parallama_alice", "parallama_cloze", "parallama_quiz")
CHAT = {
    "apply_chat_template": True,
    "fewshot_as_multiturn": True,
    "num_fewshot": 1,
    "system_instruction": "Answer in one word.",
}


def harness(*runs: dict[str, Any], max_length: int = LIMIT) -> list[dict[str, Any]]:
    """What the harness's own `hf` model finds, in a process of its own."""
    asked = json.dumps({"max_length": max_length, "runs": runs})
    # accelerate would start XLA's devices.
    own = {"USE_TORCH_XLA": "0", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "eval_reference.py", asked],
        capture_output=True,
        text=True,
        timeout=900,
        cwd=HERE,
        env=environment() | own,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def agree(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Accuracies and texts exactly, log-likelihoods to 1e-3."""
    assert set(ours["results"]) == set(theirs["results"])
    for task, wanted in theirs["results"].items():
        got = ours["results"][task]
        exact = [key for key in wanted if key.split(",")[0] in ("acc", "acc_norm", "exact_match")]
        assert {key: got[key] for key in exact} == {key: wanted[key] for key in exact}, task
        for key in ("word_perplexity,none", "bits_per_byte,none", "perplexity,none"):
            if key in wanted:
                assert got[key] == pytest.approx(wanted[key], rel=1e-4), (task, key)
    assert ours["prompts"] == json.loads(json.dumps(theirs["prompts"]))
    for task, documents in theirs["answers"].items():
        for number, (got, wanted) in enumerate(zip(ours["answers"][task], documents, strict=True)):
            for answer, expected in zip(got, wanted, strict=True):
                if isinstance(expected, str):
                    assert answer == expected, (task, number)
                elif isinstance(expected, float):
                    assert answer == pytest.approx(expected, abs=1e-3), (task, number)
                else:
                    assert (
                        answer[0] == pytest.approx(expected[0], abs=1e-3)
                        and answer[1] == expected[1]
                    ), (task, number)


def plain(found: dict[str, Any]) -> dict[str, Any]:
    """Without tuples, as it comes out of JSON."""
    return json.loads(json.dumps(found))


def test_four_kinds_of_tasks_on_1x3_agree_with_the_harness_own_model(workers: Workers) -> None:
    """Choices, whole texts in windows, the last word, and answers that are generated."""
    (theirs,) = harness({"tasks": list(OFFLINE)})
    ours = plain(
        workers[3].call(
            "eval_cases:evaluated",
            mesh="1x3",
            tasks=",".join(OFFLINE),
            max_model_len=LIMIT,
            batch=4,
        )
    )
    agree(ours, theirs)
    assert (
        ours["results"]["parallama_facts"]["acc,none"] > 0.5
        and ours["results"]["parallama_quiz"]["exact_match,stripped"] > 0.5
    )
    assert (
        ours["mesh"] == {"data": 1, "model": 3}
        and ours["batch_size"] == 4
        and ours["requests"] == 12 * 4 + 5 + 8 + 10
    )
    # Prompts of 32 and 64 tokens at the most, each with its decoding; texts of 16, 32 and 64.
    assert (
        ours["programs_compiled"] == ours["compiled"]
        and ours["programs_after_warmup"] == 0
        and 3 <= ours["compiled"] <= 7
    )
    assert ours["cut_requests"] == 0


@pytest.mark.slow
def test_chat_templates_examples_and_cut_prompts_agree_with_the_harness_own_model(
    workers: Workers,
) -> None:
    """On every kind of mesh; prompts longer than the limit lose their beginning in both."""
    runs: list[dict[str, Any]] = [
        {"tasks": list(OFFLINE), **CHAT},
        {"tasks": ["parallama_facts", "parallama_quiz"], "num_fewshot": 2, "limit": 6},
    ]
    for limit in (96, 40):
        theirs = harness(*runs, max_length=limit)
        for mesh, devices in (("1x1", 1), ("1x3", 3), ("2x4", 8)):
            for given, wanted in zip(runs, theirs, strict=True):
                options = {key: value for key, value in given.items() if key != "tasks"}
                ours = workers[devices].call(
                    "eval_cases:evaluated",
                    mesh=mesh,
                    tasks=",".join(given["tasks"]),
                    max_model_len=limit,
                    **options,
                )
                agree(plain(ours), wanted)
                assert ours["programs_after_warmup"] == 0
                assert (ours["cut_requests"] > 0) == (limit == 40)


@pytest.mark.slow
def test_sampled_answers_differ_and_are_the_same_again_with_the_same_seed(workers: Workers) -> None:
    def answers(mesh: str, devices: int, seed: int) -> list[list[str]]:
        run = workers[devices].call(
            "eval_cases:evaluated",
            mesh=mesh,
            tasks="parallama_sampled",
            max_model_len=96,
            batch=6,
            limit=2,
            seed=seed,
        )
        return run["answers"]["parallama_sampled"]

    first = answers("1x3", 3, 7)
    assert all(len(set(row)) > 1 for row in first)
    assert answers("2x4", 8, 7) == first != answers("1x3", 3, 8)


@pytest.mark.parametrize("mesh", ["1x1", "2x4"])
def test_scores_are_those_of_transformers_at_the_edges_of_batches_and_lengths(
    workers: Workers, models: Any, mesh: str
) -> None:
    tiny = models(layers=1, seed=3)
    texts = []
    # Inputs are one shorter: 1, 15, 16, 17, 512 and 600 tokens, in programs of 16, 512 and 1,024.
    for number, length in enumerate((601, 2, 16, 513, 17, 18)):
        ids = reference.random_ids(1, length, tiny.vocab, seed=number)[0].tolist()
        texts.append((ids, length - 1 if number % 2 else max(length // 3, 1)))
    logits = [reference.logits(tiny.model, torch.tensor([ids[:-1]]))[0] for ids, _ in texts]
    best = [int(row[-1].argmax()) for row in logits]
    texts.append(([*texts[4][0][:-1], best[4]], 1))  # what greedy decoding would say
    logits.append(logits[4])
    found = workers[math.prod(map(int, mesh.split("x")))].call(
        "eval_cases:scored", folder=tiny.folder, mesh=mesh, batch=2, max_model_len=600, texts=texts
    )
    for (ids, count), row, (logprob, greedy) in zip(texts, logits, found["scores"], strict=True):
        chances = torch.log_softmax(row.double(), -1).gather(1, torch.tensor(ids[1:])[:, None])[
            -count:, 0
        ]
        assert logprob == pytest.approx(float(chances.sum()), rel=1e-5, abs=1e-4)
        assert greedy == (row[-count:].argmax(-1).tolist() == ids[-count:])
    assert found["scores"][-1][1] and not found["scores"][0][1]
    # Longest first, two at a time: 600 with 512, 17 with 16, 16 with 15, 1.
    assert found["compiled"] == found["programs"] == 3 and found["after_warmup"] == 0
    assert found["tokens"] == sum(len(ids) - 1 for ids, _ in texts)


def test_texts_come_in_few_lengths() -> None:
    assert [text_size(length, 2048) for length in (1, 16, 17, 500, 512, 513, 1024, 1025, 2048)] == [
        16,
        16,
        32,
        512,
        512,
        1024,
        1024,
        2048,
        2048,
    ]
    assert text_size(600, 600) == 1024 and text_size(2500, 2500) == 2560
    assert all(
        length <= text_size(length, limit)
        for limit in range(1, 3000, 97)
        for length in range(1, limit + 1, 13)
    )


REFUSED: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("a batch of none", {"tasks": "parallama_quiz", "batch": 0}, ("batch of 0", "mesh 1x3")),
    ("a setting that parallama has not", {"tasks": "parallama_beams"}, ("'num_beams' is 4",)),
    (
        "no room for a context",
        {"tasks": "parallama_quiz", "max_model_len": 16},
        ("generates 16 tokens",),
    ),
    (
        "a continuation over the limit",
        {"tasks": "parallama_facts", "max_model_len": 2},
        ("4 tokens",),
    ),
    (
        "a task unheard of",
        {"tasks": "parallama_fact"},
        ("'parallama_fact'", "did you mean parallama_facts"),
    ),
]


def test_what_cannot_be_evaluated_is_refused_before_it_runs(workers: Workers) -> None:
    found = workers[3].call(
        "eval_cases:refused",
        mesh="1x3",
        max_model_len=LIMIT,
        runs=[dict(given) for _, given, _ in REFUSED],
    )
    for (what, _, expected), (kind, code, message) in zip(REFUSED, found, strict=True):
        assert (kind, code) == ("UsageError", 2), (what, message)
        assert says(message, *expected), (what, message)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"limit": 0.0}, "limit is 0"),
        ({"limit": 1.5}, "limit is 1.5"),
        ({"num_fewshot": -1}, "num_fewshot is -1"),
        ({"seed": 1 << 32}, "seed is 4294967296"),
        ({"fewshot_as_multiturn": True}, "without apply_chat_template"),
    ],
)
def test_options_out_of_their_range_are_refused(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        EvalOptions(**options)


def test_a_command_prints_one_document_and_writes_what_the_harness_would(tmp_path: Path) -> None:
    few = ["--mesh", "1x3", "--limit", "2", "--batch-size", "2", "--max-model-len", "64"]
    tasks = ["--tasks", "parallama_cloze", "--include-path", "eval_tasks"]
    written = ["--output-path", str(tmp_path), "--log-samples", "--json"]
    done = command(["eval", "smollm2", *tasks, *few, *written], cwd=HERE, limit_s=600)
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert document["n-samples"]["parallama_cloze"] == {"original": 8, "effective": 2}
    assert (
        document["model"] == "smollm2"
        and document["dtype"] == "float32"
        and document["mesh"] == {"data": 1, "model": 3}
    )
    assert document["programs_compiled"] == 1 and document["programs_after_warmup"] == 0
    assert "2 requests" in done.err and "1 programs, 0 after warm-up" in done.err
    assert "it/s" not in done.err
    (results,), (samples,) = (
        list((tmp_path / "smollm2").glob(pattern))
        for pattern in ("results_*.json", "samples_parallama_cloze_*.jsonl")
    )
    assert json.loads(results.read_text())["results"] == document["results"]
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [row["doc_id"] for row in rows] == [0, 1] and rows[0]["arguments"]["gen_args_0"][
        "arg_1"
    ] == "stove"


def test_without_the_extra_the_error_says_how_to_get_it() -> None:
    code = """if True:
        import sys
        sys.modules["lm_eval"] = None
        from parallama.__main__ import run
        sys.exit(run(["eval", "smollm2", "--tasks", "x"]))
    """
    check_refusal(script(code), 2, "'lm_eval'", "pip install 'parallama[eval]'")


def test_a_task_that_came_with_a_checkpoint_is_refused_and_nothing_of_it_is_run(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "model" / "tasks"
    folder.mkdir(parents=True)
    (folder / "own.yaml").write_text("task: own\ndoc_to_text: !function code.text\n")
    (folder / "code.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\ndef text(doc): return ''\n"
    )
    (tmp_path / "link").symlink_to(folder)
    code = """if True:
        import sys
        from pathlib import Path
        from parallama.errors import UsageError
        from parallama.evaluate.evaluation import find_tasks
        for names, include in (
            (["own"], ["model/tasks"]),
            (["own"], ["link"]),
            (["model/tasks/own.yaml"], []),
            (["own"], ["nowhere"]),
            ([","], []),
        ):
            try:
                find_tasks(names, [Path(path) for path in include], model="model")
            except UsageError as error:
                print(str(error).splitlines()[0])
        for broken in (
            "task: [",
            "task: broken\\ndataset_path: json\\ntest_split: test\\n"
            "dataset_kwargs: {data_files: {test: gone.jsonl}}",
        ):
            Path("broken.yaml").write_text(broken)
            try:
                find_tasks(["broken.yaml"], model="model")
            except UsageError as error:
                print(str(error).splitlines()[0])
        print(Path("ran").exists())
        find_tasks(["model/tasks/own.yaml"], model="elsewhere")
    """
    done = script(code, cwd=tmp_path)
    *said, ran = done.out.splitlines()
    assert ran == "False", done.out + done.err
    for line, part in zip(
        said,
        (
            *("'model/tasks'", "'link'", "'model/tasks/own.yaml'", "'nowhere'", "no task"),
            *("'broken.yaml'", "'broken.yaml'"),
        ),
        strict=True,
    ):
        assert part in line
    # From any other folder it is the user's own, and its code is run.
    assert (tmp_path / "ran").exists()


def test_log_samples_needs_somewhere_to_write() -> None:
    done = command(["eval", "smollm2", "--tasks", "x", "--log-samples"])
    check_refusal(done, 2, "--log-samples", "--output-path")


def test_a_worker_says_what_is_wrong_with_a_text_to_score(workers: Workers, models: Any) -> None:
    tiny = models(layers=1, seed=3)
    for text, expected in (
        (([1], 1), "1 tokens with 1 "),
        (([1, 2], 0), "2 tokens with 0 "),
        (([1] * 18, 1), "18 tokens"),
        (([1, 101], 1), "101"),
    ):
        with pytest.raises(CaseError, match=expected):
            workers[1].call(
                "eval_cases:scored",
                folder=tiny.folder,
                mesh="1x1",
                batch=1,
                max_model_len=16,
                texts=[text],
            )
