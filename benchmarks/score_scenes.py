"""Scores a model on rendered scenes: images generated from prompts, and questions about images.

    python -m benchmarks.score_scenes --output benchmarks/results/janus_tiny.json

Generated images are scored by janus_jax/shapes/checker.py, which reads pixels and shares no code
with the renderer. There are four images per prompt, as in GenEval. Guidance weight and temperature
are tuned on prompts that are not scored.

An answer must equal the expected answer exactly. Expected answers come from the rendered scene; the
checker must detect the same scene in the pixels. Questions are about scenes that neither the
understanding encoder nor the decoder saw in training. (The image tokenizer is not used to answer
questions.)
"""

import argparse
import collections
import functools
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
from janus_jax.data.mixture import open_parts
from janus_jax.data.sources import open_source
from janus_jax.generation.loading import GENERATION_KEYS, ImageDefaults
from janus_jax.generation.pipeline import Pipeline
from janus_jax.interop.folders import BUNDLED_FOLDER, find_folder
from janus_jax.paths import write_json
from janus_jax.shapes import checker, scenes
from janus_jax.shapes.batches import sample_scenes
from janus_jax.shapes.questions import sample_question
from janus_jax.shapes.source import ALL_FORMATS

GUIDANCE = (1.0, 1.5, 2.0, 3.0, 5.0)
TEMPERATURES = (1.0, 0.8, 0.6)
NUM_IMAGES = 4  # per prompt
TUNING_PROMPTS = 12  # at most per kind, and at most a quarter of the prompts of the kind
SCORED_PROMPTS = 60  # at most per kind
QUESTIONS = 1200
ANSWER_BATCH = 48
MAX_POSITION_ERROR = 1.0  # pixels, between the scene and the checker's detection
SEED = 2026  # for prompts, questions and images; training uses other seeds


