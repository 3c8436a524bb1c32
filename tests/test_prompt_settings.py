"""Tests of the template and system prompt that a folder's files select, and of errors."""

import json
import os
import shutil

import pytest
from ml_collections import ConfigDict

from janus_jax.interop import convert, processor_files
from janus_jax.interop.folders import BUNDLED_FOLDER
from janus_jax.processing import chat
from janus_jax.processing.processor import Processor
from janus_jax.processing.prompt_settings import (
    FINGERPRINTS,
    PromptSettings,
    janus_template,
    template_format,
)
from janus_jax.shapes.folders import TrainingFolders

FORMATS = ("deepseek", "deepseek_old")
OTHER = "{% for m in messages %}{{ '<|User|>: ' + m['content'] }}{% endfor %}{{ '<|Assistant|>:' }}"

EARLIER = """\
{%- for message in messages -%}
{%- if message['role'] != 'system' -%}
{{ ('User' if message['role'] == 'user' else 'Assistant') + ': ' }}
{%- endif -%}
{%- if message['content'] is string -%}{{ message['content'] | trim }}
{%- else -%}{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{ '<image_placeholder>\\n' }}
{%- else -%}{{ part['text'] | trim }}{%- endif -%}
{%- endfor -%}{%- endif -%}
{{ eos_token if message['role'] == 'assistant' else '\\n\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}
"""


def write(folder, **files):
    """Writes one JSON file per keyword; None removes the file."""
    for name, value in files.items():
        path = folder / f"{name}.json"
        path.unlink(missing_ok=True)
        if value is not None:
            path.write_text(json.dumps(value), "utf-8")
    return folder


def sft_format(folder):
    return PromptSettings.from_dir(folder).sft_format


@pytest.mark.parametrize("name", FORMATS)
def test_templates_are_recognised_by_their_text(name):
    text = janus_template(name)
    for same in (text, text.removesuffix("\n"), text.replace("\n", "\r\n")):
        assert template_format(same) == name
    user, assistant = chat.JANUS_ROLES[name]
    for other in (
        OTHER,
        "",
        "\n" + text,  # Jinja outputs the line break
        text.replace("\\n\\n", "\\n"),
        text.replace(user, "USER").replace(assistant, "ASSISTANT"),
        text.replace(user, "\0USER").replace(assistant, "\0ASSISTANT"),
        text.replace(assistant, "Bot"),
        "\ud800",
    ):
        assert template_format(other) is None


def test_earlier_exports_are_recognised():
    assert template_format(EARLIER) == "deepseek_old"


def test_the_template_on_the_hub_writes_the_same_prompts(golden):
    """Compares with recorded prompts; of the template itself, only the hash is recorded."""
    recorded = json.loads((golden / "hub_chat_template.json").read_text("utf-8"))
    assert recorded["fingerprint"] in FINGERPRINTS and len(recorded["prompts"]) == 4
    for case in recorded["prompts"]:
        messages = [
            {**m, "content": "<image_placeholder>\n" * m.get("images", 0) + m["content"]}
            for m in case["messages"]
        ]
        prompt = chat.format_conversation(chat.generic_roles(messages), "deepseek")
        assert prompt == case["prompt"]


@pytest.mark.parametrize("name", FORMATS)
def test_precedence_of_the_places(tmp_path, name):
    right, wrong = janus_template(name), OTHER
    named = [{"name": "tool_use", "template": wrong}, {"name": "default", "template": right}]
    for value in (right, named, {"tool_use": wrong, "default": right}):
        assert sft_format(write(tmp_path, tokenizer_config={"chat_template": value})) == name
    write(tmp_path, tokenizer_config={"chat_template": wrong})
    (tmp_path / "chat_template.jinja").write_text(right, "utf-8")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(wrong)
    assert sft_format(tmp_path) == name
    (tmp_path / "chat_template.jinja").write_text(wrong)
    assert sft_format(write(tmp_path, chat_template={"chat_template": right})) == name
    write(tmp_path, chat_template={"chat_template": wrong})
    assert sft_format(write(tmp_path, processor_config={"chat_template": right})) == name


def test_a_stated_format_decides_on_an_unknown_template(tmp_path):
    write(tmp_path, processor_config={"sft_format": "deepseek_old"})
    (tmp_path / "chat_template.jinja").write_text(OTHER)
    assert sft_format(tmp_path) == "deepseek_old"
    assert sft_format(write(tmp_path / "..", processor_config=None)) == "deepseek"


