"""The dry run: report parameters and memory, and write the first rows, without training."""

import collections
import contextlib
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from janus_jax.aot.training import compile_step, held_bytes
from janus_jax.data.packing import efficiency
from janus_jax.data.sources import FORMATS, Formats
from janus_jax.families.family import ParameterTable
from janus_jax.generation.codec import decode_batch
from janus_jax.interop.load import load_component
from janus_jax.paths import write_file
from janus_jax.processing.images import encode_png
from janus_jax.processing.processor import Processor
from janus_jax.training.distributed import check_processes
from janus_jax.training.evaluation import held_out_rows, prompt_images
from janus_jax.training.parameters import Shapes
from janus_jax.training.program import Program
from janus_jax.training.settings import Inputs

MAX_WRITTEN_ROWS = 4


def dry_run(settings, formats: Formats = FORMATS) -> Iterator[str]:
    """Yields lines to print, and writes the first rows of the run to OUTPUT/dry_run.

    It loads no weights, except for the image tokenizer if the images to generate are stored as
    indices.

    settings: ConfigDict of stages.base_config.
    formats: the source formats that a mixture may use, by name.
    Raises as train_stage does.
    """
    program = Program.from_settings(settings, formats)
    inputs = program.inputs
    check_processes(inputs.mesh)
    folder = Path(settings.output) / "dry_run" / f"host-{jax.process_index()}"
    parameters = program.parameters
    yield f"trainable: {_param_counts(parameters.trained, parameters.table)}"
    yield f"frozen: {_param_counts(parameters.frozen, parameters.table)}"
    _remove_old_files(folder)
    if settings.eval_every:
        held_out_rows(inputs, folder)
    if settings.sample_every:
        prompt_images(inputs)
    rows, skipped = inputs.open_rows(folder)
    with contextlib.closing(iter(rows)) as iterator:
        batch = next(iterator)
    yield from _memory(program)
    filled, number = efficiency(batch["segment_ids"]), len(batch["tokens"])
    yield f"first batch: {number} rows on this host, {filled:.1%} of the positions filled"
    if skipped.counts:
        yield f"skipped records: {skipped.counts}"
    written = min(MAX_WRITTEN_ROWS, number)
    codec = inputs.source.family.image_codec
    vq = load_component(inputs.source, codec) if inputs.rows.tokenized else None
    for number in range(written):
        row = {name: values[number] for name, values in batch.items()}
        _write_row(inputs, row, vq, folder / f"row-{number}")
    yield f"the first {written} rows are in {folder}; prediction targets are in [[ ]]"


def print_dry_run(settings, formats: Formats = FORMATS) -> None:
    """Prints the lines of dry_run."""
    for line in dry_run(settings, formats):
        print(line, flush=True)


def _param_counts(shapes: Shapes, table: ParameterTable) -> str:
    """Returns the number of parameters, in total and by module."""
    counts: collections.Counter[str] = collections.Counter()
    for path, leaf in shapes.items():
        counts[table.find(path).component] += leaf.size
    parts = ", ".join(f"{part} {count:,}" for part, count in sorted(counts.items()))
    return f"{counts.total():,} parameters ({parts})" if counts else "0 parameters"


def _memory(program: Program) -> Iterator[str]:
    """Yields the size of the arrays on each device and the temporary memory of a step."""
    sizes = held_bytes(program)
    parts = ", ".join(f"{name} {size / 1e9:.3f}" for name, size in sizes.items())
    yield f"arrays on each device: {sum(sizes.values()) / 1e9:.3f} GB ({parts})"
    device = program.inputs.mesh.devices.flat[0].device_kind
    temporary = max(part.temporaries + part.outputs for part in compile_step(program))
    yield f"temporary memory of a step: {temporary / 1e9:.3f} GB, as XLA plans it for {device}"


def _remove_old_files(folder: Path) -> None:
    """Removes the files of an earlier dry run, and no others."""
    rows = ("examples.txt", "input-*.png", "generated-*.png")
    for pattern in ("skipped-*.jsonl", *(f"row-*/{name}" for name in rows)):
        for path in folder.glob(pattern):
            path.unlink()
    for row in folder.glob("row-*"):
        if not any(row.iterdir()):
            row.rmdir()


def _write_row(
    inputs: Inputs, row: Mapping[str, np.ndarray], vq: nnx.Module | None, folder: Path
) -> None:
    """Writes examples.txt, and the images in the order of the row: input-0.png, generated-0.png."""
    text = "\n\n".join(row_texts(row, inputs.processor))
    write_file(folder / "examples.txt", f"{text}\n".encode())
    sizes = inputs.source.sizes
    num_inputs = int(row["image_mask"].sum()) // sizes.input_image_tokens
    generated = row["generated"][: int(row["gen_mask"].sum()) // sizes.generated_image_tokens]
    if vq is not None and len(generated):
        generated = np.asarray(decode_batch(vq, generated).pixels)
    images_by_name = dict(input=row["pixels"][:num_inputs], generated=generated)
    for name, images in images_by_name.items():
        for number, image in enumerate(images):
            write_file(folder / f"{name}-{number}.png", encode_png(image))


def row_texts(row: Mapping[str, np.ndarray], processor: Processor) -> Iterator[str]:
    """Yields the examples of a row as text.

    Prediction targets are in [[ ]]. Images are written as <input image> and <generated image>.
    """
    kinds = row["loss_mask"] + 2 * row["image_mask"] + 4 * row["gen_mask"]
    formats = {0: "{}", 1: "[[{}]]", 2: "<input image>", 4: "[[<generated image>]]"}
    for segment in range(1, int(row["segment_ids"].max()) + 1):
        (positions,) = np.nonzero(row["segment_ids"] == segment)
        runs = itertools.groupby(positions, key=lambda position: int(kinds[position]))
        yield "".join(
            formats[kind].format(
                processor.tokenizer.decode(row["tokens"][list(run)].tolist(), skip_special=False)
            )
            for kind, run in runs
        )
