"""Variables for a chat template, a last message that is continued, and a template that refuses."""

from __future__ import annotations

import json

import pytest
from broken_folders import make_good
from forks import command
from messages import check_raised, check_refusal

from parallama.errors import UsageError
from parallama.files.find import find
from parallama.inference.prompts import Prompts

TEMPLATE = (
    "{% if mood is defined and mood == 'cross' %}{{ raise_exception('not in this mood') }}"
    "{% endif %}{% for message in messages %}{{ message['content'] }} {% endfor %}"
    "{% if enable_thinking is defined and not enable_thinking %}j {% endif %}"
    "{% if add_generation_prompt %}h{% endif %}"
)
SAID = [{"role": "user", "content": "d"}, {"role": "assistant", "content": "e"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = make_good(tmp_path_factory.mktemp("templates") / "model")
    (made / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    (made / "said.json").write_text(json.dumps(SAID), encoding="utf-8")
    return str(made)


@pytest.fixture(scope="module")
def prompts(folder: str) -> Prompts:
    source = find(folder)
    return Prompts(folder, source.tokenizer(), source.config.vocab_size)


def test_variables_reach_the_template(prompts: Prompts) -> None:
    text = prompts.tokenizer.decode
    assert text(prompts.render_chat(SAID)).split() == ["d", "e", "h"]
    off = prompts.render_chat(SAID, chat_template_kwargs={"enable_thinking": False})
    assert text(off).split() == ["d", "e", "j", "h"]
    on = prompts.render_chat(SAID, chat_template_kwargs={"enable_thinking": True})
    assert on == prompts.render_chat(SAID)


def test_an_answer_is_begun_or_the_last_message_continued_or_neither(prompts: Prompts) -> None:
    text = prompts.tokenizer.decode
    assert text(prompts.render_chat(SAID, continue_final_message=True)).split() == ["d", "e"]
    assert text(prompts.render_chat(SAID, add_generation_prompt=False)).split() == ["d", "e"]


def test_a_refusal_has_the_templates_words(prompts: Prompts) -> None:
    with pytest.raises(UsageError) as caught:
        prompts.render_chat(SAID, chat_template_kwargs={"mood": "cross"})
    check_raised(caught.value, 2, "not in this mood")


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "chat_template"])
def test_names_that_mean_something_else_are_no_variables(prompts: Prompts, name: str) -> None:
    with pytest.raises(UsageError) as caught:
        prompts.render_chat(SAID, chat_template_kwargs={name: 1})
    check_raised(caught.value, 2, repr(name))


def test_a_variable_is_something_that_json_has(prompts: Prompts) -> None:
    with pytest.raises(UsageError) as caught:
        prompts.render_chat(SAID, chat_template_kwargs={"day": object()})
    check_raised(caught.value, 2, "'day'")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--chat-template-arg", "mood"], ("mood", "JSON")),
        (["--chat-template-arg", "mood=cross"], ("mood=cross", "JSON")),
        (["--chat-template-arg", "=1"], ("=1", "key=JSON")),
        (["--chat-template-arg", "a=1", "--chat-template-arg", "a=2"], ("a=2", "twice")),
    ],
)
@pytest.mark.parametrize("name", ["generate", "chat"])
def test_what_is_no_variable_is_refused(name: str, arguments: list[str], parts: tuple) -> None:
    check_refusal(command([name, "no-such-model", *arguments], stdin="d"), 2, *parts)


@pytest.mark.parametrize(
    "arguments", [["--chat-template-arg", "a=1"], ["--continue-final-message"]]
)
def test_both_options_need_a_conversation(arguments: list[str]) -> None:
    done = command(["generate", "no-such-model", "-p", "d", *arguments])
    check_refusal(done, 2, arguments[0], "--chat")


def test_generate_and_chat_hand_them_on(folder: str) -> None:
    said = ["generate", folder, "--messages", f"{folder}/said.json", "--json", "--quiet"]
    said += ["--max-new-tokens", "1", "--max-model-len", "16", "--continue-final-message"]
    done = command([*said, "--chat-template-arg", "mood=true"], optimize=False)
    assert done.code == 0, done.err
    tokenizer = find(folder).tokenizer()
    assert tokenizer is not None
    prompt = json.loads(done.out)["outputs"][0]["prompt"]
    assert tokenizer.decode(prompt).split() == ["d", "e"]
    cross = command(["chat", folder, "--quiet", "--chat-template-arg", 'mood="cross"'], stdin="d")
    assert cross.code == 2 and "not in this mood" in cross.err
