"""Batches of drawn scenes: what is masked, what is to be learned, and what is never shown."""

import itertools
import re

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import janus_tiny
from janus_jax.data import checker, scene_batches, scenes, tiny_tokenizer
from janus_jax.data.questions import sample_question
from janus_jax.data.scene_batches import SceneBatches, decoder_batch, scene_pictures
from janus_jax.processing.processor import Processor
from janus_jax.training.loop import drawn_batches
from janus_jax.training.tokenizer import random_crops

PROMPT, CONVERSATION = 20, 130


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer.build(folder)
    return Processor.from_dir(folder)


@pytest.fixture(scope="module")
def batches(processor):
    return SceneBatches(processor, PROMPT, CONVERSATION, dict.fromkeys(scenes.KINDS, 1))


@pytest.fixture(scope="module")
def drawn(batches):
    """1000 captions and their pictures."""
    return batches.generation(np.random.default_rng(0), 1000)


@pytest.fixture(scope="module")
def asked(batches):
    """100 pictures with questions."""
    return batches.understanding(np.random.default_rng(1), 100)


def captions(processor, drawn) -> list[str]:
    """The caption of each row; '' where it was dropped."""
    texts = []
    for tokens, mask in zip(drawn["tokens"], drawn["token_mask"], strict=True):
        text = processor.tokenizer.decode(tokens[mask])
        texts.append(text.removeprefix("<|User|>: ").removesuffix("\n\n<|Assistant|>:"))
    return texts


def held_out(words: str) -> bool:
    """Whether a text names a held-out composition."""
    pairs = re.findall(rf"({'|'.join(scenes.COLORS)}) ({'|'.join(scenes.SHAPES)})", words)
    return scenes.is_held_out([(shape, color) for color, shape in pairs])


def test_prompts_are_padded_on_the_left_and_end_in_begin_of_image(processor, drawn):
    tokens, mask, tokenizer = drawn["tokens"], drawn["token_mask"], processor.tokenizer
    assert tokens.shape == mask.shape == (1000, PROMPT)
    assert (tokens.dtype, mask.dtype) == (np.int32, bool)
    assert (np.diff(mask.astype(int)) >= 0).all()
    assert (tokens[~mask] == tokenizer.pad_id).all()
    assert (tokens[:, -1] == tokenizer.image_start_id).all()
    assert (tokens[np.arange(1000), mask.argmax(1)] == tokenizer.bos_id).all()
    assert len(set(mask.sum(1))) > 3


def test_captions_are_true_and_a_tenth_is_dropped(processor, drawn):
    """Dropped ones keep their length, as in the reference: all but the ends becomes padding."""
    known = {p.text: p for kind in scenes.KINDS for p in scenes.prompts("train", kind)}
    texts = captions(processor, drawn)
    assert 65 <= texts.count("") <= 140  # 100 expected, deviation 9.5
    for text, image, tokens, mask in zip(
        texts, drawn["images"], drawn["tokens"], drawn["token_mask"], strict=True
    ):
        if text:
            assert checker.satisfies(known[text].requirement, checker.detect(image)), text
        else:
            assert (tokens[mask][1:-1] == processor.tokenizer.pad_id).all() and mask.sum() > 8


def test_nothing_held_out_is_named_or_shown(processor, drawn, asked):
    tokenizer = processor.tokenizer
    texts = [tokenizer.decode(row[row != tokenizer.image_id]) for row in asked["tokens"]]
    answers = [part.split("<|Assistant|>: ")[-1] for t in texts for part in t.split("<|User|>")]
    assert not any(map(held_out, captions(processor, drawn) + answers))
    assert sum(" and " in answer or " of " in answer for answer in answers) > 5
    unnormalised = ((asked["pixels"][:, 0] + 1) * 127.5).round().astype(np.uint8)
    mixed = scene_pictures(np.random.default_rng(2), 200)
    for image in itertools.chain(drawn["images"][:300], unnormalised, mixed):
        found = checker.detect(image)
        assert found and not scenes.is_held_out([(d.shape, d.color) for d in found])


def test_the_rule_above_finds_what_is_held_out():
    texts = [p.text for kind in scenes.KINDS for p in scenes.prompts("held_out", kind)]
    found = [held_out(re.sub(r"(cross)es|(circle|square|triangle)s", r"\1\2", t)) for t in texts]
    assert len(texts) > 100 and all(found)


def test_conversations_hold_one_image_and_three_questions(processor, asked):
    tokens, mask, tokenizer = asked["tokens"], asked["token_mask"], processor.tokenizer
    assert tokens.shape == (100, CONVERSATION) and asked["pixels"].shape == (100, 1, 96, 96, 3)
    assert (np.diff(mask.astype(int)) >= 0).all()
    assert (tokens[~mask] == tokenizer.pad_id).all() and mask[:, -1].all()
    np.testing.assert_array_equal(asked["image_mask"], tokens == tokenizer.image_id)
    assert (asked["image_mask"].sum(1) == processor.num_image_tokens).all()
    assert (tokens[np.arange(100), mask.argmax(1)] == tokenizer.bos_id).all()
    assert ((tokens == tokenizer.eos_id).sum(1) == scene_batches.TURNS).all()
    assert 0.9 < asked["pixels"].max() <= 1 and -1 <= asked["pixels"].min() < -0.7


