"""Periodic evaluation: losses on held-out records, generated images and answers."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import grain
import jax
from flax import nnx
from PIL import Image

from janus_jax.data.loading import open_rows
from janus_jax.data.skipped import Skipped
from janus_jax.generation.loading import ImageDefaults
from janus_jax.generation.pipeline import Pipeline
from janus_jax.interop.load import load_params, param_shapes
from janus_jax.paths import write_file
from janus_jax.processing.images import encode_png, load_image
from janus_jax.sharding import sharding_for
from janus_jax.training.metrics import Log
from janus_jax.training.setup import DTYPES, Setup, put_rows
from janus_jax.training.state import TrainState, eval_params
from janus_jax.training.step import Params

MAX_ANSWER_TOKENS = 256

Callback = Callable[[int, TrainState], None]  # step, state


def held_out_rows(setup: Setup, output: Path) -> tuple[grain.IterDataset, Skipped]:
    """Returns the rows of cfg.eval_mixture and their skipped records (data/loading.py).

    The skipped records are listed in OUTPUT/eval.
    Raises ValueError or FileNotFoundError if the mixture cannot be opened.
    """
    rows_cfg = dataclasses.replace(setup.rows, mixture=setup.cfg.eval_mixture.to_dict())
    hosts = jax.process_index(), jax.process_count()
    cfg, folder = setup.source.cfg, output / "eval"
    return open_rows(rows_cfg, setup.processor, cfg, folder, *hosts, formats=setup.formats)


def evaluation_callback(
    setup: Setup, frozen: Params, log: Log, rows: grain.IterDataset, skipped: Skipped
) -> Callback:
    """Returns a callback that logs the mean of each term of the loss as eval/TERM.

    It evaluates the first cfg.eval_batches batches of `rows`, the same ones every time, and also
    logs the numbers of skipped records.
    """
    cfg, compute_terms = setup.cfg, jax.jit(setup.objective().totals)

    def evaluate(step: int, state: TrainState) -> None:
        batch_terms, params = [], eval_params(state)
        with contextlib.closing(iter(rows)) as iterator:
            for batch in itertools.islice(iterator, cfg.eval_batches):
                terms = compute_terms(params, frozen, put_rows(batch, setup.mesh))
                batch_terms.append(jax.tree.map(float, jax.device_get(terms)))
        sums = jax.tree.map(lambda *values: sum(values), *batch_terms)
        means = {name: total / count for name, (total, count) in sums.items() if count}
        log.scalars(step, means, "eval")
        log.skipped(step, skipped.counts, "eval/skipped")

    return evaluate


def prompt_images(setup: Setup) -> list[list[Image.Image]]:
    """Loads the image of each of cfg.questions, and checks all prompts and questions.

    Raises FileNotFoundError or ValueError if an image cannot be read, or if the model cannot
    process a prompt or a question.
    """
    cfg = setup.cfg
    images = [[load_image(image)] for image, _ in cfg.questions]
    model = nnx.merge(*setup.model)  # abstract
    janus = Pipeline(model, setup.processor, "", ImageDefaults())
    for prompt in cfg.prompts:
        janus.image_prompt(prompt)
    janus.examples([question for _, question in cfg.questions], images, MAX_ANSWER_TOKENS)
    return images


def sampling_callback(setup: Setup, frozen: Params, log: Log, output: Path) -> Callback:
    """Returns a callback that generates images of cfg.prompts and answers cfg.questions.

    It writes prompt-0.png, ... and answers.txt to OUTPUT/samples/STEP, and logs both to
    TensorBoard. It always uses the seed of the config.
    Raises FileNotFoundError or ValueError as prompt_images does.
    """
    cfg, sharding, images = setup.cfg, sharding_for(setup.mesh), prompt_images(setup)
    questions = [question for _, question in cfg.questions]
    # no gradients are needed, and remat writes to the model, which is not allowed inside loops
    plain = dataclasses.replace(setup, model_cfg=setup.model_cfg.with_remat("none"))
    make, image_defaults = plain.build(), ImageDefaults.from_dir(setup.source.path)
    dtype = DTYPES[cfg.dtype]
    if setup.rows.tokenized:  # the training step does not load the image tokenizer
        paths = [path for path in param_shapes(setup.source.cfg) if path.startswith("gen_vq.")]
        folder = setup.source.path
        frozen = frozen | load_params(folder, setup.source.cfg, sharding, dtype, paths=paths)

    def sample(step: int, state: TrainState) -> None:
        params = {path: array.astype(dtype) for path, array in eval_params(state).items()}
        model = make(params | frozen)
        janus = Pipeline(model, setup.processor, output.name, image_defaults, setup.mesh)
        folder = output / "samples" / f"{step:07d}"
        if cfg.prompts:
            pixels = janus.generate_images(list(cfg.prompts), seed=cfg.seed).pixels
            for number, image in enumerate(pixels):
                write(folder / f"prompt-{number}.png", encode_png(image))
            log.images(step, "prompts", pixels)
        if cfg.questions:
            answers = janus.answer(questions, images, MAX_ANSWER_TOKENS)
            lines = [
                f"{path}: {question} -> {answer}\n"
                for (path, question), answer in zip(cfg.questions, answers, strict=True)
            ]
            text = "".join(lines)
            write(folder / "answers.txt", text.encode())
            log.text(step, "answers", text)

    return sample


def write(path: Path, content: bytes) -> None:
    """Writes a file on process 0."""
    if jax.process_index() == 0:
        write_file(path, content)
