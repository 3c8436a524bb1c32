"""Scores a model on drawn scenes: images of prompts, and questions about images.

    python -m benchmarks.score_scenes --output benchmarks/results/janus_tiny.json

Images are judged by janus_jax/data/checker.py, which reads pixels and shares no code with the
drawing; four images a prompt, as in GenEval. Guidance and temperature are chosen on prompts that
do not count. Answers must equal the expected ones to the letter: those of the drawn scene, in which
the checker must have read the same from the pixels. Questions are about scenes that neither the
understanding encoder nor the decoder saw in training (the image tokenizer takes no part in
answering).
"""

import argparse
import collections
import hashlib
import itertools
import json
import os
import platform
import time
from pathlib import Path

import jax
import numpy as np

from configs import janus_tiny_encoder, janus_tiny_stage3
from janus_jax import load
from janus_jax.data import checker, scenes
from janus_jax.data.mixture import open_parts
from janus_jax.data.questions import sample_question
from janus_jax.data.scene_batches import sample_scenes
from janus_jax.data.sources import open_source
from janus_jax.generation.loading import GENERATION_KEYS, TINY, ImageDefaults, find_folder
from janus_jax.generation.pipeline import Pipeline
from janus_jax.processing.json_files import write_json

GUIDANCE = (1.0, 1.5, 2.0, 3.0, 5.0)
TEMPERATURES = (1.0, 0.8, 0.6)
NUM_IMAGES = 4  # a prompt
TUNING_PROMPTS = 12  # a kind at most, and at most a quarter of the kind's prompts
SCORED_PROMPTS = 60  # a kind at most
QUESTIONS = 1200
ANSWER_BATCH = 48
READ_WITHIN = 1.0  # pixels
SEED = 2026  # of prompts, questions and images; training has its own


