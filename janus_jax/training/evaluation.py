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

from janus_jax.data.skipped import Skipped
from janus_jax.generation.loading import ImageDefaults
from janus_jax.generation.pipeline import Pipeline
from janus_jax.interop.load import DTYPES, abstract, component_paths, load_params
from janus_jax.paths import write_file
from janus_jax.processing.images import encode_png, load_image
from janus_jax.sharding import sharding_for
from janus_jax.training.metrics import Log
from janus_jax.training.parameters import Parameters
from janus_jax.training.program import Program
from janus_jax.training.settings import Inputs
from janus_jax.training.step import Params, TrainState, compiler_options, eval_params

MAX_ANSWER_TOKENS = 256

Callback = Callable[[int, TrainState], None]  # step, state


def held_out_rows(inputs: Inputs, output: Path) -> tuple[grain.IterDataset, Skipped]:
    """Returns the rows of `eval_mixture` and their skipped records (data/loading.py).

    The skipped records are listed in OUTPUT/eval.
    Raises ValueError or FileNotFoundError if the mixture cannot be opened.
    """
    return inputs.open_rows(output / "eval", inputs.settings.eval_mixture.to_dict())


def evaluation_callback(
    program: Program, frozen: Params, log: Log, rows: grain.IterDataset, skipped: Skipped
) -> Callback:
    """Returns a callback that logs the mean of each term of the loss as eval/TERM.

    It evaluates the first `eval_batches` batches of `rows`, the same ones every time, and also
    logs the numbers of skipped records.
    """
    inputs = program.inputs
    options = compiler_options(inputs.mesh.devices.flatten())
    compute_terms = jax.jit(program.objective.totals, compiler_options=options)

    def evaluate(step: int, state: TrainState) -> None:
        batch_terms, params = [], eval_params(state)
        with contextlib.closing(iter(rows)) as iterator:
            for batch in itertools.islice(iterator, inputs.settings.eval_batches):
                terms = compute_terms(params, frozen, program.put_rows(frozen, batch))
                batch_terms.append(jax.tree.map(float, jax.device_get(terms)))
        sums = jax.tree.map(lambda *values: sum(values), *batch_terms)
        means = {name: total / count for name, (total, count) in sums.items() if count}
        log.scalars(step, means, "eval")
        log.skipped(step, skipped.counts, "eval/skipped")

    return evaluate


def prompt_images(inputs: Inputs) -> list[list[Image.Image]]:
    """Loads the image of each of `questions`, and checks all prompts and questions.

    Raises FileNotFoundError or ValueError if an image cannot be read, or if the model cannot
    process a prompt or a question.
    """
    settings = inputs.settings
    images = [[load_image(image)] for image, _ in settings.questions]
    model = nnx.merge(*abstract(inputs.model_cfg))
    janus = Pipeline(model, inputs.processor, "", ImageDefaults())
    for prompt in settings.prompts:
        janus.image_prompt(prompt)
    janus.examples([question for _, question in settings.questions], images, MAX_ANSWER_TOKENS)
    return images


def sampling_callback(program: Program, frozen: Params, log: Log, output: Path) -> Callback:
    """Returns a callback that generates images of `prompts` and answers `questions`.

    It writes prompt-0.png, ... and answers.txt to OUTPUT/samples/STEP, and logs both to
    TensorBoard. It always uses the seed of the run.
    Raises FileNotFoundError or ValueError as prompt_images does.
    """
    inputs = program.inputs
    settings, source, images = inputs.settings, inputs.source, prompt_images(inputs)
    questions, dtype = [question for _, question in settings.questions], DTYPES[settings.dtype]
    # no gradients are needed, and remat writes to the model, which is not allowed inside loops
    plain = dataclasses.replace(inputs, model_cfg=inputs.model_cfg.with_remat("none"))
    parameters = Parameters(plain, can_loop=False)
    image_defaults = ImageDefaults.from_dir(source.path)
    if inputs.rows.tokenized:  # the training step does not load the image tokenizer
        paths = component_paths(source.cfg, source.family.image_codec)
        sharding = sharding_for(inputs.mesh, source.family.parameter_table)
        frozen = frozen | load_params(source, dtype, sharding, paths)

    def sample(step: int, state: TrainState) -> None:
        params = {path: array.astype(dtype) for path, array in eval_params(state).items()}
        model = parameters.build(params | program.parameters.unstack(frozen))
        janus = Pipeline(model, inputs.processor, output.name, image_defaults, inputs.mesh)
        folder = output / "samples" / f"{step:07d}"
        if settings.prompts:
            prompts = list(settings.prompts)
            pixels = janus.generate_images(prompts, seed=settings.seed).pixels
            for number, image in enumerate(pixels):
                write_on_process_0(folder / f"prompt-{number}.png", encode_png(image))
            log.images(step, "prompts", pixels)
        if settings.questions:
            answers = janus.answer(questions, images, MAX_ANSWER_TOKENS)
            lines = [
                f"{path}: {question} -> {answer}\n"
                for (path, question), answer in zip(settings.questions, answers, strict=True)
            ]
            text = "".join(lines)
            write_on_process_0(folder / "answers.txt", text.encode())
            log.text(step, "answers", text)

    return sample


def write_on_process_0(path: Path, content: bytes) -> None:
    """Writes a file on process 0."""
    if jax.process_index() == 0:
        write_file(path, content)
