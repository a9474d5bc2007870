"""Training data and training keys as people have them: rows of other tools, templates that rewrite.

With the real tokenizer of SmolLM2, and without devices.
"""

from __future__ import annotations

import copy
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from messages import check_raised, says
from test_train_data import chat, jsonl, prepare, tokenizer, trained  # noqa: F401
from test_train_settings import LEAST, options

from parallama.__main__ import run
from parallama.errors import ParallamaError
from parallama.files.chat_template import renderer_of
from parallama.train import row_forms, tokens
from parallama.train import settings as settings_of
from parallama.train.encoding import Counts
from parallama.train.options import LORA_TARGETS, LoraOptions
from parallama.train.packing import Rows
from parallama.train.records import Completion, Text
from parallama.train.run_data import prepare_data
from parallama.train.watch import Watch

TURNS = ("Hi", "Hello.", "Bye", "Good bye.")
CHAT = chat(*TURNS)["messages"]
SHAREGPT = [
    {"from": "human" if at % 2 == 0 else "gpt", "value": turn} for at, turn in enumerate(TURNS)
]


def messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    record = row_forms.parse(row, "here")
    assert isinstance(record, row_forms.Chat)
    return record.messages


# -- rows

SAME: dict[str, dict[str, Any]] = {
    "messages beside a prompt and an id": {"prompt": "Hi", "prompt_id": "7f", "messages": CHAT},
    "messages beside every other form": {
        "messages": CHAT,
        "text": "x",
        "instruction": "y",
        "output": "z",
        "chosen": CHAT,
        "rejected": CHAT,
    },
    "messages beside columns that are null": {"messages": CHAT, "text": None, "prompt": None},
    "ShareGPT": {"id": "1", "conversations": SHAREGPT},
    "ShareGPT's key with OpenAI's messages": {"conversations": CHAT},
    "OpenAI's key with ShareGPT's messages": {"messages": SHAREGPT},
    "one conversation": {"conversation": CHAT},
    "roles in capitals": {"messages": [each | {"role": each["role"].title()} for each in CHAT]},
    "content in parts": {
        "messages": [
            each | {"content": [{"type": "text", "text": part} for part in (each["content"], "")]}
            for each in CHAT
        ]
    },
    "messages with keys that are null": {
        "messages": [each | {"name": None, "tool_calls": None, "weight": None} for each in CHAT]
    },
    "lists that datasets makes of messages": {
        "conversations": {
            "from": [each["from"] for each in SHAREGPT],
            "value": [each["value"] for each in SHAREGPT],
        }
    },
    "messages as JSON within the JSON": {"messages": json.dumps(CHAT)},
    "LLaMA-Factory's history": {
        "instruction": TURNS[2],
        "input": "",
        "output": TURNS[3],
        "history": [list(TURNS[:2])],
    },
}


@pytest.mark.parametrize("row", SAME.values(), ids=SAME)
def test_rows_of_other_tools_are_the_conversation_that_they_mean(row: dict[str, Any]) -> None:
    record = row_forms.parse(row, "here")
    assert isinstance(record, row_forms.Chat)
    assert record.messages == CHAT and record.answers == (1, 3)


def test_what_stands_beside_the_form_that_counts_is_said_once(
    tokenizer: Any,  # noqa: F811
    tmp_path: Path,
) -> None:
    source = jsonl(tmp_path, *[SAME["messages beside a prompt and an id"]] * 3)
    for _ in range(2):  # the second time from the cache
        (note,) = prepare(tokenizer, source, tmp_path).counts.notes
        assert "messages" in note and "prompt" in note and "prompt_id" not in note


def test_a_system_prompt_beside_a_conversation_becomes_its_first_message() -> None:
    system = [{"role": "system", "content": "Be brief."}]
    for row in (
        {"system": "Be brief.", "conversations": SHAREGPT},
        {"system_prompt": "Be brief.", "messages": CHAT},
        {"messages": [{"role": "developer", "content": "Be brief."}, *CHAT]},
    ):
        assert messages(row) == system + CHAT
    both = {"system": "Be long.", "messages": system + CHAT}
    assert messages(both) == system + CHAT


ALPACA = {"instruction": "Add.", "input": "1, 2", "output": "3"}