def split_prompts(split: str, kind: str) -> tuple[list[scenes.Prompt], list[scenes.Prompt]]:
    """Prompts to choose guidance and temperature on and, apart from them, prompts to score."""
    prompts = scenes.prompts(split, kind)
    order = np.random.default_rng(SEED).permutation(len(prompts))
    cut = min(TUNING_PROMPTS, len(prompts) // 4)
    tuning = [prompts[i] for i in order[:cut]]
    return tuning, [prompts[i] for i in order[cut : cut + SCORED_PROMPTS]]


def score_images(
    pipeline: Pipeline, prompts: list[scenes.Prompt], seed: int, **drawing: float
) -> float:
    """Part of the images of the prompts that show what is asked for, and nothing else.

    drawing: guidance_weight and temperature, if not the checkpoint's own.
    """
    texts = [p.text for p in prompts]
    drawn = pipeline.generate_images(texts, NUM_IMAGES, seed, **drawing, max_batch=64)
    wanted = [p.requirement for p in prompts for _ in range(NUM_IMAGES)]
    found = [checker.detect(image) for image in drawn.pixels]
    return float(np.mean([checker.satisfies(*pair) for pair in zip(wanted, found, strict=True)]))


def try_drawing(pipeline: Pipeline) -> dict[ImageDefaults, float]:
    """Score of each way to draw on the tuning prompts of training compositions."""
    prompts = [p for kind in scenes.KINDS for p in split_prompts("train", kind)[0]]
    ways = itertools.starmap(ImageDefaults, itertools.product(GUIDANCE, TEMPERATURES))
    return {way: score_images(pipeline, prompts, SEED + 1, **way._asdict()) for way in ways}


def score_split(pipeline: Pipeline, split: str, settings: ImageDefaults) -> dict:
    """Score of every kind that the split has, and their mean, as GenEval's overall score."""
    by_kind = {}
    for kind in scenes.KINDS:
        if prompts := split_prompts(split, kind)[1]:
            score = score_images(pipeline, prompts, SEED, **settings._asdict())
            by_kind[kind] = dict(prompts=len(prompts), score=round(score, 4))
    mean = np.mean([entry["score"] for entry in by_kind.values()])
    shared = [by_kind[kind]["score"] for kind in by_kind if scenes.prompts("held_out", kind)]
    return dict(
        mean_of_kinds=round(float(mean), 4),
        mean_of_kinds_in_both_splits=round(float(np.mean(shared)), 4),
        kinds=by_kind,
    )


def score_answers(pipeline: Pipeline, split: str, seen: set[bytes]) -> dict:
    """Exact matches on questions about scenes that are not among the seen ones."""
    rng = np.random.default_rng((SEED, scenes.SPLITS.index(split)))
    images, questions, answers, skipped = [], [], [], 0
    while len(images) < QUESTIONS:
        scene = scenes.sample_any(rng, split)
        question, answer = sample_question(rng, scene)
        if digest(scene) in seen:
            skipped += 1
            continue
        images.append(scenes.draw(scene))
        check_reading(scene, images[-1])
        questions.append(question)
        answers.append(answer)
    given = ask_all(pipeline, questions, images)
    right = [a == b for a, b in zip(given, answers, strict=True)]
    by_question = collections.defaultdict(list)
    for question, good in zip(questions, right, strict=True):
        by_question[" ".join(question.split()[:3])].append(good)
    return dict(
        exact_match=round(float(np.mean(right)), 4),
        questions=len(right),
        skipped_as_seen=skipped,
        by_question={
            start: dict(questions=len(good), score=round(float(np.mean(good)), 4))
            for start, good in sorted(by_question.items())
        },
    )


def check_reading(scene: scenes.Scene, image: np.ndarray) -> None:
    """Raises ValueError unless the checker reads in the pixels what answers are taken from.

    That is the background, and the objects by shape, color and place, to READ_WITHIN pixels.
    """
    read = checker.detect(image)
    near = [
        any(
            (one.shape, one.color) == (item.shape, item.color)
            and max(abs(one.x - item.x), abs(one.y - item.y)) <= READ_WITHIN
            for one in read
        )
        for item in scene.objects
    ]
    ground = checker.background(image)
    if not all(near) or len(read) != len(scene.objects) or ground != scene.background:
        raise ValueError(f"the checker must read {scene}, got {read} on {ground}")


def ask_all(pipeline: Pipeline, questions: list[str], images: list[np.ndarray]) -> list[str]:
    """Greedy answers, without the space before them."""
    given = []
    for start in range(0, len(questions), ANSWER_BATCH):
        part = slice(start, start + ANSWER_BATCH)
        one_each = [[image] for image in images[part]]
        given += pipeline.answer(questions[part], one_each, max_new_tokens=32)
    return [answer.strip() for answer in given]


def training_scenes() -> set[bytes]:
    """Digests of every scene whose image the encoder or the decoder may have seen in training,
    made anew. The stages read the same scenes, and not all of them."""
    cfg = janus_tiny_encoder.get_config()
    shown = [
        scene
        for step in range(cfg.steps)
        for scene in sample_scenes(np.random.default_rng((cfg.seed, step)), cfg.batch_size)
    ]
    sources = open_parts(janus_tiny_stage3.get_config().mixture.to_dict(), open_source)
    for part in sources.leaves():
        if part.name != "text":  # which shows no images
            shown += map(part.source.scene, range(len(part.source)))
    return set(map(digest, shown))


def digest(scene: scenes.Scene) -> bytes:
    """Short name of a scene's image: that of the scene, in whatever order it was drawn."""
    name = f"{scene.background} {sorted(map(repr, scene.objects))}"
    return hashlib.blake2b(name.encode(), digest_size=12).digest()


def weights_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each weight file of a PyTorch folder: which model the record is of."""
    files = sorted(path for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def score(model: str | None, keep_drawing: bool) -> dict:
    """The whole record."""
    start = time.monotonic()
    pipeline = load(model, dtype="float32")
    seen = training_scenes()
    tried = {} if keep_drawing else try_drawing(pipeline)
    chosen = max(tried, key=tried.get) if tried else pipeline.image_defaults
    return dict(
        sha256=weights_digests(find_folder(model)),
        generation=dict(
            images_per_prompt=NUM_IMAGES,
            **chosen._asdict(),
            tuning_scores=[dict(**way._asdict(), score=round(tried[way], 4)) for way in tried],
            **{split: score_split(pipeline, split, chosen) for split in scenes.SPLITS},
        ),
        understanding={split: score_answers(pipeline, split, seen) for split in scenes.SPLITS},
        scenes_seen_in_training=len(seen),
        seed=SEED,
        seconds=round(time.monotonic() - start),
        machine=dict(
            devices=str(jax.devices()[0].device_kind),
            cores=os.cpu_count(),
            python=platform.python_version(),
            jax=jax.__version__,
        ),
    )


def main() -> None:
    """Prints the record, and writes it where --output says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="checkpoint folder (default: the one that ships)")
    parser.add_argument("--output", type=Path, help="JSON file for the record")
    drawing = parser.add_mutually_exclusive_group()
    write = "write the chosen guidance and temperature into the model's folder, as its own"
    drawing.add_argument("--set_drawing", action="store_true", help=write)
    keep = "draw with the model's own guidance and temperature, and try no others"
    drawing.add_argument("--keep_drawing", action="store_true", help=keep)
    flags = parser.parse_args()
    record = score(flags.model, flags.keep_drawing)
    if flags.set_drawing:
        chosen = {name: record["generation"][own] for own, name in GENERATION_KEYS.items()}
        write_json(Path(flags.model or TINY) / "generation_config.json", chosen)
    text = json.dumps(record, indent=1) + "\n"
    print(text, end="")
    if flags.output:
        flags.output.write_text(text)


if __name__ == "__main__":
    main()
