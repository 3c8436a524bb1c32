"""What a run is asked at intervals: its losses on held-out records, images and answers."""

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
from janus_jax.training.state import TrainState, written_params
from janus_jax.training.step import Params

LONGEST_ANSWER = 256  # tokens

Watch = Callable[[int, TrainState], None]  # step, state


def held_out_rows(setup: Setup, output: Path) -> tuple[grain.IterDataset, Skipped]:
    """Rows of cfg.eval_mixture, and what is left out of them (data/loading.py), listed in
    OUTPUT/eval.

    Raises ValueError or FileNotFoundError for a mixture that cannot be opened.
    """
    rows_cfg = dataclasses.replace(setup.rows, mixture=setup.cfg.eval_mixture.to_dict())
    hosts = jax.process_index(), jax.process_count()
    return open_rows(rows_cfg, setup.processor, setup.source.cfg, output / "eval", *hosts)


def evaluation(
    setup: Setup, frozen: Params, log: Log, rows: grain.IterDataset, skipped: Skipped
) -> Watch:
    """Reports eval/KIND, the mean loss of each kind on the rows of the first cfg.eval_batches
    steps, and what was left out of them; they are the same rows each time."""
    cfg, losses = setup.cfg, jax.jit(setup.objective().totals)

    def evaluate(step: int, state: TrainState) -> None:
        found, params = [], written_params(state)
        with contextlib.closing(iter(rows)) as iterator:
            for batch in itertools.islice(iterator, cfg.eval_batches):
                parts = losses(params, frozen, put_rows(batch, setup.mesh))
                found.append(jax.tree.map(float, jax.device_get(parts)))
        sums = jax.tree.map(lambda *parts: sum(parts), *found)
        means = {kind: total / count for kind, (total, count) in sums.items() if count}
        log.scalars(step, means, "eval")
        log.skipped(step, skipped.counts, "eval/skipped")

    return evaluate


def prompt_images(setup: Setup) -> list[list[Image.Image]]:
    """Those of each of cfg.questions.

    Raises FileNotFoundError or ValueError for an image that cannot be read, and for a prompt or a
    question that the model could not take.
    """
    cfg = setup.cfg
    images = [[load_image(image)] for image, _ in cfg.questions]
    model = nnx.merge(*setup.model)  # without values
    janus = Pipeline(model, setup.processor, "", ImageDefaults())
    for prompt in cfg.prompts:
        janus.image_prompt(prompt)
    janus.examples([question for _, question in cfg.questions], images, LONGEST_ANSWER)
    return images


def samples(setup: Setup, frozen: Params, log: Log, output: Path) -> Watch:
    """Draws cfg.prompts and answers cfg.questions, pairs of an image's path and a text.

    They go to OUTPUT/samples/STEP, prompt-0.png ... and answers.txt, and to TensorBoard. With the
    model as it is at that step, always with the seed of the config.
    Raises FileNotFoundError or ValueError as prompt_images.
    """
    cfg, sharding, images = setup.cfg, sharding_for(setup.mesh), prompt_images(setup)
    asked = [question for _, question in cfg.questions]
    # nothing is differentiated here, and remat writes to the model, which loops do not allow
    plain = dataclasses.replace(setup, model_cfg=setup.model_cfg.with_remat("none"))
    make, image_defaults = plain.build(), ImageDefaults.from_dir(setup.source.path)
    dtype = DTYPES[cfg.dtype]
    if setup.rows.tokenized:  # the steps do without the image tokenizer
        paths = [path for path in param_shapes(setup.source.cfg) if path.startswith("gen_vq.")]
        folder = setup.source.path
        frozen = frozen | load_params(folder, setup.source.cfg, sharding, dtype, paths=paths)

    def sample(step: int, state: TrainState) -> None:
        params = {path: array.astype(dtype) for path, array in written_params(state).items()}
        model = make(params | frozen)
        janus = Pipeline(model, setup.processor, output.name, image_defaults, setup.mesh)
        folder = output / "samples" / f"{step:07d}"
        if cfg.prompts:
            pixels = janus.generate_images(list(cfg.prompts), seed=cfg.seed).pixels
            for number, image in enumerate(pixels):
                write(folder / f"prompt-{number}.png", encode_png(image))
            log.images(step, "prompts", pixels)
        if cfg.questions:
            answers = janus.answer(asked, images, LONGEST_ANSWER)
            pairs = zip(cfg.questions, answers, strict=True)
            text = "".join(f"{path}: {ask} -> {said}\n" for (path, ask), said in pairs)
            write(folder / "answers.txt", text.encode())
            log.text(step, "answers", text)

    return sample


def write(path: Path, content: bytes) -> None:
    """Process 0 does."""
    if jax.process_index() == 0:
        write_file(path, content)