def test_instructions_are_put_into_the_chat_template_or_into_alpacas_prompt(
    tokenizer: Any,  # noqa: F811
    tmp_path: Path,
) -> None:
    assert messages(ALPACA) == chat("Add.\n\n1, 2", "3")["messages"]
    whole = ALPACA | {"text": "Below is an instruction ..."}  # as tatsu-lab's set has it
    assert messages(whole) == messages(ALPACA)
    assert messages({"instruction": "Add.", "input": "", "output": "3"}) == messages(
        {"question": "Add.", "answer": "3"}
    )
    dolly = {"instruction": "Add.", "context": "1, 2", "response": "3", "category": "x"}
    assert messages(dolly) == messages(ALPACA)
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    corpus = prepare(bare, jsonl(tmp_path, ALPACA), tmp_path)
    ids, mask = corpus.document(0)
    text = tokenizer.decode(ids)
    assert text.startswith("Below is an instruction") and "### Input:\n1, 2\n\n" in text
    assert tokenizer.decode(ids[mask]) == "3<|im_end|>"
    (note,) = corpus.counts.notes
    assert "Alpaca" in note


def test_trl_s_conversational_prompts_train_the_completion_alone(
    tokenizer: Any,  # noqa: F811
) -> None:
    row = {"prompt": CHAT[:3], "completion": CHAT[3:]}
    assert messages(row) == CHAT and trained(tokenizer, row) == ["Good bye.<|im_end|>"]


@pytest.mark.parametrize("key", ["weight", "train", "loss"])
def test_answers_that_a_row_leaves_out_are_not_trained_on(
    key: str,
    tokenizer: Any,  # noqa: F811
) -> None:
    row = {"messages": [*CHAT[:1], CHAT[1] | {key: 0}, CHAT[2], CHAT[3] | {key: 1}]}
    assert trained(tokenizer, row) == ["Good bye.<|im_end|>"]
    for value in (0.5, "no"):
        with pytest.raises(ParallamaError) as caught:
            row_forms.parse({"messages": [CHAT[0], CHAT[1] | {key: value}]}, "here")
        check_raised(caught.value, 2, "here", "message 2", key, value, "0 or 1")
    with pytest.raises(ParallamaError) as caught:
        row_forms.parse({"messages": [CHAT[0], CHAT[1] | {key: 0}]}, "here")
    check_raised(caught.value, 2, "here", "assistant")


def test_calls_of_functions_and_functions_reach_the_chat_template(
    tokenizer: Any,  # noqa: F811
) -> None:
    other = copy.deepcopy(tokenizer)
    other.chat_template = (
        "{% for t in tools or [] %}({{ t.name }}){% endfor %}"
        "{% for m in messages %}[{{ m.role }}]{% for c in m.tool_calls or [] %}<{{ c.name }}>"
        "{% endfor %}{{ m.content }};{% endfor %}{% if add_generation_prompt %}[assistant]"
        "{% endif %}"
    )
    called = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    rows = [CHAT[0], called, {"role": "tool", "content": "3"}, CHAT[3]]
    for tools in ([{"name": "add"}], '[{"name": "add"}]'):
        record = row_forms.parse({"messages": rows, "tools": tools}, "here")
        (encoded,) = tokens.encode(record, other, renderer_of(other, "other"))
        assert other.decode(encoded.ids) == (
            "(add)[user]Hi;[assistant]<add>;[tool]3;[assistant]Good bye.;"
        )
    with pytest.raises(ParallamaError) as caught:
        row_forms.parse({"messages": rows, "tools": "add"}, "here")
    check_raised(caught.value, 2, "here", "'tools' is 'add'")


BAD: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "pairs of preference": (
        {"prompt_id": 1, "chosen": CHAT, "rejected": CHAT},
        ("pair", "chosen", "'messages'"),
    ),
    "pictures": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, *CHAT[1:2]]},
        ("message 1", "image", "text"),
    ),
    "a role of nobody": (
        {"conversations": [{"from": "narrator", "value": "x"}]},
        ("message 1", "'narrator'", "human, gpt"),
    ),
    "an answer that is no text": ({"question": "x", "answer": True}, ("'answer' is True",)),
    "an empty output": (ALPACA | {"output": ""}, ("'output' is ''",)),
    "no output": ({"instruction": "x"}, ("'output' is None",)),
    "nothing asked": ({"instruction": "", "output": "x"}, ("'instruction'", "empty")),
    "history of no pairs": (ALPACA | {"history": ["x"]}, ("'history'", "'x'", "pairs")),
    "ShareGPT without an answer": ({"conversations": SHAREGPT[:1]}, ("assistant",)),
}


