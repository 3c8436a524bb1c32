"""The model that ships: an ordinary folder, small, that draws and answers what it should."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import janus_jax
from benchmarks import score_scenes
from janus_jax.interop.convert import inspect_folder
from janus_jax.interop.folders import BUNDLED_FOLDER
from janus_jax.interop.load import open_folder
from janus_jax.models.janus import JanusConfig
from janus_jax.shapes import checker, scenes
from janus_jax.shapes.questions import sample_question

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def janus():
    return janus_jax.load(dtype="float32")


def test_it_is_a_small_folder_in_deepseeks_layout():
    assert sum(path.stat().st_size for path in BUNDLED_FOLDER.iterdir()) <= 10 * 2**20
    folder = open_folder(BUNDLED_FOLDER)
    assert folder.layout == "deepseek"
    assert folder.cfg == JanusConfig.janus_tiny()
    assert inspect_folder(BUNDLED_FOLDER)


def test_it_generates_what_the_readme_says(janus):
    """The images of the README's first line, and more of them."""
    text = "a red circle left of a blue square"
    (prompt,) = (p for p in scenes.prompts("train", "position") if p.text == text)
    drawn = janus.generate_images(text, num_images=8)
    right = [checker.satisfies(prompt.requirement, checker.detect(x)) for x in drawn.pixels]
    assert right[0] and sum(right) >= 6


def test_it_generates_every_kind(janus):
    """Few images, so with room for chance below what the record says."""
    rng = np.random.default_rng(5)
    for kind, scored in record()["generation"]["train"]["kinds"].items():
        prompts = scenes.prompts("train", kind)
        chosen = [prompts[i] for i in rng.integers(0, len(prompts), 16)]
        drawn = janus.generate_images([prompt.text for prompt in chosen], seed=5)
        found = map(checker.detect, drawn.pixels)
        right = [
            checker.satisfies(p.requirement, d) for p, d in zip(chosen, found, strict=True)
        ]
        assert np.mean(right) >= scored["score"] - 0.25, kind


def test_it_answers_questions(janus):
    rng = np.random.default_rng(2)
    drawn = [scenes.sample_any(rng) for _ in range(60)]
    asked = [sample_question(rng, scene) for scene in drawn]
    images = [[scenes.draw(scene)] for scene in drawn]
    given = janus.answer([question for question, _ in asked], images, max_new_tokens=32)
    right = [a.strip() == b for a, (_, b) in zip(given, asked, strict=True)]
    assert np.mean(right) >= 0.9


def record(name: str = "janus_tiny") -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


@pytest.mark.parametrize("name", ["janus_tiny", "janus_tiny_temperature_1"])
def test_the_records_are_of_these_weights(name):
    assert record(name)["sha256"] == score_scenes.weights_digests(BUNDLED_FOLDER)


def test_it_reaches_its_targets():
    scores = record()
    assert scores["generation"]["train"]["mean_of_kinds"] >= 0.9
    assert scores["understanding"]["train"]["exact_match"] >= 0.95


@pytest.mark.parametrize("page", ["README.md", "docs/janus_tiny.md"])
def test_the_published_scores_are_those_of_the_record(page):
    scores = record()
    text = (ROOT / page).read_text(encoding="utf-8")
    generation, understanding = scores["generation"], scores["understanding"]
    for name in ("mean_of_kinds", "exact_match"):
        part = generation if name == "mean_of_kinds" else understanding
        seen, held_out = (f"{part[split][name]:.2f}" for split in scenes.SPLITS)
        assert re.search(rf"{seen}(, | \| ){held_out}", text), name


def test_it_generates_in_the_way_that_was_best_when_it_was_scored(janus):
    generation = record()["generation"]
    assert janus.image_defaults == (generation["guidance_weight"], generation["temperature"])
    best = max(generation["tuning_scores"], key=lambda tried: tried["score"])
    assert janus.image_defaults == (best["guidance_weight"], best["temperature"])
