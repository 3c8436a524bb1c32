"""The shipped model learns to tell of a shape that it never saw, from a JSONL file: slow.

Drawing the shape is not asked: the image tokenizer is never trained, and makes a cross or a circle
of a diamond. What the model knew is mixed in, images too, and must stay: both old scores may drop
by less than 0.03.
"""

import itertools

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image, ImageDraw
from stage_configs import train_stage

from benchmarks.score_scenes import SEED, ask_all, score_images, split_prompts
from configs.janus_tiny_stage1 import tiny_stage
from janus_jax import load
from janus_jax.data.records import Record
from janus_jax.data.writers import write_records
from janus_jax.interop.folders import BUNDLED_FOLDER
from janus_jax.processing.images import encode_png
from janus_jax.shapes import scenes
from janus_jax.shapes.questions import sample_question
from janus_jax.training.stages import ALL_BUT_VQ

LEARNED, TRIED = 400, 60  # images of the new shape
OLD_QUESTIONS = 600
MOST_LOST = 0.03
LORA = dict(
    lora_rank=16,
    lora_alpha=32.0,
    lora_targets=r"(language_model\.layers|und_encoder\.blocks)\.\d+\.(self_attn|attn|mlp)\.\w+",
    learning_rate=5e-4,
    end_learning_rate=2e-5,
)
FULL = dict(trained=ALL_BUT_VQ, learning_rate=2e-4, end_learning_rate=2e-5)


def diamond(color: str, background: str, size: int, x: int, y: int) -> np.ndarray:
    """A square on its corner, uint8[96, 96, 3]; size, x and y in pixels, as scenes.Object."""
    scale = scenes.SUPERSAMPLE
    side, half = scenes.IMAGE_SIZE * scale, size * scale // 2
    image = Image.new("RGB", (side, side), scenes.BACKGROUNDS[background])
    x, y = x * scale, y * scale
    corners = ((x, y - half), (x + half, y), (x, y + half), (x - half, y))
    ImageDraw.Draw(image).polygon(corners, fill=scenes.COLORS[color])
    small = image.resize((scenes.IMAGE_SIZE,) * 2, Image.Resampling.BOX)
    return np.asarray(small)


def all_diamonds(color: str) -> list[np.ndarray]:
    places = range(24, 80, scenes.SNAP)
    return [
        diamond(color, background, size, x, y)
        for background in scenes.BACKGROUNDS
        for size, x, y in itertools.product(scenes.SIZES, places, places)
    ]


def questions_about(rng: np.random.Generator, color: str) -> tuple[tuple[str, str], ...]:
    shape = scenes.choice(rng, ("diamond", *scenes.SHAPES))
    article = "an" if color[0] in "aeiou" else "a"
    return (
        ("What shape is the object?", "diamond"),
        ("What color is the diamond?", color),
        (f"Is there {article} {color} {shape}?", "yes" if shape == "diamond" else "no"),
    )


@pytest.fixture(scope="module")
def diamonds():
    """(color, image, questions), those to learn from and those to be tried with."""
    rng = np.random.default_rng(0)
    every = [(color, image) for color in scenes.COLORS for image in all_diamonds(color)]
    chosen = rng.permutation(len(every))[: LEARNED + TRIED]
    told = [(*every[i], questions_about(rng, every[i][0])) for i in chosen]
    return told[:LEARNED], told[LEARNED:]


@pytest.fixture(scope="module")
def new_records(diamonds, tmp_path_factory):
    """A JSONL file of questions about diamonds."""
    folder, (learned, _) = tmp_path_factory.mktemp("new"), diamonds
    asked = [
        Record("understanding", questions, images=(encode_png(image),))
        for _, image, questions in learned
    ]
    write_records("jsonl", folder / "asked.jsonl", asked)
    return folder / "asked.jsonl"


def new_answers(pipeline, tried) -> float:
    """Part of the questions about new diamonds that are answered right."""
    asked = [(q, a, image) for _, image, questions in tried for q, a in questions]
    given = ask_all(pipeline, [q for q, _, _ in asked], [image for _, _, image in asked])
    return float(np.mean([a == b for a, (_, b, _) in zip(given, asked, strict=True)]))


def old_scores(pipeline) -> tuple[float, float]:
    """Images of all kinds of prompts right, and answers to questions about seen compositions."""
    prompts = [p for kind in scenes.CAPTION_KINDS for p in split_prompts("train", kind)[1][:20]]
    rng = np.random.default_rng(SEED)
    asked = [(s := scenes.sample_any(rng), *sample_question(rng, s)) for _ in range(OLD_QUESTIONS)]
    images = [scenes.draw(scene) for scene, _, _ in asked]
    given = ask_all(pipeline, [question for _, question, _ in asked], images)
    answers = float(np.mean([a == b for a, (_, _, b) in zip(given, asked, strict=True)]))
    return score_images(pipeline, prompts, SEED), answers


@pytest.fixture(scope="module")
def before(diamonds):
    pipeline = load(BUNDLED_FOLDER, dtype="float32")
    return old_scores(pipeline), new_answers(pipeline, diamonds[1])


def mixture(new_records) -> dict:
    """A quarter of the records new, the others of the kinds that the model was trained on."""
    kinds = scenes.CAPTION_KINDS
    drawn = {kind: dict(format="scenes", path=f"generation/{kind}") for kind in kinds}
    return dict(
        new=dict(weight=1, format="jsonl", path=str(new_records)),
        old=dict(
            weight=3,
            asked=dict(format="scenes", path="understanding"),
            drawn=dict(weight=2, **drawn),
        ),
    )


@pytest.mark.slow
@pytest.mark.parametrize("way", [LORA, FULL], ids=["lora", "full"])
def test_a_new_shape_is_learned_and_the_old_ones_are_kept(
    way, before, diamonds, new_records, tmp_path
):
    config = tiny_stage(3)
    config.update(output=str(tmp_path), mesh="data=1", steps=400, warmup_steps=20, **way)
    config.update(init=str(BUNDLED_FOLDER), sample_every=0, model_dtype="float32")
    config.mixture = ConfigDict(mixture(new_records))
    train_stage(config)
    pipeline = load(tmp_path / "model", dtype="float32")
    answers, after = new_answers(pipeline, diamonds[1]), old_scores(pipeline)
    (drawn, answered), answers_before = before
    print(f"\nnew answers {answers_before:.3f} -> {answers:.3f}")
    print(f"old images {drawn:.3f} -> {after[0]:.3f}")
    print(f"old answers {answered:.3f} -> {after[1]:.3f}")
    assert answers > 0.9 > answers_before + 0.3
    assert after[0] > drawn - MOST_LOST and after[1] > answered - MOST_LOST
