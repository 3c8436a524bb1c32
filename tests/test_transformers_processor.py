"""Tests of prompts of folders saved by `transformers`, against the prompts of its processor."""

import json

import checkpoints
import numpy as np
import pytest
import transformers

from janus_jax.interop import processor_files
from janus_jax.interop.load import open_folder
from janus_jax.processing.chat import DEFAULT_SYSTEM_PROMPT
from janus_jax.processing.processor import Processor

TALK = [
    {"role": "user", "content": " What is 2 + 2? "},
    {"role": "assistant", "content": "4, über alles 🦙"},
    {"role": "user", "content": "Why?\n\nTell me."},
]
IMAGE = np.full((8, 8, 3), 128, np.uint8)


def deepseek_folder(golden, folder, **processor):
    """Copies the small files of the golden checkpoint; sets keys of processor_config.json."""
    checkpoints.copy_small_files(golden, folder)
    path = folder / "processor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | processor))
    return folder


def translated(golden, source, target, layout):
    target.mkdir()
    processor_files.translate_files(source, target, layout, open_folder(golden / "janus").cfg)
    if layout == "transformers":
        (target / "config.json").write_text(json.dumps(checkpoints.TRANSFORMERS_CONFIG))
    return target


def saved_again(folder, target):
    transformers.AutoProcessor.from_pretrained(folder).save_pretrained(target)
    return target


@pytest.mark.parametrize("sft_format", ["deepseek", "deepseek_old"])
@pytest.mark.parametrize("system_prompt", ["", DEFAULT_SYSTEM_PROMPT])
def test_prompts_are_those_of_transformers(golden, tmp_path, sft_format, system_prompt):
    stated = {"sft_format": sft_format, "system_prompt": system_prompt}
    source = deepseek_folder(golden, tmp_path / "s", **stated)
    exported = translated(golden, source, tmp_path / "hf", "transformers")
    again = saved_again(exported, tmp_path / "again")
    back = translated(golden, again, tmp_path / "back", "deepseek")
    theirs = transformers.AutoProcessor.from_pretrained(again)

    def their_tokens(talk, mode):
        text = theirs.apply_chat_template(talk, add_generation_prompt=True)
        return theirs(text=text, generation_mode=mode)["input_ids"][0].tolist()

    for folder in (source, exported, again, back):
        ours = Processor.from_dir(folder)
        assert (ours.sft_format, ours.system_prompt) == (sft_format, system_prompt)
        assert ours.conversation(TALK)[0] == their_tokens(TALK, "text")
        assert ours.conversation(TALK[:1])[0] == their_tokens(TALK[:1], "text")
        question = [{"role": "user", "content": "a red cat"}]
        assert ours.image_prompt("a red cat") == their_tokens(question, "image")
    assert "sft_format" not in json.loads((again / "processor_config.json").read_text())
    assert json.loads((back / "processor_config.json").read_text())["sft_format"] == sft_format


def test_questions_with_images_are_those_of_transformers(golden, tmp_path):
    source = deepseek_folder(golden, tmp_path / "s", sft_format="deepseek_old")
    again = saved_again(translated(golden, source, tmp_path / "hf", "transformers"), tmp_path / "a")
    ours, theirs = Processor.from_dir(again), transformers.AutoProcessor.from_pretrained(again)
    image, tag = {"type": "image"}, ours.image_tag
    for parts, said in (
        ([image, "Is it red? "], f"{tag}\nIs it red?"),
        (["Is it", "red?", image], f"Is it red?\n{tag}"),
        ([" Is ", image, "as red as", image, " ?"], f"Is \n{tag}\nas red as\n{tag}\n ?"),
        ([image, image], f"{tag}\n\n{tag}"),
    ):
        parts = [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]
        text = theirs.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True
        )
        images = [IMAGE] * parts.count(image)
        tokens = theirs(text=text, images=images)["input_ids"][0].tolist()
        assert ours.conversation(said, images)[0] == tokens
        talk = [{"role": "user", "content": parts}]
        assert ours.conversation(talk, images)[0] == tokens


def test_without_use_default_system_prompt_each_layout_has_its_own_default(golden, tmp_path):
    source = deepseek_folder(golden, tmp_path / "s")
    exported = translated(golden, source, tmp_path / "hf", "transformers")
    again = saved_again(exported, tmp_path / "again")
    for folder in (exported, again):
        path = folder / "processor_config.json"
        config = json.loads(path.read_text())
        assert config.pop("use_default_system_prompt") is True
        path.write_text(json.dumps(config))
        theirs = transformers.AutoProcessor.from_pretrained(folder)
        assert theirs.use_default_system_prompt is False
        assert Processor.from_dir(folder).system_prompt == ""
    assert Processor.from_dir(source).system_prompt == DEFAULT_SYSTEM_PROMPT


@pytest.mark.parametrize("sft_format", ["deepseek", "deepseek_old"])
def test_every_place_that_transformers_reads(golden, tmp_path, sft_format):
    """Moves the template to each location where transformers finds it."""
    source = deepseek_folder(golden, tmp_path / "s", sft_format=sft_format)
    exported = translated(golden, source, tmp_path / "hf", "transformers")
    folder = saved_again(exported, tmp_path / "again")
    template = (folder / "chat_template.jinja").read_text("utf-8")
    (folder / "chat_template.jinja").unlink()
    stated = folder / "processor_config.json"
    plain = stated.read_text()

    def both():
        theirs = transformers.AutoProcessor.from_pretrained(folder)
        text = theirs.apply_chat_template(TALK, add_generation_prompt=True)
        return theirs(text=text)["input_ids"][0].tolist(), Processor.from_dir(folder)

    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    tokens, ours = both()
    assert ours.conversation(TALK)[0] == tokens and ours.sft_format == sft_format
    # a location of lower precedence is ignored
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "{{ 'other' }}"}))
    stated.write_text(json.dumps(json.loads(plain) | {"chat_template": template}))
    tokens, ours = both()
    assert ours.conversation(TALK)[0] == tokens and ours.sft_format == sft_format


def test_templates_with_names_as_transformers_saves_them(golden, tmp_path):
    source = deepseek_folder(golden, tmp_path / "s", sft_format="deepseek_old")
    exported = translated(golden, source, tmp_path / "hf", "transformers")
    processor = transformers.AutoProcessor.from_pretrained(exported)
    processor.chat_template = {"default": processor.chat_template, "other": "{{ 'other' }}"}
    processor.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "additional_chat_templates" / "other.jinja").is_file()
    assert Processor.from_dir(tmp_path / "again").sft_format == "deepseek_old"
    processor_files.copy_files(tmp_path / "again", tmp_path / "hf")
    assert (tmp_path / "hf" / "additional_chat_templates" / "other.jinja").is_file()
