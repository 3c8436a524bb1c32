"""Tests of all recorded prompt strings, and of the roles of conversations."""

import json

import pytest

from janus_jax.processing import chat


@pytest.fixture(scope="module")
def recorded(golden):
    return json.loads((golden / "chat_templates.json").read_text(encoding="utf-8"))


def user(content, **more):
    return {"role": "user", "content": content, **more}


def assistant(content):
    return {"role": "assistant", "content": content}


def test_all_recorded_prompts(recorded):
    cases = [case for case in recorded["sft"] if case["sft_format"] in chat.JANUS_ROLES]
    wrong = [
        case["name"]
        for case in cases
        if case["prompt"]
        != chat.format_conversation(case["conversation"], case["sft_format"], case["system_prompt"])
    ]
    assert len(cases) == 60 and wrong == []


def test_recorded_prompts_for_images(recorded):
    for case, sft_format in zip(
        recorded["t2i_prompts"], ("deepseek", "deepseek_old"), strict=True
    ):
        generic = [user(case["conversation"][0]["content"]), assistant("")]
        for messages in (case["conversation"], generic):
            text = chat.format_conversation(messages, sft_format)
            assert text + "<begin_of_image>" == case["prompt"]


def test_generic_roles_give_each_templates_own(recorded):
    messages = [user("Hello!"), assistant("Hi! This is Tony."), user("How are you?"), assistant("")]
    raw = recorded["raw_templates_default_system"]
    for sft_format in chat.JANUS_ROLES:
        case = raw[sft_format]
        text = chat.format_conversation(messages, sft_format, case["system_message"])
        assert text == case["prompt"].strip()


def test_default_system_prompt_is_the_recorded_one(recorded):
    assert recorded["default_system_prompt"] == chat.DEFAULT_SYSTEM_PROMPT


def test_system_message_replaces_the_system_prompt():
    messages = [{"role": "system", "content": "Rhyme."}, user("Hi"), assistant("")]
    text = chat.format_conversation(messages, "deepseek", "Be brief.")
    assert text == "Rhyme.\n\n<|User|>: Hi\n\n<|Assistant|>:"
    messages[0]["content"] = ""
    text = chat.format_conversation(messages, "deepseek", "Be brief.")
    assert text == "<|User|>: Hi\n\n<|Assistant|>:"


@pytest.mark.parametrize("pair", [("User", "Assistant"), ("<|User|>", "<|Assistant|>")])
def test_the_checkpoint_decides_the_role_texts(pair):
    messages = [
        {"role": pair[0], "content": "Hi", "images": ["x"]},
        {"role": pair[1], "content": "Yes"},
    ]
    expected = user("<image_placeholder>\nHi", images=["x"])
    assert chat.generic_roles(messages) == [expected, assistant("Yes")]


def test_an_unanswered_conversation_gets_an_empty_turn():
    assert chat.generic_roles([user("Hi")]) == [user("Hi"), assistant("")]
    system = {"role": "system", "content": "s"}
    assert chat.generic_roles([system, user("Hi")]) == [system, user("Hi"), assistant("")]


@pytest.mark.parametrize(
    "messages, text",
    [
        ([], "at least one user message, got none"),
        ([{"role": "bot", "content": "x"}], "must be system, user or assistant, got 'bot'"),
        ([{"role": "user"}], "content must be a string or a list of parts, got NoneType"),
        ([user("a"), user("b")], "expected the role assistant for message 2, got user"),
        ([assistant("a")], "expected the role user for message 1, got assistant"),
        ([user("a"), {"role": "system", "content": "s"}], "assistant for message 2, got system"),
    ],
)
def test_conversation_errors(messages, text):
    with pytest.raises(ValueError, match=text):
        chat.generic_roles(messages)


@pytest.mark.parametrize("name", ["chatml", "llama-2"])
def test_unknown_sft_format(name):
    with pytest.raises(ValueError, match=f"sft_format must be .* or deepseek_old, got '{name}'"):
        chat.format_conversation([user("Hi")], name)


def test_placeholders_go_in_front_of_a_question_without_any():
    def content(question, number):
        return chat.question_messages(question, number, "<image_placeholder>")[0]["content"]

    assert content("Q?", 0) == "Q?"
    assert content("Q?", 2) == "<image_placeholder>\n<image_placeholder>\nQ?"
    assert content("is <image_placeholder> red?", 1) == "is <image_placeholder> red?"
