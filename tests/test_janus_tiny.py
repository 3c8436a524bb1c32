"""The model that ships: an ordinary folder, small, that draws and answers what it should."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import janus_jax
from configs import janus_tiny
from janus_jax.data import checker, scenes
from janus_jax.data.questions import sample_question
from janus_jax.data.scene_batches import any_scene
from janus_jax.generation.loading import TINY
from janus_jax.interop.export import inspect_folder
from janus_jax.interop.load import open_folder
from janus_jax.models.janus import JanusConfig

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def janus():
    return janus_jax.load(dtype="float32")


def test_it_is_a_small_folder_in_deepseeks_layout():
    assert sum(path.stat().st_size for path in TINY.iterdir()) <= 10 * 2**20
    folder = open_folder(TINY)
    assert folder.layout == "deepseek"
    assert folder.cfg == JanusConfig.janus_tiny()
    assert inspect_folder(TINY)


def test_it_draws_objects_of_a_color(janus):
    prompts = scenes.prompts("train", "colors")
    drawn = janus.generate_images([prompt.text for prompt in prompts], seed=5)
    found = [checker.detect(picture) for picture in drawn.pixels]
    right = [checker.satisfies(p.requirement, d) for p, d in zip(prompts, found, strict=True)]
    assert np.mean(right) >= 0.6  # 21 pictures of a model that gets 0.84 of them right


def test_it_answers_questions(janus):
    rng = np.random.default_rng(2)
    drawn = [any_scene(rng) for _ in range(40)]
    asked = [sample_question(rng, scene) for scene in drawn]
    pictures = [[scenes.draw(scene)] for scene in drawn]
    given = janus.answer([question for question, _ in asked], pictures, max_new_tokens=32)
    right = [a.strip() == b for a, (_, b) in zip(given, asked, strict=True)]
    assert np.mean(right) >= 0.85


@pytest.mark.parametrize("page", ["README.md", "docs/janus_tiny.md"])
def test_the_scores_told_are_those_of_the_record(page):
    record = json.loads((ROOT / "benchmarks" / "results" / "janus_tiny.json").read_text())
    text = (ROOT / page).read_text(encoding="utf-8")
    generation, understanding = record["generation"], record["understanding"]
    for name in ("mean_of_kinds", "exact_match"):
        part = generation if name == "mean_of_kinds" else understanding
        seen, held_out = (f"{part[split][name]:.2f}" for split in scenes.SPLITS)
        assert re.search(rf"{seen}(, | \| ){held_out}", text), name


def test_it_draws_with_the_guidance_that_was_best_when_it_was_scored(janus):
    record = json.loads((ROOT / "benchmarks" / "results" / "janus_tiny.json").read_text())
    assert janus.guidance_weight == record["generation"]["guidance_weight"]
    assert janus_tiny.get_config().guidance_weight == janus.guidance_weight