@pytest.mark.parametrize(
    ("files", "place"),
    [
        ({"processor_config": {"chat_template": OTHER}}, "{}/processor_config.json"),
        ({"chat_template": {"chat_template": OTHER}}, "{}/chat_template.json"),
        ({"tokenizer_config": {"chat_template": ""}}, "{}/tokenizer_config.json"),
    ],
)
def test_an_unknown_template_is_refused_with_what_to_do(tmp_path, files, place):
    advice = f"sft_format.*{tmp_path}/processor_config.json.*'deepseek'.*'deepseek_old'"
    with pytest.raises(ValueError, match=f"{place.format(tmp_path)}: .*template.*{advice}"):
        PromptSettings.from_dir(write(tmp_path, **files))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"chat_template": ["x"]}, "processor_config.json.*'default'"),
        ({"chat_template": {"a": "x"}}, r"template.*'default'.*\['a'\]"),
        ({"chat_template": {"default": 1}}, r"processor_config.json.*\b1\b"),
        ({"chat_template": 5}, r"processor_config.json.*chat template.*\b5\b"),
        ({"sft_format": None}, "processor_config.json.*sft_format.*None"),
        ({"sft_format": ["x" * 999]}, r"sft_format.*\['x{20,80}.{0,70}$"),
        ({"image_tag": 7}, r"processor_config.json.*image_tag.*\b7\b"),
        ({"system_prompt": []}, r"processor_config.json.*system_prompt.*\[\]"),
        ({"system_prompt": "🦙 \ud800"}, r"system_prompt.*'🦙 \\ud800'"),
        ({"use_default_system_prompt": "no"}, "use_default_system_prompt.*'no'"),
        (
            {"use_default_system_prompt": True, "system_prompt": "Rhyme."},
            "use_default_system_prompt.* true.* system_prompt.*'Rhyme.'",
        ),
        (
            {"use_default_system_prompt": False, "system_prompt": chat.DEFAULT_SYSTEM_PROMPT},
            "use_default_system_prompt.* false.* system_prompt.*'You are a helpful",
        ),
    ],
)
def test_refusals_name_the_file(tmp_path, files, expected):
    with pytest.raises(ValueError, match=expected):
        PromptSettings.from_dir(write(tmp_path, processor_config=files))


def test_a_format_and_a_template_that_disagree(tmp_path):
    write(tmp_path, processor_config={"sft_format": "deepseek"})
    (tmp_path / "chat_template.jinja").write_text(janus_template("deepseek_old"))
    format = f"{tmp_path}/processor_config.json .*sft_format 'deepseek'"
    template = f"{tmp_path}/chat_template.jinja .*'deepseek_old'"
    with pytest.raises(ValueError, match=f"{format}.*{template}"):
        PromptSettings.from_dir(tmp_path)


def test_templates_that_cannot_be_read(tmp_path):
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text(OTHER)
    with pytest.raises(ValueError, match=r"additional_chat_templates.*'default'.*\['rag'\]"):
        PromptSettings.from_dir(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=f"{tmp_path}/chat_template.jinja.*utf-8"):
        PromptSettings.from_dir(tmp_path)
    os.truncate(tmp_path / "chat_template.jinja", 2**36)
    with pytest.raises(ValueError, match=r"chat_template\.jinja.*\b1048576 bytes"):
        PromptSettings.from_dir(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    os.mkfifo(tmp_path / "chat_template.jinja")
    with pytest.raises(ValueError, match=r"chat_template\.jinja"):
        PromptSettings.from_dir(tmp_path)


@pytest.mark.parametrize(
    ("files", "default"),
    [
        ({}, True),
        ({"processor_config": {"processor_class": "VLChatProcessor"}}, True),
        ({"processor_config": {"processor_class": "JanusProcessor"}}, False),
        ({"processor_config": {"image_processor": {"image_processor_type": "JanusIm"}}}, False),
        ({"preprocessor_config": {"image_processor_type": "JanusImageProcessor"}}, False),
        ({"preprocessor_config": {"image_processor_type": "VLMImageProcessor"}}, True),
        ({"config": {"model_type": "janus"}}, False),
        ({"config": {"model_type": "multi_modality"}}, True),
    ],
)
def test_the_class_of_the_processor_decides_on_the_default_system_prompt(tmp_path, files, default):
    if not default:
        with pytest.raises(ValueError, match=f"{tmp_path}.*chat_template"):
            PromptSettings.from_dir(write(tmp_path, **files))
    (tmp_path / "chat_template.jinja").write_text(janus_template("deepseek"), "utf-8")
    settings = PromptSettings.from_dir(write(tmp_path, **files))
    assert settings.system_prompt == (chat.DEFAULT_SYSTEM_PROMPT if default else "")
    for use in (True, False):
        stated = files.get("processor_config", {}) | {"use_default_system_prompt": use}
        settings = PromptSettings.from_dir(write(tmp_path, processor_config=stated))
        assert settings.system_prompt == (chat.DEFAULT_SYSTEM_PROMPT if use else "")


def test_a_refused_template_is_refused_by_every_command(golden, tmp_path):
    folder = tmp_path / "s"
    folder.mkdir()
    for path in (golden / "janus_small").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    write(folder, processor_config={"num_image_tokens": 16})
    (folder / "chat_template.jinja").write_text(OTHER)
    with pytest.raises(ValueError, match=f"{folder}/chat_template.jinja") as loading:
        Processor.from_dir(folder)
    for command in (
        lambda: convert.inspect_folder(folder),
        lambda: convert.import_folder(folder, tmp_path / "o", False),
        lambda: convert.export_folder(folder, tmp_path / "o", "deepseek", False),
        lambda: convert.export_folder(folder, tmp_path / "o", "transformers", False),
    ):
        with pytest.raises(ValueError) as error:
            command()
        assert str(error.value) == str(loading.value)
        assert not (tmp_path / "o").exists()


def test_training_replaces_what_it_copied(tmp_path):
    """The folder of additional templates is copied, and is accepted in the output folder."""
    source, output = shutil.copytree(BUNDLED_FOLDER, tmp_path / "s"), tmp_path / "o"
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text(OTHER)
    (source / "chat_template.jinja").write_text(janus_template("deepseek"))
    output.mkdir()
    processor_files.copy_files(source, output)
    assert (output / "additional_chat_templates" / "rag.jinja").is_file()
    TrainingFolders.from_settings(ConfigDict({"init": str(source), "output": str(output)}))