@pytest.mark.parametrize(("row", "parts"), BAD.values(), ids=BAD)
def test_rows_that_cannot_be_trained_on_say_why(
    row: dict[str, Any],
    parts: tuple[str, ...],
    tokenizer: Any,  # noqa: F811
    tmp_path: Path,
) -> None:
    """With `bad_rows` they are dropped and counted, and the first is shown."""
    with pytest.raises(ParallamaError) as caught:
        row_forms.parse(row, "here")
    check_raised(caught.value, 2, "here", *parts)
    source = jsonl(tmp_path, {"text": "fine"}, row)
    corpus = prepare(tokenizer, source, tmp_path, bad_rows="drop")
    assert (len(corpus.lengths), corpus.counts.bad) == (1, 1)
    (note,) = corpus.counts.notes
    assert f"{source}:2" in note


def test_prompts_beside_a_text_are_said_and_the_first_form_counts() -> None:
    found = row_forms.parse({"prompt": "a", "text": "b"}, "here")
    assert isinstance(found, Text) and found.notes
    both = row_forms.parse({"prompt": "a", "completion": "c", "text": "b"}, "here")
    assert isinstance(both, Completion) and both.notes
    assert not row_forms.parse({"text": "b", "source": "x", "id": 1}, "here").notes


def test_texts_get_one_bos_and_one_eos_whatever_they_hold(
    tokenizer: Any,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Texts that were rendered before have their own. What a tokenizer can't mark is said."""
    from tokenizers.processors import TemplateProcessing

    begins = copy.deepcopy(tokenizer)
    bos, eos = begins.bos_token, begins.eos_token
    begins.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, begins.bos_token_id)]
    )
    rows = [
        {"text": "Hi"},
        {"text": f"{bos}Hi{eos}"},
        {"prompt": f"{bos}H", "completion": f"i{eos}"},
    ]
    corpus = prepare(begins, jsonl(tmp_path, *rows), tmp_path)
    ids = [corpus.document(at)[0].tolist() for at in range(3)]
    assert (
        begins.decode(ids[0]) == begins.decode(ids[1]) == begins.decode(ids[2]) == f"{bos}Hi{eos}"
    )
    assert corpus.document(2)[1].tolist()[0] is False and corpus.document(2)[1].tolist()[-1] is True
    (note,) = corpus.counts.notes
    assert "BOS" in note
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    (note,) = prepare(endless, jsonl(tmp_path, {"text": "Hi there"}), tmp_path).counts.notes
    assert "EOS" in note


def test_an_answer_that_ends_without_a_mark_is_said(tokenizer: Any) -> None:  # noqa: F811
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    plain += "{% if add_generation_prompt %}assistant:{% endif %}"
    _, counts = encoded(plain, tokenizer, chat(*TURNS))
    assert [note for note in counts.notes if "stop" in note]


@pytest.mark.parametrize("row", [{"text": "a\ud83d"}, chat("a\ud83d", "b")], ids=["text", "chat"])
def test_half_a_character_is_refused_with_its_line(
    row: dict[str, Any],
    tokenizer: Any,  # noqa: F811
    tmp_path: Path,
) -> None:
    source = jsonl(tmp_path, {"text": "fine"}, row)
    with pytest.raises(ParallamaError) as caught:
        prepare(tokenizer, source, tmp_path)
    check_raised(caught.value, 2, f"{source}:2", "\\ud83d")


# -- files


