"""Settings that an export to another layout keeps, and settings that it refuses."""

import json

import checkpoints
import pytest
import transformers

from janus_jax.generation import loading
from janus_jax.interop import convert
from janus_jax.interop.load import open_folder
from janus_jax.interop.processor_files import translate_files
from janus_jax.paths import read_json, write_json
from janus_jax.processing.processor import Processor


def with_settings(golden, folder, name, **settings):
    """The golden checkpoint with some keys of one JSON file changed."""
    checkpoints.make_single(golden, folder)
    path = folder / name
    config = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(config | settings))
    return folder


def test_another_layout_keeps_image_settings_and_system_prompt(golden, tmp_path):
    name = "generation_config.json"
    source = with_settings(golden, tmp_path / "s", name, guidance_scale=1.5, temperature=0.5)
    config = json.loads((source / "processor_config.json").read_text())
    (source / "processor_config.json").write_text(json.dumps(config | {"system_prompt": ""}))
    convert.export_folder(source, tmp_path / "hf", "transformers", overwrite=False)
    stated = json.loads((tmp_path / "hf" / "processor_config.json").read_text())
    assert stated["use_default_system_prompt"] is False
    convert.export_folder(tmp_path / "hf", tmp_path / "back", "deepseek", overwrite=False)
    for folder in (tmp_path / "hf", tmp_path / "back"):
        assert loading.ImageDefaults.from_dir(folder) == (1.5, 0.5)
        assert Processor.from_dir(folder).system_prompt == ""


def test_the_same_layout_asks_nothing_of_the_tokenizer(golden, tmp_path):
    source = with_settings(golden, tmp_path / "s", "config.json")
    convert.export_folder(source, tmp_path / "hf", "transformers", overwrite=False)
    (tmp_path / "hf" / "tokenizer.json").unlink()
    convert.export_folder(tmp_path / "hf", tmp_path / "again", "transformers", overwrite=False)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()


def test_a_folder_of_transformers_without_system_prompt_stays_so(golden, tmp_path):
    convert.export_folder(
        with_settings(golden, tmp_path / "s", "config.json"), tmp_path / "hf", "transformers", False
    )
    path = tmp_path / "hf" / "processor_config.json"
    path.write_text('{"num_image_tokens": 16, "use_default_system_prompt": false}')
    convert.export_folder(tmp_path / "hf", tmp_path / "back", "deepseek", overwrite=False)
    for folder in (tmp_path / "hf", tmp_path / "back"):
        assert Processor.from_dir(folder).system_prompt == ""


def test_bos_is_added_wherever_its_name_stands(golden, tmp_path):
    source = with_settings(golden, tmp_path / "s", "tokenizer_config.json")
    (source / "tokenizer_config.json").write_text("{}")
    convert.export_folder(source, tmp_path / "hf", "transformers", overwrite=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer("a").input_ids[0] == Processor.from_dir(source).tokenizer.bos_id


def test_bos_is_added_where_a_template_adds_none(golden, tmp_path):
    source = with_settings(golden, tmp_path / "s", "tokenizer_config.json")
    path = source / "tokenizer.json"
    step = {"type": "TemplateProcessing", "special_tokens": {}}
    step |= {"single": [{"Sequence": {"id": "A", "type_id": 0}}]}
    step |= {"pair": [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": step}))
    convert.export_folder(source, tmp_path / "hf", "transformers", overwrite=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    bos_id = Processor.from_dir(source).tokenizer.bos_id
    tokens = tokenizer("a").input_ids
    assert tokens[0] == bos_id and tokens.count(bos_id) == 1


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(sft_format="plain"), "sft_format.*deepseek_old.*'plain'"),
        (dict(sft_format=["x"]), r"sft_format.*\['x'\]"),
        (dict(image_tag="<begin_of_image>"), "image_tag.*<image_placeholder>.*'<begin_of_image>'"),
        (dict(system_prompt="Rhyme."), "system prompt.*'Rhyme.'"),
    ],
)
def test_what_transformers_cannot_hold_is_refused(settings, says, golden, tmp_path):
    source = with_settings(golden, tmp_path / "s", "processor_config.json", **settings)
    with pytest.raises(ValueError, match=says):
        convert.export_folder(source, tmp_path / "hf", "transformers", overwrite=False)
    assert not (tmp_path / "hf").exists()


def test_image_settings_inside_processor_config_go_along(golden, tmp_path):
    """transformers 5 stores templates there; the folder's config may be in DeepSeek's layout."""
    source = with_settings(golden, tmp_path / "s", "processor_config.json")
    images = json.loads((source / "preprocessor_config.json").read_text())
    (source / "preprocessor_config.json").unlink()
    images |= {"image_mean": [0.25, 0.5, 0.75], "image_processor_type": "JanusImageProcessor"}
    stated = {"image_processor": images, "num_image_tokens": 16, "note": "\ud800"}
    (source / "processor_config.json").write_text(json.dumps(stated))
    wanted = Processor.from_dir(source)
    for layout in ("deepseek", "transformers"):
        (tmp_path / layout).mkdir()
        translate_files(source, tmp_path / layout, layout, open_folder(golden / "janus").cfg)
        assert Processor.from_dir(tmp_path / layout) == wanted


def test_refusals_name_the_file_of_the_source(golden, tmp_path):
    source = with_settings(golden, tmp_path / "s", "tokenizer_config.json", eos_token=[])
    with pytest.raises(ValueError) as error:
        convert.export_folder(source, tmp_path / "hf", "transformers", overwrite=False)
    assert str(error.value).startswith(f"{source}/tokenizer_config.json: eos_token ")
    assert not (tmp_path / "hf").exists()


def test_texts_that_only_escapes_can_hold_are_kept(tmp_path):
    write_json(tmp_path / "a.json", {"a": "\ud800", "b": "é"})
    assert read_json(tmp_path / "a.json") == {"a": "\ud800", "b": "é"}
