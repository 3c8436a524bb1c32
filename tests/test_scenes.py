"""Tests of scenes, captions, the held-out rule, questions and the tokenizer of janus_tiny."""

import json
import re

import numpy as np
import pytest
from tokenizers import Tokenizer

from janus_jax.processing import chat
from janus_jax.shapes import checker, questions, scenes, text_tokenizer

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@pytest.mark.parametrize("split", scenes.SPLITS)
def test_scene_matches_caption_and_split(split):
    rng = np.random.default_rng(3)
    for _ in range(2000):
        scene, prompt = scenes.sample_scene(rng, None, split)
        pairs = [(item.shape, item.color) for item in scene.objects]
        assert scenes.is_held_out(pairs) == (split == "held_out")
        assert prompt in scenes.prompts(split, prompt.kind)
        assert len(pairs) == sum(item.count for item in prompt.requirement.items)


def test_no_training_image_shows_a_held_out_pair():
    rng = np.random.default_rng(4)
    seen = {(o.shape, o.color) for _ in range(2000) for o in scenes.sample_mixed(rng).objects}
    everything = {(s, c) for s in scenes.SHAPES for c in scenes.COLORS}
    assert everything - seen == scenes.held_out_pairs()
    assert len(scenes.held_out_pairs()) == 3


def test_objects_keep_their_distance():
    rng = np.random.default_rng(5)
    for _ in range(300):
        objects = scenes.sample_mixed(rng).objects
        for i, one in enumerate(objects):
            reach = one.size // 2 + scenes.MARGIN
            assert reach <= min(one.x, one.y) and max(one.x, one.y) <= scenes.IMAGE_SIZE - reach
            for other in objects[:i]:
                apart = (one.size + other.size) // 2 + scenes.GAP
                assert max(abs(one.x - other.x), abs(one.y - other.y)) >= apart


def test_splits_share_no_prompt_and_training_has_every_word():
    for kind in scenes.CAPTION_KINDS:
        train, held = (scenes.prompts(split, kind) for split in scenes.SPLITS)
        texts = [prompt.text for prompt in train + held]
        assert len(set(texts)) == len(texts)
        words = {split: {w for p in prompts for w in p.text.split()}
                 for split, prompts in (("train", train), ("held_out", held))}
        assert words["held_out"] <= words["train"]
    assert {p.text for p in scenes.prompts("train", "counting")} >= {"two circles", "four crosses"}
    assert "a circle above a square" in {p.text for p in scenes.prompts("train", "position")}


def test_default_prompt_is_seen_in_training():
    text = "a red circle left of a blue square"
    assert text in {p.text for p in scenes.prompts("train", "position")}


def test_same_seed_same_images():
    def images(seed):
        rng = np.random.default_rng(seed)
        return np.stack([scenes.draw(scenes.sample_scene(rng, None)[0]) for _ in range(20)])

    assert np.array_equal(images(1), images(1))
    assert not np.array_equal(images(1), images(2))


def test_unknown_names_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="'single_object'"):
        scenes.sample_scene(rng, "single_object", "held_out")
    with pytest.raises(ValueError, match="'test'"):
        scenes.prompts("test", "colors")
    with pytest.raises(ValueError, match="'colours'"):
        scenes.prompts("train", "colours")


def matching(detections, name):
    """Returns the detections that match e.g. "circle", "red circle", "red object" or "crosses"."""
    *color, noun = name.split()
    shape = next((s for s in checker.FILL if noun.startswith(s)), None)
    return [d for d in detections
            if (shape is None or d.shape == shape) and (not color or d.color == color[0])]


