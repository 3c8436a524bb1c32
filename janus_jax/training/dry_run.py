"""What a run would do, without doing it: parameters, memory, and what it would learn from first."""

import collections
import contextlib
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from janus_jax.data.loading import open_rows
from janus_jax.data.packing import efficiency
from janus_jax.interop.load import load_vq
from janus_jax.models.vq import VQ
from janus_jax.paths import write_file
from janus_jax.processing.images import encode_png
from janus_jax.processing.processor import Processor
from janus_jax.training.distributed import check_processes
from janus_jax.training.evaluation import held_out_rows, prompt_images
from janus_jax.training.memory import held, step_bytes
from janus_jax.training.setup import Setup, Shapes

SHOWN_ROWS = 4

Row = Mapping[str, np.ndarray]


def dry_run(cfg) -> Iterator[str]:
    """Lines to print; writes the first rows of the run to OUTPUT/dry_run, texts and images.

    cfg: ConfigDict of stages.base_config. Nothing is trained, and no weights are read but the image
    tokenizer's where images to be generated come as indices.
    Raises as train_stage does.
    """
    setup = Setup.from_config(cfg)
    check_processes(setup.mesh)
    folder = Path(cfg.output) / "dry_run" / f"host-{jax.process_index()}"
    trained, frozen = setup.shapes
    yield f"trained: {_numbers(trained)}"
    yield f"frozen: {_numbers(frozen)}"
    hosts = jax.process_index(), jax.process_count()
    _empty(folder)
    if cfg.eval_every:
        held_out_rows(setup, folder)
    if cfg.sample_every:
        prompt_images(setup)
    rows, skipped = open_rows(setup.rows, setup.processor, setup.source.cfg, folder, *hosts)
    with contextlib.closing(iter(rows)) as iterator:
        batch = next(iterator)
    yield from _memory(setup)
    full, number = efficiency(batch["segment_ids"]), len(batch["tokens"])
    yield f"first step: {number} rows on this host, {full:.1%} of their places filled"
    if skipped.counts:
        yield f"left out so far: {skipped.counts}"
    shown = min(SHOWN_ROWS, number)
    vq = load_vq(setup.source) if setup.rows.tokenized else None
    for number in range(shown):
        row = {name: values[number] for name, values in batch.items()}
        _write_row(setup, row, vq, folder / f"row-{number}")
    yield f"the first {shown} of them are in {folder}, what is to be predicted in [[ ]]"


def print_dry_run(cfg) -> None:
    """Prints the lines of dry_run as they come."""
    for line in dry_run(cfg):
        print(line, flush=True)


def _numbers(shapes: Shapes) -> str:
    """How many in all, and by part of the model."""
    counts: collections.Counter[str] = collections.Counter()
    for path, leaf in shapes.items():
        counts[path.split(".")[0]] += leaf.size
    parts = ", ".join(f"{part} {count:,}" for part, count in sorted(counts.items()))
    return f"{counts.total():,} parameters ({parts})" if counts else "0 parameters"


def _memory(setup: Setup) -> Iterator[str]:
    """What lies on each device during a step, and what XLA plans for it."""
    sizes = held(setup)
    parts = ", ".join(f"{name} {size / 1e9:.3f}" for name, size in sizes.items())
    yield f"held by each device: {sum(sizes.values()) / 1e9:.3f} GB ({parts})"
    device, more = setup.mesh.devices.flat[0].device_kind, step_bytes(setup)
    yield f"a step takes {more / 1e9:.3f} GB more on each, as XLA plans it for {device}"


def _empty(folder: Path) -> None:
    """Removes what a dry run before wrote, and nothing else."""
    rows = ("examples.txt", "seen-*.png", "generated-*.png")
    for pattern in ("skipped-*.jsonl", *(f"row-*/{name}" for name in rows)):
        for path in folder.glob(pattern):
            path.unlink()
    for row in folder.glob("row-*"):
        if not any(row.iterdir()):
            row.rmdir()


def _write_row(setup: Setup, row: Row, vq: VQ | None, folder: Path) -> None:
    """examples.txt, and images in the order of their places: seen-0.png, generated-0.png ..."""
    text = "\n\n".join(row_texts(row, setup.processor))
    write_file(folder / "examples.txt", f"{text}\n".encode())
    cfg = setup.source.cfg
    seen = int(row["image_mask"].sum()) // cfg.und_encoder.num_tokens
    generated = row["generated"][: int(row["gen_mask"].sum()) // cfg.num_image_tokens]
    if vq is not None and len(generated):
        pixels = np.asarray(vq.decode(generated))
        generated = (np.clip(pixels / 2 + 0.5, 0, 1) * 255).astype(np.uint8)
    for name, images in dict(seen=row["pixels"][:seen], generated=generated).items():
        for number, image in enumerate(images):
            write_file(folder / f"{name}-{number}.png", encode_png(image))


def row_texts(row: Row, processor: Processor) -> Iterator[str]:
    """The examples of a row as text: what is to be predicted in [[ ]], and <seen> or
    <generated> where images go."""
    kinds = row["loss_mask"] + 2 * row["image_mask"] + 4 * row["gen_mask"]
    ways = {0: "{}", 1: "[[{}]]", 2: "<seen>", 4: "[[<generated>]]"}
    for segment in range(1, int(row["segment_ids"].max()) + 1):
        (own,) = np.nonzero(row["segment_ids"] == segment)
        runs = itertools.groupby(own, key=lambda place: int(kinds[place]))
        yield "".join(
            ways[kind].format(
                processor.tokenizer.decode(row["tokens"][list(run)].tolist(), skip_special=False)
            )
            for kind, run in runs
        )
