"""Scores a model on drawn scenes: pictures of prompts, and questions about pictures.

    python -m benchmarks.score_scenes --output benchmarks/results/janus_tiny.json

Pictures are judged by janus_jax/data/checker.py, which reads pixels and shares no code with the
drawing; four pictures a prompt, as in GenEval. The guidance weight is chosen on prompts that do not
count. Answers must equal the expected ones to the letter; questions are about scenes that neither
the understanding encoder nor the decoder saw in training (the image tokenizer takes no part in
answering).
"""

import argparse
import collections
import hashlib
import importlib
import json
import os
import platform
import time
from pathlib import Path

import jax
import numpy as np

from janus_jax import load
from janus_jax.data import checker, scenes
from janus_jax.data.questions import sample_question
from janus_jax.data.scene_batches import any_scene, step_scenes
from janus_jax.generation.pipeline import Pipeline

GUIDANCE = (1.0, 1.5, 2.0, 3.0, 5.0)
NUM_IMAGES = 4  # a prompt
TUNING_PROMPTS = 12  # a kind at most, and at most a quarter of the kind's prompts
SCORED_PROMPTS = 60  # a kind at most
QUESTIONS = 1200
ANSWER_BATCH = 48
# configs that show the model whole pictures
TRAINED_BY = ("janus_tiny_encoder", "janus_tiny_decoder", "janus_tiny")
SEED = 2026  # of prompts, questions and pictures; training has its own


def split_prompts(split: str, kind: str) -> tuple[list[scenes.Prompt], list[scenes.Prompt]]:
    """Prompts to choose the guidance weight on and, apart from them, prompts to score."""
    prompts = scenes.prompts(split, kind)
    order = np.random.default_rng(SEED).permutation(len(prompts))
    cut = min(TUNING_PROMPTS, len(prompts) // 4)
    tuning = [prompts[i] for i in order[:cut]]
    return tuning, [prompts[i] for i in order[cut : cut + SCORED_PROMPTS]]


def score_pictures(
    pipeline: Pipeline, prompts: list[scenes.Prompt], guidance_weight: float, seed: int
) -> float:
    """Part of the pictures of the prompts that show what is asked for, and nothing else."""
    drawn = pipeline.generate_images(
        [p.text for p in prompts], NUM_IMAGES, seed, guidance_weight, max_batch=64
    )
    wanted = [p.requirement for p in prompts for _ in range(NUM_IMAGES)]
    found = [checker.detect(picture) for picture in drawn.pixels]
    return float(np.mean([checker.satisfies(*pair) for pair in zip(wanted, found, strict=True)]))


def choose_guidance(pipeline: Pipeline) -> dict[float, float]:
    """Score of each weight on the tuning prompts of training compositions."""
    prompts = [p for kind in scenes.KINDS for p in split_prompts("train", kind)[0]]
    return {weight: score_pictures(pipeline, prompts, weight, SEED + 1) for weight in GUIDANCE}


def score_split(pipeline: Pipeline, split: str, guidance_weight: float) -> dict:
    """Score of every kind that the split has, and their mean, as GenEval's overall score."""
    by_kind = {}
    for kind in scenes.KINDS:
        if prompts := split_prompts(split, kind)[1]:
            score = score_pictures(pipeline, prompts, guidance_weight, SEED)
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
    pictures, questions, answers, skipped = [], [], [], 0
    while len(pictures) < QUESTIONS:
        scene = any_scene(rng, split)
        question, answer = sample_question(rng, scene)
        if digest(scene) in seen:
            skipped += 1
            continue
        pictures.append(scenes.draw(scene))
        questions.append(question)
        answers.append(answer)
    given = ask_all(pipeline, questions, pictures)
    right = [a == b for a, b in zip(given, answers, strict=True)]
    by_question = collections.defaultdict(list)
    for question, good in zip(questions, right, strict=True):
        by_question[" ".join(question.split()[:3])].append(good)
    return dict(
        exact_match=round(float(np.mean(right)), 4),
        questions=len(right),
        left_out_as_seen=skipped,
        by_question={
            start: dict(questions=len(good), score=round(float(np.mean(good)), 4))
            for start, good in sorted(by_question.items())
        },
    )


def ask_all(pipeline: Pipeline, questions: list[str], pictures: list[np.ndarray]) -> list[str]:
    """Greedy answers, without the space before them."""
    given = []
    for start in range(0, len(questions), ANSWER_BATCH):
        part = slice(start, start + ANSWER_BATCH)
        images = [[picture] for picture in pictures[part]]
        given += pipeline.answer(questions[part], images, max_new_tokens=32)
    return [answer.strip() for answer in given]


def training_scenes() -> set[bytes]:
    """Digests of every scene that the encoder and the decoder saw in training, made anew."""
    seen = set()
    for name in TRAINED_BY:
        cfg = importlib.import_module(f"configs.{name}").get_config()
        for step in range(cfg.steps):
            seen.update(map(digest, step_scenes(cfg, step)))
    return seen


def digest(scene: scenes.Scene) -> bytes:
    """Short name of a scene's picture: that of the scene, in whatever order it was drawn."""
    name = f"{scene.background} {sorted(map(repr, scene.objects))}"
    return hashlib.blake2b(name.encode(), digest_size=12).digest()


def score(model: str | None) -> dict:
    """The whole record."""
    start = time.monotonic()
    pipeline = load(model, dtype="float32")
    seen = training_scenes()
    by_weight = choose_guidance(pipeline)
    weight = max(by_weight, key=by_weight.get)
    return dict(
        generation=dict(
            images_per_prompt=NUM_IMAGES,
            guidance_weight=weight,
            tuning_scores={str(key): round(value, 4) for key, value in by_weight.items()},
            **{split: score_split(pipeline, split, weight) for split in scenes.SPLITS},
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
    flags = parser.parse_args()
    text = json.dumps(score(flags.model), indent=1) + "\n"
    print(text, end="")
    if flags.output:
        flags.output.write_text(text)


if __name__ == "__main__":
    main()