def split_prompts(split: str, kind: str) -> tuple[list[scenes.Prompt], list[scenes.Prompt]]:
    """Returns disjoint lists: prompts for tuning guidance and temperature, and prompts to score."""
    prompts = scenes.prompts(split, kind)
    order = np.random.default_rng(SEED).permutation(len(prompts))
    cut = min(TUNING_PROMPTS, len(prompts) // 4)
    tuning = [prompts[i] for i in order[:cut]]
    return tuning, [prompts[i] for i in order[cut : cut + SCORED_PROMPTS]]


def score_images(
    pipeline: Pipeline, prompts: list[scenes.Prompt], seed: int, **settings: float
) -> float:
    """Generates NUM_IMAGES images per prompt and returns the fraction that satisfies the prompts.

    settings: guidance_weight and temperature (default: the settings of the checkpoint).
    """
    texts = [p.text for p in prompts]
    generated = pipeline.generate_images(texts, NUM_IMAGES, seed, **settings, max_batch=64)
    requirements = [p.requirement for p in prompts for _ in range(NUM_IMAGES)]
    pairs = zip(requirements, map(checker.detect, generated.pixels), strict=True)
    return float(np.mean([checker.satisfies(*pair) for pair in pairs]))


def tune(pipeline: Pipeline) -> dict[ImageDefaults, float]:
    """Returns the score of each (guidance weight, temperature) on the tuning prompts of "train"."""
    prompts = [p for kind in scenes.CAPTION_KINDS for p in split_prompts("train", kind)[0]]
    settings = itertools.starmap(ImageDefaults, itertools.product(GUIDANCE, TEMPERATURES))
    return {one: score_images(pipeline, prompts, SEED + 1, **one._asdict()) for one in settings}


def score_split(pipeline: Pipeline, split: str, settings: ImageDefaults) -> dict:
    """Returns the score of each kind with prompts in the split, and their mean as in GenEval."""
    by_kind = {}
    for kind in scenes.CAPTION_KINDS:
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
    """Returns the fraction of exactly matching answers, in total and by the start of the question.

    seen: digests of scenes to skip.
    """
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
    model_answers = ask_all(pipeline, questions, images)
    correct = [a == b for a, b in zip(model_answers, answers, strict=True)]
    by_question = collections.defaultdict(list)
    for question, matches in zip(questions, correct, strict=True):
        by_question[" ".join(question.split()[:3])].append(matches)
    return dict(
        exact_match=round(float(np.mean(correct)), 4),
        questions=len(correct),
        skipped_as_seen=skipped,
        by_question={
            start: dict(questions=len(matches), score=round(float(np.mean(matches)), 4))
            for start, matches in sorted(by_question.items())
        },
    )


def check_reading(scene: scenes.Scene, image: np.ndarray) -> None:
    """Checks that the checker detects in the image the scene from which answers are taken.

    The background must be the same, and each object must be detected with its shape and color,
    within MAX_POSITION_ERROR of its position.

    Raises:
        ValueError: the checker detects another scene.
    """
    detections = checker.detect(image)
    detected = [
        any(
            (one.shape, one.color) == (item.shape, item.color)
            and max(abs(one.x - item.x), abs(one.y - item.y)) <= MAX_POSITION_ERROR
            for one in detections
        )
        for item in scene.objects
    ]
    background = checker.background(image)
    same_objects = all(detected) and len(detections) == len(scene.objects)
    if not same_objects or background != scene.background:
        raise ValueError(f"the checker must detect {scene}, got {detections} on {background}")


def ask_all(pipeline: Pipeline, questions: list[str], images: list[np.ndarray]) -> list[str]:
    """Returns the greedy answers, without the leading space."""
    answers = []
    for start in range(0, len(questions), ANSWER_BATCH):
        part = slice(start, start + ANSWER_BATCH)
        image_lists = [[image] for image in images[part]]
        answers += pipeline.answer(questions[part], image_lists, max_new_tokens=32)
    return [answer.strip() for answer in answers]


def training_scenes() -> set[bytes]:
    """Returns the digests of all scenes whose images the encoder or the decoder may have seen.

    The scenes are generated again from the configs. All stages read the scenes of these sources,
    and not necessarily all of them.
    """
    cfg = janus_tiny_encoder.get_config()
    seen = [
        scene
        for step in range(cfg.steps)
        for scene in sample_scenes(np.random.default_rng((cfg.seed, step)), cfg.batch_size)
    ]
    open_any = functools.partial(open_source, formats=ALL_FORMATS)
    sources = open_parts(janus_tiny_stage3.get_config().mixture.to_dict(), open_any)
    for part in sources.leaves():
        if part.name != "text":  # text records have no images
            seen += map(part.source.scene, range(len(part.source)))
    return set(map(digest, seen))


def digest(scene: scenes.Scene) -> bytes:
    """Returns a digest of the background and the objects of a scene; the order does not matter."""
    text = f"{scene.background} {sorted(map(repr, scene.objects))}"
    return hashlib.blake2b(text.encode(), digest_size=12).digest()


def weights_digests(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of each weight file in a PyTorch folder, to identify the scored model."""
    files = sorted(path for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def score(model: str | None, keep_settings: bool) -> dict:
    """Returns the complete record.

    model: checkpoint folder, or None for the shipped one.
    keep_settings: use the guidance weight and temperature of the model instead of tuning them.
    """
    start = time.monotonic()
    pipeline = load(model, dtype="float32")
    seen = training_scenes()
    scores = {} if keep_settings else tune(pipeline)
    chosen = max(scores, key=scores.get) if scores else pipeline.image_defaults
    return dict(
        sha256=weights_digests(find_folder(model)),
        generation=dict(
            images_per_prompt=NUM_IMAGES,
            **chosen._asdict(),
            tuning_scores=[dict(**one._asdict(), score=round(scores[one], 4)) for one in scores],
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
    """Runs the command: prints the record and writes it to the file given by --output."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="checkpoint folder (default: the shipped model)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    group = parser.add_mutually_exclusive_group()
    write = "save the tuned guidance and temperature in the model's generation_config.json"
    group.add_argument("--set_drawing", action="store_true", help=write)
    keep = "use the model's own guidance and temperature instead of tuning them"
    group.add_argument("--keep_drawing", action="store_true", help=keep)
    flags = parser.parse_args()
    record = score(flags.model, flags.keep_drawing)
    if flags.set_drawing:
        chosen = {name: record["generation"][own] for own, name in GENERATION_KEYS.items()}
        write_json(Path(flags.model or BUNDLED_FOLDER) / "generation_config.json", chosen)
    text = json.dumps(record, indent=1) + "\n"
    print(text, end="")
    if flags.output:
        flags.output.write_text(text)


if __name__ == "__main__":
    main()
