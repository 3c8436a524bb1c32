"""The scoring script, with a painter and an oracle in place of a model."""

import dataclasses
from types import SimpleNamespace

import numpy as np

import janus_jax
from benchmarks import score_scenes
from configs import janus_tiny, janus_tiny_decoder, janus_tiny_encoder
from janus_jax.data import questions, scenes
from janus_jax.data.scene_batches import decoder_batch, labelled_pictures, step_scenes


class Oracle:
    """Draws what is asked for (turned upside down on demand) and answers rightly (or "yes")."""

    def __init__(self, upside_down=False, honest=True):
        self.upside_down, self.honest = upside_down, honest
        self.pictures, self.answers = {}, {}

    def generate_images(self, prompts, num_images, seed, guidance_weight, max_batch):
        drawn = [self.pictures[text] for text in prompts for _ in range(num_images)]
        return SimpleNamespace(pixels=[x[::-1] if self.upside_down else x for x in drawn])

    def answer(self, asked, images, max_new_tokens):
        keys = [(q, own[0].tobytes()) for q, own in zip(asked, images, strict=True)]
        return [" " + self.answers[key] if self.honest else " yes" for key in keys]


def painter(**kind) -> tuple[Oracle, list[scenes.Prompt]]:
    rng, oracle = np.random.default_rng(0), Oracle(**kind)
    prompts = []
    for _ in range(12):
        scene, prompt = scenes.sample_scene(rng, "position")
        if prompt.requirement.relation in ("above", "below"):
            prompts.append(prompt)
            oracle.pictures[prompt.text] = scenes.draw(scene)
    return oracle, prompts


def test_pictures_of_the_prompt_count_and_others_do_not():
    oracle, prompts = painter()
    assert score_scenes.score_pictures(oracle, prompts, 1.0, 0) == 1
    oracle, prompts = painter(upside_down=True)
    assert score_scenes.score_pictures(oracle, prompts, 1.0, 0) == 0


def test_prompts_that_choose_the_guidance_do_not_count():
    for kind in scenes.KINDS:
        tuning, scored = score_scenes.split_prompts("train", kind)
        assert tuning and scored
        assert not {p.text for p in tuning} & {p.text for p in scored}


def taught(monkeypatch, **kind) -> Oracle:
    """An oracle that hears every question and answer that the script makes up."""
    oracle = Oracle(**kind)

    def sample(rng, scene):
        question, answer = questions.sample_question(rng, scene)
        oracle.answers[question, scenes.draw(scene).tobytes()] = answer
        return question, answer

    monkeypatch.setattr(score_scenes, "sample_question", sample)
    monkeypatch.setattr(score_scenes, "QUESTIONS", 60)
    return oracle


def test_answers_must_equal_the_expected_ones(monkeypatch):
    record = score_scenes.score_answers(taught(monkeypatch), "train", set())
    assert (record["exact_match"], record["questions"], record["left_out_as_seen"]) == (1, 60, 0)
    assert sum(entry["questions"] for entry in record["by_question"].values()) == 60
    record = score_scenes.score_answers(taught(monkeypatch, honest=False), "train", set())
    assert 0 < record["exact_match"] < 0.3


def test_scenes_of_the_training_are_left_out(monkeypatch):
    rng = np.random.default_rng((score_scenes.SEED, 0))
    first = score_scenes.any_scene(rng, "train")
    seen = {score_scenes.digest(first)}
    record = score_scenes.score_answers(taught(monkeypatch), "train", seen)
    assert record["left_out_as_seen"] >= 1 and record["questions"] == 60


def test_scenes_of_a_training_step_are_those_that_it_draws(monkeypatch):
    """By the encoder's config, and by both halves of the decoder's."""
    processor = janus_jax.load(dtype="float32").processor
    drawn, draw = [], scenes.draw
    monkeypatch.setattr(scenes, "draw", lambda scene: drawn.append(scene) or draw(scene))
    for config, size in ((janus_tiny_encoder, 64), (janus_tiny_decoder, 64), (janus_tiny, 80)):
        drawn.clear()
        cfg, step = config.get_config(), 3
        rng = np.random.default_rng((cfg.seed, step))
        if cfg.task == "encoder":
            labelled_pictures(rng, cfg.batch_size, patch=16)
        else:
            decoder_batch(processor, cfg)(rng, step)
        assert step_scenes(cfg, step) == drawn and len(drawn) == size


def test_a_scene_s_name_is_that_of_its_picture():
    rng = np.random.default_rng(0)
    for _ in range(50):
        scene, other = (scenes.sample_mixed(rng) for _ in range(2))
        turned = dataclasses.replace(scene, objects=scene.objects[::-1])
        assert np.array_equal(scenes.draw(scene), scenes.draw(turned))
        assert score_scenes.digest(scene) == score_scenes.digest(turned)
        assert score_scenes.digest(scene) != score_scenes.digest(other)
