"""Tests of the processor of a checkpoint folder against a recorded batch, and of its errors."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from janus_jax.interop.files import small_files
from janus_jax.processing import chat
from janus_jax.processing.processor import TRAINED_CONTEXT, Processor
from janus_jax.processing.prompt_settings import janus_template


@pytest.fixture
def folder(golden, tmp_path):
    """A copy of the small files of the recorded checkpoint, for tests that change them."""
    for file in small_files(golden / "janus"):
        shutil.copy(file, tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def processor(golden):
    return Processor.from_dir(golden / "janus")


@pytest.fixture(scope="module")
def recorded(golden):
    return json.loads((golden / "processor.json").read_text(encoding="utf-8"))


def edit(path, drop=(), **values):
    config = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if key not in drop}
    path.write_text(json.dumps({**kept, **values}), encoding="utf-8")


def make_batch(processor, golden, recorded, **options):
    cases = zip(recorded["conversations"], recorded["images"], strict=True)
    return processor.batch(
        [processor.conversation(m, [golden / name for name in names]) for m, names in cases],
        **options,
    )


def test_batch_with_the_default_system_prompt(processor, golden, recorded):
    expected = np.load(golden / "janus_processor.npz")
    batch = make_batch(processor, golden, recorded)
    np.testing.assert_array_equal(batch.tokens, expected["default_input_ids"])
    np.testing.assert_array_equal(batch.token_mask, expected["default_attention_mask"] == 1)
    np.testing.assert_array_equal(batch.image_mask, expected["default_images_seq_mask"])


def test_batch_with_a_system_prompt_from_the_folder(folder, golden, recorded):
    edit(folder / "processor_config.json", system_prompt=recorded["system_prompt_short"])
    expected = np.load(golden / "janus_processor.npz")
    batch = make_batch(Processor.from_dir(folder), golden, recorded)
    np.testing.assert_array_equal(batch.tokens, expected["input_ids"])
    np.testing.assert_array_equal(batch.token_mask, expected["attention_mask"] == 1)
    np.testing.assert_array_equal(batch.image_mask, expected["images_seq_mask"])
    np.testing.assert_array_equal(batch.pixels, expected["pixel_values"].transpose(0, 1, 3, 4, 2))
    assert (batch.tokens.dtype, batch.pixels.dtype) == (np.int32, np.float32)
    assert batch.token_mask.dtype == batch.image_mask.dtype == bool


def test_pad_to(processor, golden, recorded):
    short, long = (make_batch(processor, golden, recorded, pad_to=n) for n in (None, 128))
    assert long.tokens.shape == (3, 128)
    extra = 128 - short.tokens.shape[1]
    assert (long.tokens[:, :extra] == processor.tokenizer.pad_id).all()
    assert not long.token_mask[:, :extra].any() and not long.image_mask[:, :extra].any()
    np.testing.assert_array_equal(long.tokens[:, extra:], short.tokens)
    np.testing.assert_array_equal(long.image_mask[:, extra:], short.image_mask)
    with pytest.raises(ValueError, match="pad_to=9 longest=101"):
        make_batch(processor, golden, recorded, pad_to=9)


def test_batch_without_images(processor):
    batch = processor.batch([processor.conversation("Hi"), processor.conversation("Hello you")])
    assert batch.pixels.shape == (2, 0, 64, 64, 3)
    assert not batch.image_mask.any()


def test_image_prompt_equals_the_recorded_one(processor, golden):
    expected = np.load(golden / "janus_t2i.npz")["prompt_ids"].tolist()
    tokens = processor.image_prompt("A close-up photo of a red cat, studio light.")
    assert tokens == expected
    tok = processor.tokenizer
    uncond = processor.unconditional(tokens)
    assert uncond == [tok.bos_id] + [tok.pad_id] * (len(expected) - 2) + [tok.image_start_id]


def test_image_prompt_of_the_old_template(folder):
    edit(folder / "processor_config.json", sft_format="deepseek_old")
    processor = Processor.from_dir(folder)
    text = processor.tokenizer.decode(processor.image_prompt("a cat")[1:], skip_special=False)
    assert text == "User: a cat\n\nAssistant:<begin_of_image>"


def test_a_question_takes_its_images_in_front(processor):
    grey = np.full((10, 20, 3), 128, np.uint8)
    tokens, pixels = processor.conversation("Same?", [grey, grey])
    tok, block = processor.tokenizer, "<image_placeholder>" * processor.num_image_tokens
    image = f"<begin_of_image>{block}<end_of_image>\n"
    text = f"{chat.DEFAULT_SYSTEM_PROMPT}\n\n<|User|>: {image}{image}Same?\n\n<|Assistant|>:"
    assert tokens == tok.encode(text)
    assert pixels.shape == (2, 64, 64, 3) and pixels.dtype == np.float32


def test_without_placeholders_images_come_before_the_first_text_of_the_user(processor):
    first, second = (np.full((8, 8, 3), value, np.uint8) for value in (0, 255))

    def turns(*texts, **user):
        roles = ("user", "assistant", "user")
        messages = [{"role": r, "content": c} for r, c in zip(roles, texts, strict=False)]
        return [{"role": "system", "content": "s"}, messages[0] | user, *messages[1:]]

    tag = f"{processor.image_tag}\n"
    expected, _ = processor.conversation(turns(f"{tag}{tag}A?", "yes", "B?"), [first, second])
    tokens, pixels = processor.conversation(turns("A?", "yes", "B?"), [first, second])
    assert tokens == expected
    assert pixels[0].max() == -1 and pixels[1].min() == 1
    single, _ = processor.conversation([{"role": "user", "content": "A?"}], [first])
    assert single == processor.conversation("A?", [first])[0]
    carried = turns("A?", "yes", "B?", images=[first])
    carried[3]["images"] = [second]
    tokens, pixels = processor.conversation(carried)
    expected, _ = processor.conversation(turns(f"{tag}A?", "yes", f"{tag}B?"), [first, second])
    assert tokens == expected
    assert pixels[0].max() == -1 and pixels[1].min() == 1


def test_images_in_the_messages_and_beside_them_are_the_same(processor):
    first, second = (np.full((8, 8, 3), value, np.uint8) for value in (0, 255))
    texts = ("<image_placeholder>\nA?", "yes", "and <image_placeholder>?")
    roles = ("User", "Assistant", "User")
    messages = [{"role": r, "content": c} for r, c in zip(roles, texts, strict=True)]
    tokens, pixels = processor.conversation(messages, [first, second])
    messages[0]["images"], messages[2]["images"] = [first], [second]
    carried_tokens, carried_pixels = processor.conversation(messages)
    assert tokens == carried_tokens
    np.testing.assert_array_equal(pixels, carried_pixels)
    assert pixels[0].max() == -1 and pixels[1].min() == 1
    with pytest.raises(ValueError, match="2 in the messages and 1 separately"):
        processor.conversation(messages, [first])


def test_an_image_is_shown_in_the_message_that_carries_it(processor):
    image = np.full((8, 8, 3), 128, np.uint8)
    roles, tag = ("user", "assistant", "user"), processor.image_tag

    def tokens(*texts, **numbers):
        """numbers: how many images the first and the last message have."""
        messages = [{"role": r, "content": c} for r, c in zip(roles, texts, strict=True)]
        for i, name in ((0, "first"), (2, "last")):
            messages[i]["images"] = [image] * numbers.get(name, 0)
        return processor.conversation(messages)[0]

    both = tokens(f"{tag}\nA?", "yes", f"{tag}\nB?", first=1, last=1)
    assert tokens(f"{tag}\nA?", "yes", "B?", first=1, last=1) == both
    with pytest.raises(ValueError, match="got 0 images for 1 placeholders in message 1"):
        tokens(f"{tag}A?", "yes", "B?", last=1)
    with pytest.raises(ValueError, match="got 2 images for 1 placeholders in message 3"):
        tokens("A?", "yes", f"B {tag}?", last=2)


def test_numbers_of_images_and_placeholders_must_agree(processor):
    grey = np.full((8, 8, 3), 128, np.uint8)
    with pytest.raises(ValueError, match="got 0 images for 1 placeholders"):
        processor.conversation("what is <image_placeholder>?")
    with pytest.raises(ValueError, match="got 2 images for 1 placeholders"):
        processor.conversation("what is <image_placeholder>?", [grey, grey])
    messages = [{"role": "user", "content": "what is <image_placeholder>?"}]
    with pytest.raises(ValueError, match="got 2 images for 1 placeholders"):
        processor.conversation(messages, [grey, grey])
    with pytest.raises(ValueError, match="got 0 images for 1 placeholders"):
        processor.image_prompt("a <image_placeholder>")


def test_length_past_the_trained_context(processor):
    assert processor.trained_context == TRAINED_CONTEXT == 4096
    processor.check_length(4000, 96)
    with pytest.raises(ValueError, match=r"context of 4096 tokens, got 4000 [+] 97 = 4097"):
        processor.check_length(4000, 97)


def test_image_settings_are_an_object(folder):
    (folder / "preprocessor_config.json").unlink()
    edit(folder / "processor_config.json", image_processor="VLM")
    with pytest.raises(ValueError, match="image_processor must be an object, got 'VLM'"):
        Processor.from_dir(folder)


def test_folder_without_processor_config(folder, processor):
    (folder / "processor_config.json").unlink()
    assert Processor.from_dir(folder) == processor


def test_transformers_4_layout(folder, processor):
    """preprocessor_config.json, processor_config.json, and the template in its own file."""
    edit(
        folder / "preprocessor_config.json",
        drop=("image_size", "processor_class"),
        size={"height": 64, "width": 64},
        image_processor_type="JanusImageProcessor",
    )
    (folder / "processor_config.json").write_text(
        '{"num_image_tokens": 16, "processor_class": "JanusProcessor"}'
    )
    (folder / "chat_template.jinja").write_text(janus_template(processor.sft_format), "utf-8")
    vision = {"image_size": 64, "patch_size": 16}
    (folder / "config.json").write_text(json.dumps({"vision_config": vision}))
    processor = dataclasses.replace(processor, system_prompt="")
    assert Processor.from_dir(folder) == processor
    (folder / "processor_config.json").unlink()
    assert Processor.from_dir(folder) == processor


def test_folder_as_transformers_5_saves_it(golden, tmp_path, processor):
    import transformers
    from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(golden / "janus" / "tokenizer.json"),
        bos_token="<｜begin▁of▁sentence｜>",
        eos_token="<｜end▁of▁sentence｜>",
        pad_token="<｜▁pad▁｜>",
        extra_special_tokens={
            "image_token": "<image_placeholder>",
            "boi_token": "<begin_of_image>",
            "eoi_token": "<end_of_image>",
        },
    )
    image_processor = JanusImageProcessorPil(
        size={"height": 64, "width": 64}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    theirs = transformers.JanusProcessor(
        image_processor,
        tokenizer,
        chat_template=janus_template("deepseek"),
        use_default_system_prompt=True,
        num_image_tokens=16,
    )
    theirs.save_pretrained(tmp_path)
    assert set(tmp_path.iterdir()) == set(small_files(tmp_path))
    ours = Processor.from_dir(tmp_path)
    assert ours == processor
    assert ours.image_prompt("a cat") == processor.image_prompt("a cat")


def test_a_parsed_config_is_not_read_again(folder):
    edit(folder / "processor_config.json", drop=("num_image_tokens",))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    assert Processor.from_dir(folder, config).num_image_tokens == 16


def test_folder_errors(folder):
    edit(folder / "processor_config.json", num_image_tokens="16")
    with pytest.raises(ValueError, match=r"num_image_tokens must be at least 1, got '16'"):
        Processor.from_dir(folder)
    edit(folder / "processor_config.json", num_image_tokens=16, image_tag=None)
    with pytest.raises(ValueError, match=r"processor_config.json: image_tag must be a string"):
        Processor.from_dir(folder)
    edit(folder / "processor_config.json", drop=("image_tag",), sft_format=[])
    with pytest.raises(ValueError, match=r"sft_format must be .*, got \[\]"):
        Processor.from_dir(folder)
    edit(folder / "processor_config.json", sft_format="chatml")
    with pytest.raises(ValueError, match=r"sft_format must be .*, got 'chatml'"):
        Processor.from_dir(folder)
    edit(folder / "processor_config.json", drop=("sft_format",))
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no preprocessor_config.json in"):
        Processor.from_dir(folder)