def test_the_answers_and_their_ends_are_to_be_learned_and_nothing_else(
    processor, batches, monkeypatch
):
    told = []

    def recorded(rng, scene):
        told.append(sample_question(rng, scene))
        return told[-1]

    monkeypatch.setattr(scene_batches, "sample_question", recorded)
    batch = batches.understanding(np.random.default_rng(3), 30)
    tokenizer, turns = processor.tokenizer, scene_batches.TURNS
    for row in range(30):
        tokens, loss = batch["tokens"][row], batch["loss_mask"][row]
        learned = tokenizer.decode(tokens[loss], skip_special=False)
        rest = tokenizer.decode(tokens[~loss & ~batch["image_mask"][row]])
        pairs = told[row * turns : (row + 1) * turns]
        assert learned == "".join(f" {answer}{tiny_tokenizer.EOS}" for _, answer in pairs)
        asked = [f"<|User|>: {question}\n\n<|Assistant|>:" for question, _ in pairs]
        asked[0] = asked[0].replace("<|User|>: ", "<|User|>: \n")  # the image stood there
        assert rest == "".join(asked)


def test_a_conversation_reads_as_the_processor_writes_it(processor, batches):
    """So that training meets what answering meets."""
    batch = batches.understanding(np.random.default_rng(4), 5)
    for tokens, mask in zip(batch["tokens"], batch["token_mask"], strict=True):
        text = processor.tokenizer.decode(tokens[mask], skip_special=False)
        turns = re.findall(r"<\|User\|>: (.*?)\n\n<\|Assistant\|>: (.*?)<｜end", text, re.DOTALL)
        messages = []
        for question, answer in turns:
            question = re.sub(r"<begin_of_image>.*<end_of_image>", "<image_placeholder>", question)
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        image = np.zeros((96, 96, 3), np.uint8)
        expected, _ = processor.conversation(messages, [image])
        assert tokens[mask].tolist() == expected


def test_a_batch_is_made_of_seed_and_step_alone(processor):
    cfg = ConfigDict(dict(seed=5, steps=4, prompt_length=PROMPT, conversation_length=CONVERSATION))
    cfg.generation_batch_size, cfg.understanding_batch_size = 3, 2
    cfg.caption_weights = dict(colors=1, position=3)
    make = decoder_batch(processor, cfg)
    run = list(drawn_batches(make, cfg))
    assert [len(part["tokens"]) for part in run[0].values()] == [3, 2]
    alone = make(np.random.default_rng((5, 2)), 2)
    for part, arrays in alone.items():
        for name, array in arrays.items():
            np.testing.assert_array_equal(run[2][part][name], array)
    images = [batch["generation"]["images"] for batch in run]
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations(images, 2))
    cfg.seed = 6
    other = next(iter(drawn_batches(make, cfg)))["generation"]["images"]
    assert not np.array_equal(other, images[0])


def test_examples_that_do_not_fit_are_refused_with_both_numbers(processor):
    short = SceneBatches(processor, 8, 50, dict.fromkeys(scenes.KINDS, 1))
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"longest=1\d length=8$"):
        short.generation(rng, 20)
    with pytest.raises(ValueError, match=r"longest=\d\d length=50$"):
        short.understanding(rng, 20)


def test_captions_are_drawn_by_their_weights(processor):
    weights = dict(single_object=0, colors=1, counting=3)
    drawn = SceneBatches(processor, PROMPT, 0, weights).generation(np.random.default_rng(0), 400)
    kinds = {p.text: kind for kind in scenes.KINDS for p in scenes.prompts("train", kind)}
    found = [kinds[text] for text in captions(processor, drawn) if text]
    assert set(found) == {"colors", "counting"}
    assert 0.68 < found.count("counting") / len(found) < 0.82


@pytest.mark.parametrize("weights", [{}, dict(colors=0), dict(colors=2, position=-1), dict(dogs=1)])
def test_wrong_caption_weights_are_refused(processor, weights):
    with pytest.raises(ValueError, match=f"one above 0, got {weights}"):
        SceneBatches(processor, PROMPT, 0, weights)


def test_the_config_has_room_for_the_longest_examples(processor, monkeypatch):
    """Every caption, and a conversation of the longest description three times over."""
    cfg = janus_tiny.get_config()
    texts = [p.text for kind in scenes.KINDS for p in scenes.prompts("train", kind)]
    assert max(len(processor.image_prompt(text)) for text in texts) <= cfg.prompt_length
    rng, tokenizer = np.random.default_rng(0), processor.tokenizer
    found = [sample_question(rng, scenes.sample_mixed(rng)) for _ in range(3000)]
    longest = max(found, key=lambda pair: len(tokenizer.encode(" ".join(pair))))
    monkeypatch.setattr(scene_batches, "sample_question", lambda rng, scene: longest)
    SceneBatches(processor, 0, cfg.conversation_length, dict(colors=1)).understanding(rng, 1)


def test_crops_lie_between_patches():
    """Each pixel says where it comes from."""
    y, x = np.mgrid[:96, :96]
    images = np.stack([np.stack([y, x, np.full((96, 96), i)], -1) for i in range(200)])
    crops = random_crops(np.random.default_rng(0), images.astype(np.uint8), 48, 16)
    assert crops.shape == (200, 48, 48, 3) and crops.dtype == np.uint8
    corners = crops[:, 0, 0].astype(int)
    assert {tuple(corner) for corner in corners[:, :2]} == {
        (row, column) for row in range(0, 49, 16) for column in range(0, 49, 16)
    }
    np.testing.assert_array_equal(corners[:, 2], np.arange(200))
    for crop, (row, column, i) in zip(crops, corners, strict=True):
        np.testing.assert_array_equal(crop, images[i, row : row + 48, column : column + 48])


def test_a_crop_of_the_whole_picture_is_the_picture():
    images = scene_pictures(np.random.default_rng(0), 2)
    np.testing.assert_array_equal(random_crops(np.random.default_rng(1), images, 96, 16), images)