def answer_from_pixels(question, image):
    """Answers a question from what the checker detects; returns None for descriptions."""
    seen = checker.detect(image)
    if question == "What is the background color?":
        return checker.background(image)
    if match := re.fullmatch(r"How many (.*) are there\?", question):
        return str(len(matching(seen, match[1])))
    if match := re.fullmatch(r"What (shape|color) is the (.*)\?", question):
        (only,) = matching(seen, match[2])
        return getattr(only, match[1])
    if match := re.fullmatch(r"Is there an? (.*)\?", question):
        return "yes" if matching(seen, match[1]) else "no"
    if match := re.fullmatch(rf"Is the (.*) ({'|'.join(OPPOSITE)}) the (.*)\?", question):
        (first,), (second,) = matching(seen, match[1]), matching(seen, match[3])
        holds = checker.holds(match[2], first, second)
        assert holds or checker.holds(OPPOSITE[match[2]], first, second)
        return "yes" if holds else "no"
    if match := re.fullmatch(rf"What is ({'|'.join(OPPOSITE)}) the (.*)\?", question):
        (place,) = matching(seen, match[2])
        (only,) = [d for d in seen if d is not place and checker.holds(match[1], d, place)]
        return only.shape
    assert question == questions.DESCRIBE
    return None


def test_answers_are_right():
    rng = np.random.default_rng(6)
    for _ in range(1000):
        scene = scenes.sample_mixed(rng, scenes.SPLITS[int(rng.random() < 0.2)])
        question, answer = questions.sample_question(rng, scene)
        expected = answer_from_pixels(question, scenes.draw(scene))
        assert answer == (questions.describe(scene) if expected is None else expected), question


def test_yes_and_no_are_balanced():
    rng = np.random.default_rng(9)
    for ask in (questions.ask_presence, questions.ask_relation):
        found = [ask(rng, scenes.sample_mixed(rng)) for _ in range(1500)]
        answers = [entry[1] == "yes" for entry in found if entry is not None]
        assert len(answers) > 500 and 0.44 < np.mean(answers) < 0.56


@pytest.mark.parametrize(
    ("objects", "text"),
    [
        ([("circle", "orange", 24, 24)], "an orange circle"),
        ([("cross", "red", 24, 24), ("cross", "red", 72, 24)], "two red crosses"),
        ([("cross", "red", 72, 24), ("circle", "blue", 24, 24)],
         "a blue circle left of a red cross"),
        ([("cross", "red", 24, 72), ("circle", "blue", 24, 24)], "a blue circle above a red cross"),
        ([("cross", "red", 64, 64), ("circle", "blue", 24, 24)], None),
        ([("cross", "red", 24, 72), ("circle", "blue", 24, 24), ("cross", "red", 72, 72)],
         "a blue circle and two red crosses"),
    ],
)
def test_describe(objects, text):
    placed = tuple(scenes.Object(s, c, 28, x, y) for s, c, x, y in objects)
    assert questions.describe(scenes.Scene("white", placed)) == text


def test_tokenizer_folder(tmp_path):
    text_tokenizer.build(tmp_path / "a")
    text_tokenizer.build(tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    config = json.loads((tmp_path / "a" / "processor_config.json").read_text())
    assert (config["num_image_tokens"], config["system_prompt"]) == (36, "")


def test_tokenizer_keeps_words_whole_and_any_text(tmp_path):
    text_tokenizer.build(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    rng = np.random.default_rng(11)
    for _ in range(200):
        question, answer = questions.sample_question(rng, scenes.sample_mixed(rng))
        caption = scenes.sample_scene(rng, None)[1].text
        for text in (question, f" {answer}", f" {caption}"):
            pieces = re.findall(r"\s?[A-Za-z]+|\s|\d|[?.,]", text)
            assert len(tokenizer.encode(text).ids) == len(pieces), text
    for text in ("<|User|>: caf\u00e9 \u4f60\u597d <begin_of_image>", "a\nb  c 12"):
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert tokenizer.token_to_id(text_tokenizer.BOS) not in ids
    for token in (*text_tokenizer.SPECIAL, *chat.JANUS_ROLES["deepseek"]):
        assert len(tokenizer.encode(token).ids) == 1