def test_json_is_read_as_what_it_holds_whatever_its_name(
    tokenizer: Any,  # noqa: F811
    tmp_path: Path,
) -> None:
    rows = [{"text": "one"}, {"text": "two [x]"}]
    array, by_line = json.dumps(rows, indent=1), "\n".join(map(json.dumps, rows)) + "\n"
    wanted = [tokenizer(row["text"])["input_ids"] for row in rows]
    for name, content in {
        "array.json": array.encode(),
        "lines.json": by_line.encode(),
        "array.jsonl": array.encode(),
        "mark.jsonl": b"\xef\xbb\xbf" + by_line.encode(),
        "mark.json": b"\xef\xbb\xbf\n " + array.encode(),
        "windows.jsonl": by_line.replace("\n", "\r\n").encode(),
        "shell.jsonl": by_line.encode("utf-16"),
        "shell.json": array.encode("utf-16"),
        "no-end.ndjson": by_line.rstrip().encode(),
        "lines.jsonl.gz": gzip.compress(by_line.encode()),
        "array.json.gz": gzip.compress(array.encode()),
    }.items():
        (tmp_path / name).write_bytes(content)
        corpus = prepare(tokenizer, str(tmp_path / name), tmp_path)
        found = [corpus.document(at)[0][:-1].tolist() for at in range(len(corpus.lengths))]
        assert found == wanted, name
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbfone")
    corpus = prepare(tokenizer, str(tmp_path / "mark.txt"), tmp_path)
    assert corpus.document(0)[0][:-1].tolist() == wanted[0]


NO_JSON: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "an array that is cut": ("a.json", b'[{"text": "one"}, {"te', ("row 1", "JSON")),
    "an array that ends early": ("a.json", b'[{"text": "one"}', ("row 1", "ends early")),
    "two arrays": ("a.json", b'[{"text": "one"}] []', ("row 1", "more")),
    "no comma": ("a.json", b'[{"text": "one"} {"text": "two"}]', ("row 1", ",")),
    "an empty array": ("a.json", b" [ ]", ("empty",)),
    "one object over many lines": ("a.json", b'{\n"text": "one"\n}', (":1", "array")),
    "half of UTF-16": ("a.jsonl", '{"text": "x"}'.encode("utf-16")[:-1], ("UTF-8",)),
    "a gzip file that is cut": ("a.jsonl.gz", gzip.compress(b'{"text": "x"}' * 99)[:-9], ("gzip",)),
    "a text as .gz": ("a.jsonl.gz", b'{"text": "x"}', ("gzip",)),
    "a Parquet file": ("a.parquet", b"PAR1", (".jsonl", "hf:", ".parquet")),
    "a CSV file": ("a.csv", b"text\nx\n", (".jsonl", "hf:", ".csv")),
}


@pytest.mark.parametrize(("name", "content", "parts"), NO_JSON.values(), ids=NO_JSON)
def test_files_that_cannot_be_read_say_what_they_are(
    name: str,
    content: bytes,
    parts: tuple[str, ...],
    tokenizer: Any,  # noqa: F811
    tmp_path: Path,
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ParallamaError) as caught:
        prepare(tokenizer, str(tmp_path / name), tmp_path)
    check_raised(caught.value, 2, name, *parts)


