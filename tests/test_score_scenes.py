"""Tests of the scoring script, with an oracle in place of a model."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import score_scenes
from configs import janus_tiny_encoder, janus_tiny_stage3
from janus_jax.data.sources import open_source
from janus_jax.shapes import questions, scenes
from janus_jax.shapes.batches import labeled_images
from janus_jax.shapes.source import ALL_FORMATS


class Oracle:
    """A perfect model: returns correct images and answers.

    With upside_down, images are flipped vertically. With honest=False, every answer is "yes".
    """

    def __init__(self, upside_down=False, honest=True):
        self.upside_down, self.honest = upside_down, honest
        self.images, self.answers = {}, {}

    def generate_images(self, prompts, num_images, seed, max_batch):
        images = [self.images[text] for text in prompts for _ in range(num_images)]
        return SimpleNamespace(pixels=[x[::-1] if self.upside_down else x for x in images])

    def answer(self, batch, images, max_new_tokens):
        keys = [(q, own[0].tobytes()) for q, own in zip(batch, images, strict=True)]
        return [" " + self.answers[key] if self.honest else " yes" for key in keys]


def oracle_and_prompts(**kind) -> tuple[Oracle, list[scenes.Prompt]]:
    rng, oracle = np.random.default_rng(0), Oracle(**kind)
    prompts = []
    for _ in range(12):
        scene, prompt = scenes.sample_scene(rng, "position")
        if prompt.requirement.relation in ("above", "below"):
            prompts.append(prompt)
            oracle.images[prompt.text] = scenes.draw(scene)
    return oracle, prompts


def test_images_of_the_prompt_count_and_others_do_not():
    oracle, prompts = oracle_and_prompts()
    assert score_scenes.score_images(oracle, prompts, 0) == 1
    oracle, prompts = oracle_and_prompts(upside_down=True)
    assert score_scenes.score_images(oracle, prompts, 0) == 0


def test_prompts_that_choose_how_to_draw_do_not_count():
    for kind in scenes.CAPTION_KINDS:
        tuning, scored = score_scenes.split_prompts("train", kind)
        assert tuning and scored
        assert not {p.text for p in tuning} & {p.text for p in scored}


def informed_oracle(monkeypatch, **kind) -> Oracle:
    """Returns an oracle that is given the answer to every question of the script."""
    oracle = Oracle(**kind)

    def sample(rng, scene):
        question, answer = questions.sample_question(rng, scene)
        oracle.answers[question, scenes.draw(scene).tobytes()] = answer
        return question, answer

    monkeypatch.setattr(score_scenes, "sample_question", sample)
    monkeypatch.setattr(score_scenes, "QUESTIONS", 60)
    return oracle


def test_answers_must_equal_the_expected_ones(monkeypatch):
    record = score_scenes.score_answers(informed_oracle(monkeypatch), "train", set())
    assert (record["exact_match"], record["questions"], record["skipped_as_seen"]) == (1, 60, 0)
    assert sum(entry["questions"] for entry in record["by_question"].values()) == 60
    record = score_scenes.score_answers(informed_oracle(monkeypatch, honest=False), "train", set())
    assert 0 < record["exact_match"] < 0.3


@pytest.mark.parametrize("change", [dict(x=60), dict(color="blue"), dict(shape="circle")])
def test_answers_are_those_of_what_the_checker_reads(change):
    item = scenes.Object("square", "red", size=30, x=40, y=40)
    scene = scenes.Scene("white", (item,))
    image = scenes.draw(scene)
    score_scenes.check_reading(scene, image)
    other = scenes.Scene("white", (dataclasses.replace(item, **change),))
    for wrong in (other, scenes.Scene("black", (item,)), scenes.Scene("white", (item, item))):
        with pytest.raises(ValueError, match="the checker must detect Scene"):
            score_scenes.check_reading(wrong, image)


def test_scenes_of_the_training_are_skipped(monkeypatch):
    rng = np.random.default_rng((score_scenes.SEED, 0))
    first = scenes.sample_any(rng, "train")
    seen = {score_scenes.digest(first)}
    record = score_scenes.score_answers(informed_oracle(monkeypatch), "train", seen)
    assert record["skipped_as_seen"] >= 1 and record["questions"] == 60


def test_scenes_of_the_training_are_those_that_it_generates(monkeypatch):
    """They are those of the encoder's steps, and those of the stages' records with images."""
    encoder, stage = janus_tiny_encoder.get_config(), janus_tiny_stage3.get_config()
    encoder.steps = 2
    parts = [stage.mixture.understanding, stage.mixture.text]
    parts += [stage.mixture.generation[kind] for kind in scenes.CAPTION_KINDS]
    for part in parts:
        part.count = 3
    monkeypatch.setattr(score_scenes.janus_tiny_encoder, "get_config", lambda: encoder)
    monkeypatch.setattr(score_scenes.janus_tiny_stage3, "get_config", lambda: stage)
    drawn, draw = [], scenes.draw
    monkeypatch.setattr(scenes, "draw", lambda scene: drawn.append(scene) or draw(scene))
    for step in range(2):
        rng = np.random.default_rng((encoder.seed, step))
        labeled_images(rng, encoder.batch_size, patch=16)
    for part in parts:
        options = {name: part[name] for name in part if name not in ("weight", "format", "path")}
        source = open_source(part.format, part.path, formats=ALL_FORMATS, **options)
        list(map(source.__getitem__, range(3)))
    assert len(drawn) == 2 * encoder.batch_size + 7 * 3
    assert score_scenes.training_scenes() == set(map(score_scenes.digest, drawn))


def test_a_scene_s_name_is_that_of_its_image():
    rng = np.random.default_rng(0)
    for _ in range(50):
        scene, other = (scenes.sample_mixed(rng) for _ in range(2))
        turned = dataclasses.replace(scene, objects=scene.objects[::-1])
        assert np.array_equal(scenes.draw(scene), scenes.draw(turned))
        assert score_scenes.digest(scene) == score_scenes.digest(turned)
        assert score_scenes.digest(scene) != score_scenes.digest(other)