def test_what_other_programs_leave_in_a_folder_is_no_data(
    tokenizer: Any,  # noqa: F811
    tmp_path: Path,
) -> None:
    data = tmp_path / "in"
    (data / ".cache").mkdir(parents=True)
    jsonl(data, {"text": "one"})
    jsonl(data / ".cache", {"text": "two"})
    (data / "._data.jsonl").write_bytes(b"\x00\x05\x16\x07")  # as macOS leaves them
    assert len(prepare(tokenizer, str(data), tmp_path).lengths) == 1
    (tmp_path / "out" / "data").mkdir(parents=True)
    (tmp_path / "out" / "data" / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(ParallamaError) as caught:
        prepare(tokenizer, str(tmp_path / "out"), tmp_path)
    check_raised(caught.value, 2, f"hf:{tmp_path / 'out'}", ".parquet")


def test_data_are_found_by_a_pattern_and_names_of_the_hub_are_told(
    tokenizer: Any,  # noqa: F811
    tmp_path: Path,
) -> None:
    for name in ("b-1.jsonl", "b-2.jsonl", "c.jsonl"):
        jsonl(tmp_path, {"text": name}, name=name)
    corpus = prepare(tokenizer, str(tmp_path / "b-*.jsonl"), tmp_path)
    found = [tokenizer.decode(corpus.document(at)[0][:-1]) for at in range(len(corpus.lengths))]
    assert found == ["b-1.jsonl", "b-2.jsonl"]
    for given in ("Org/a-set", "https://huggingface.co/datasets/Org/a-set"):
        with pytest.raises(ParallamaError) as caught:
            prepare(tokenizer, given, tmp_path)
        check_raised(caught.value, 2, given, "'hf:Org/a-set'")
    with pytest.raises(ParallamaError) as caught:
        prepare(tokenizer, str(tmp_path / "d-*.jsonl"), tmp_path)
    check_raised(caught.value, 2, "d-*.jsonl")


def test_a_data_set_is_read_by_config_and_part_of_a_split(
    tokenizer: Any,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    data = tmp_path / "set"
    data.mkdir()
    for name in ("one", "two"):
        jsonl(data, *[{"text": f"{name} {at}"} for at in range(4)], name=f"{name}.jsonl")
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}.jsonl\n"
        for name in ("one", "two")
    )
    (data / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for source, texts in (
        (f"hf:{data}:two:train", ["two 0", "two 1", "two 2", "two 3"]),
        (f"hf:{data}:one:train[:50%]", ["one 0", "one 1"]),
    ):
        corpus = prepare(tokenizer, source, tmp_path)
        found = [tokenizer.decode(corpus.document(at)[0][:-1]) for at in range(len(corpus.lengths))]
        assert found == texts
    with pytest.raises(ParallamaError) as caught:
        prepare(tokenizer, f"hf:{data}:train", tmp_path)
    check_raised(caught.value, 2, str(data), "CONFIG")


# -- templates

THINKING = (
    "{%- set ns = namespace(last=-1) %}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}"
    "{%- if m.role == 'assistant' and loop.index0 > ns.last %}{{- '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif %}{{- m.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""As Qwen3 and SmolLM3 do: thoughts stand in the last answer only."""


def encoded(template: str, tokenizer: Any, row: Any, **more: Any) -> tuple[list[str], Counts]:  # noqa: F811
    """What is trained on of each document, and what was counted."""
    other, counts = copy.deepcopy(tokenizer), Counts()
    other.chat_template = template
    record = row_forms.parse(row, "here")
    found = tokens.encode(record, other, renderer_of(other, "it"), counts=counts, **more)
    texts = [
        other.decode([token for token, is_on in zip(each.ids, each.trained, strict=True) if is_on])
        for each in found
    ]
    return texts, counts


def test_of_a_template_that_rewrites_earlier_turns_the_answers_that_stay_are_trained(
    tokenizer: Any,  # noqa: F811
) -> None:
    last = "<think>\n\n</think>\n\nGood bye.<|im_end|>"
    found, counts = encoded(THINKING, tokenizer, chat(*TURNS))
    assert found == [last] and counts.rewritten == 1
    found, counts = encoded(THINKING, tokenizer, chat(*TURNS), split_answers=True)
    assert found == ["<think>\n\n</think>\n\nHello.<|im_end|>", last] and counts.rewritten == 0
    # What follows the last answer teaches nothing, and does not change how it is written.
    found, counts = encoded(THINKING, tokenizer, chat(*TURNS[:3]))
    assert found == ["<think>\n\n</think>\n\nHello.<|im_end|>"] and counts.rewritten == 0


def test_answers_that_are_left_out_are_counted_and_said(
    tokenizer: Any,  # noqa: F811
    tmp_path: Path,
) -> None:
    other = copy.deepcopy(tokenizer)
    other.chat_template = THINKING
    given = {"data": jsonl(tmp_path, chat(*TURNS), chat(*TURNS)), "cache": str(tmp_path / "c")}
    for split, documents in ((False, 2), (True, 4)):
        said: list[str] = []
        settings = settings_of.make(LEAST | given | {"split_answers": split})
        data = prepare_data(settings, other, 49152, Watch(say=said.append))
        assert len(data.corpus.lengths) == documents
        told = [line for line in said if "2 answers" in line and "split_answers" in line]
        assert bool(told) is not split, said


def test_a_prompt_that_begins_thoughts_leaves_answers_without_them_as_they_are(
    tokenizer: Any,  # noqa: F811
) -> None:
    """As templates of reasoning models have it: the prompt ends with <think>."""
    template = THINKING.replace("<think>\\n\\n</think>\\n\\n", "").replace(
        "{{- '<|im_start|>assistant\\n' }}", "{{- '<|im_start|>assistant\\n<think>\\n' }}"
    )
    found, counts = encoded(template, tokenizer, chat(*TURNS))
    assert found == ["Hello.<|im_end|>Good bye.<|im_end|>"]
    (note,) = counts.notes
    assert "<think>" in note


def test_a_template_that_shows_no_answer_is_refused(
    tokenizer: Any,  # noqa: F811
) -> None:
    for template in (
        "{% if add_generation_prompt %}Now you: {% endif %}{{ messages | length }}",
        "{{ messages[-1].content }}{% if add_generation_prompt %}!{% endif %}",
    ):
        with pytest.raises(ParallamaError) as caught:
            encoded(template, tokenizer, chat(*TURNS))
        assert says(caught.value, "here", "message 4")


# -- keys

SPELLED: dict[str, tuple[list[str], dict[str, Any]]] = {
    "all-linear": (["--lora.targets", "all-linear"], {"lora.targets": LORA_TARGETS}),
    "a list as text": (["--lora.targets", "q_proj,v_proj"], {"lora.targets": ("q_proj", "v_proj")}),
    "with blanks": (["--lora.targets", "k_proj, o_proj"], {"lora.targets": ("k_proj", "o_proj")}),
    "one": (["--lora.targets=up_proj"], {"lora.targets": ("up_proj",)}),
    "one report": (["--report_to", "tensorboard"], {"report_to": ("tensorboard",)}),
    "no report": (["--report_to", "none"], {"report_to": ()}),
    "two reports": (["--report_to", "tensorboard,wandb"], {"report_to": ("tensorboard", "wandb")}),
    "one prompt": (
        ["--sample_prompts", "Once: upon, a time", "--sample_every", "1"],
        {"sample_prompts": ("Once: upon, a time",)},
    ),
    "bf16": (["--dtype", "bf16"], {"dtype": "bfloat16"}),
    "a bare --resume": (["--resume"], {"resume": "auto"}),
    "--resume false": (["--resume", "false"], {"resume": "no"}),
    "a bare --lora": (["--lora"], {"lora.rank": 8}),
    "--lora false": (["--lora", "false"], {"lora": None}),
    "a share for the warm-up": (["--warmup_steps", "0.2"], {"warmup_steps": 0.2}),
    "a number as a file": (["--eval_data", "2026", "--eval_every", "1"], {"eval_data": "2026"}),
}


@pytest.mark.parametrize(("given", "wanted"), SPELLED.values(), ids=SPELLED)
def test_values_are_taken_as_others_spell_them(given: list[str], wanted: dict[str, Any]) -> None:
    settings = settings_of.read(None, [*options(), *given])
    for key, value in wanted.items():
        found: Any = settings
        for part in key.split("."):
            found = getattr(found, part)
        assert found == value


def test_a_config_file_may_say_all_linear_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    for said in ("all-linear", "[all-linear]"):
        file.write_text(f"model: a\ndata: b\nout: c\nepochs: 1\nlora:\n  targets: {said}\n")
        settings = settings_of.read(file)
        assert settings.lora is not None and settings.lora.targets == LORA_TARGETS
    bytes_of = []
    for said in ("all-linear", ",".join(LORA_TARGETS)):
        assert run(["plan", "smollm2", "--train", "--lora.targets", said, "--json"]) == 0
        bytes_of.append(json.loads(capsys.readouterr().out)["totals"]["train"])
    assert bytes_of[0] == bytes_of[1]


def test_a_config_file_may_be_written_as_people_write_them(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    least = "model: a\ndata: b\nout: c\nepochs: 1\n"
    file.write_text(f"{least}lora: true\nresume: true\n")
    settings = settings_of.read(file)
    assert settings.lora == LoraOptions() and settings.resume == "auto"
    file.write_text(f"{least}lora.rank: 4\nlora.targets: all-linear\n")
    assert settings_of.read(file).lora == LoraOptions(rank=4, targets=LORA_TARGETS)
    file.write_text("model: a\ndata: 2024\nout: 7\nsteps: 1e3\nmesh: 8\nbatch_size: 8\n")
    settings = settings_of.read(file)
    assert (settings.data, settings.out, settings.steps) == ("2024", "7", 1000)
    assert settings.mesh_shape.devices == 8


def test_a_warm_up_below_one_is_a_share_of_the_steps() -> None:
    settings = settings_of.make(LEAST | {"steps": 100, "warmup_steps": 0.03})
    assert settings.learning_rate(100).warmup == 3 and settings.learning_rate(10).warmup == 1
    with pytest.raises(ParallamaError) as caught:
        settings_of.make(LEAST | {"warmup_steps": 1.5})
    check_raised(caught.value, 2, "warmup_steps is 1.5")


OTHERS = {
    "learning_rate": "lr",
    "learning-rate": "lr",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "grad_accum",
    "max_seq_length": "seq_len",
    "output_dir": "out",
    "bf16": "dtype",
    "gradient_checkpointing": "remat",
    "warmup_ratio": "warmup_steps",
    "tensor_parallel_size": "mesh",
    "resume_from_checkpoint": "resume",
    "lora_r": "lora.rank",
    "lora.target_modules": "lora.targets",
    "lora_alpha": "lora.alpha",
    "bach_size": "batch_size",
    "shedule": "schedule",
    "gradient_acumulation_steps": "grad_accum",
}


def test_an_unknown_key_is_answered_with_ours_and_what_it_means() -> None:
    explained = dict(settings_of.explain())
    for theirs, ours in OTHERS.items():
        with pytest.raises(ParallamaError) as caught:
            settings_of.read(None, options(**{theirs: 1}))
        key = theirs.replace("-", "_")
        check_raised(caught.value, 2, repr(key), repr(ours), explained[ours].help)
    with pytest.raises(ParallamaError) as caught:
        settings_of.read(None, options(zebra=1))
    check_raised(caught.value, 2, "'zebra'", "train --help")
    assert len(str(caught.value)) < 200


def test_help_explains_every_key(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert run(["train", "--help"]) == 0
    said = "".join(capsys.readouterr().out.split())
    for name, key in settings_of.explain():
        assert f"--{name}" in said and "".join(key.help.split()) in said, name


def test_the_model_may_stand_first_as_in_every_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = ["--data", "x", "--out", "y", "--steps", "2", "--dump-config", "--json"]
    said = []
    (tmp_path / "it.yaml").write_text("model: smollm2\n")
    for first in (["smollm2"], ["--model", "smollm2"], [str(tmp_path / "it.yaml")]):
        assert run(["train", *first, *rest]) == 0
        said.append(json.loads(capsys.readouterr().out))
    assert said[0] == said[1] == said[2] and said[0]["model"] == "smollm2"


# -- epochs


def test_epochs_are_as_many_steps_as_they_take() -> None:
    class Documents:
        lengths = __import__("numpy").full(10, 8)

        def document(self, index: int) -> Any:
            raise AssertionError(index)

    rows = Rows(Documents(), 8)
    assert [rows.count(epochs) for epochs in (1, 2, 0.5, 1.25, 0.01)] == [10, 20, 5, 13, 1]


def test_a_run_is_as_long_as_steps_or_epochs_say_and_not_both(tmp_path: Path) -> None:
    least = {key: value for key, value in LEAST.items() if key != "steps"}
    assert settings_of.make(least | {"epochs": 3}).epochs == 3.0
    with pytest.raises(ParallamaError) as caught:
        settings_of.make(least | {"epochs": 3, "steps": 10})
    check_raised(caught.value, 2, "steps is 10", "epochs is 3")
    with pytest.raises(ParallamaError) as caught:
        settings_of.make(least)
    check_raised(caught.value, 2, "steps (or epochs)")
    file = tmp_path / "run.yaml"
    file.write_text(settings_of.dump(settings_of.make(least | {"epochs": 3})))
    assert settings_of.read(file).epochs == 3.0
    longer = settings_of.read(file, ["--steps", "24"])
    assert (longer.steps, longer.epochs) == (24, None)
