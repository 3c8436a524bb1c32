"""Measures how fast records are read and packed into rows, without a model.

    python -m benchmarks.data_loading

Writes a synthetic data set (by default 20 000 records in each of two formats, about 1 GB each) with
the kinds and sizes of records that Janus-Pro is trained on. Then reads and decodes it, resizes the
images and packs everything into rows of 4096 tokens with the processor of Janus-Pro-1B.
"""

import importlib.metadata
import io
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import synthetic
from janus_jax.commands.terminal import OneLineParser, one_line_errors
from janus_jax.data import packing
from janus_jax.data.loading import RowsConfig, open_rows
from janus_jax.data.records import Record
from janus_jax.data.writers import write_records
from janus_jax.interop.load import open_folder
from janus_jax.processing.processor import Processor

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "data_loading.json"
DATA_FILES = dict(jsonl="data.jsonl", tar="data.tar", arrayrecord="data.array_record")
IMAGES = 200  # number of distinct images; creating more takes longer than reading them
RATIO = dict(understanding=0.4, text=0.2, generation=0.4)
WORDS = "a red fox in the snow looks at two old boats while clouds move over the quiet lake".split()
PACKAGES = ("grain", "numpy", "pillow", "tokenizers")


def make_images(rng: np.random.Generator, number: int) -> list[bytes]:
    """Returns JPEG files of smooth colors with noise, 320 to 640 pixels a side."""
    files = []
    for _ in range(number):
        width, height = rng.integers(320, 641, 2)
        coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
        noisy = np.clip(smooth + rng.integers(-12, 13, smooth.shape), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(noisy).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def make_records(number: int) -> Iterator[Record]:
    """Yields records of the kinds in RATIO, the same ones in every call."""
    rng = np.random.default_rng(0)
    images = make_images(rng, IMAGES)

    def words(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS, int(rng.integers(low, high))))

    for _ in range(number):
        kind = rng.choice(list(RATIO), p=list(RATIO.values()))
        image = images[rng.integers(IMAGES)]
        if kind == "understanding":
            turns = tuple((words(5, 30), words(1, 120)) for _ in range(rng.integers(1, 4)))
            yield Record(str(kind), turns, images=(image,))
        elif kind == "text":
            yield Record(str(kind), text=words(20, 1500))
        else:
            yield Record(str(kind), text=words(5, 90), images=(image,))


def measure(folder: Path, format: str, records: int, rows: int) -> dict[str, float | str]:
    """Writes a data set of `records` records in a format and measures reading `rows` rows of it."""
    data = folder / DATA_FILES[format]
    write_records(format, data, make_records(records))
    small = folder / "processor"
    small.mkdir(exist_ok=True)
    synthetic.write_small_files(small, synthetic.listing()["config"])
    cfg = RowsConfig(
        mixture=dict(all=dict(format=format, path=str(data))),
        seq_len=4096,
        max_input_images=7,
        max_generated_images=7,
        batch_size=1,
        streams=1,
        tokenized=False,
        max_bad=0.0,
        threads=os.cpu_count(),
        seed=0,
    )
    opened, _ = open_rows(cfg, Processor.from_dir(small), open_folder(small).cfg, folder)
    batches = iter(opened)
    for _ in range(packing.OPEN_ROWS):  # no row is returned before all open rows are filled
        next(batches)
    start, efficiencies, images = time.monotonic(), [], 0
    for _ in range(rows):
        batch = next(batches)
        efficiencies.append(packing.efficiency(batch["segment_ids"]))
        images += int(batch["image_mask"].sum()) // 576
        images += int(batch["gen_mask"].sum()) // 576
    seconds = time.monotonic() - start
    return dict(
        format=format,
        records=records,
        rows=rows,
        images_per_s=round(images / seconds, 1),
        tokens_per_s=round(sum(efficiencies) * cfg.seq_len / seconds),
        packing_efficiency=round(float(np.mean(efficiencies)), 4),
    )


def main() -> None:
    """Runs the command: prints the results and writes them to the file given by --output."""
    parser = OneLineParser("data_loading", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--formats",
        nargs="+",
        choices=DATA_FILES,
        default=["jsonl", "arrayrecord"],
        help="formats to measure (default: jsonl arrayrecord)",
    )
    text = "records per format (default: 20000)"
    parser.add_argument("--records", type=int, default=20_000, help=text)
    text = "rows to read per format (default: 2000)"
    parser.add_argument("--rows", type=int, default=2000, help=text)
    text = f"JSON file to write (default: {RESULT.relative_to(ROOT)})"
    parser.add_argument("--output", type=Path, default=RESULT, help=text)
    args = parser.parse_args()
    with one_line_errors("data_loading"), tempfile.TemporaryDirectory() as folder:
        measurements = [measure(Path(folder), f, args.records, args.rows) for f in args.formats]
        versions = {name: importlib.metadata.version(name) for name in PACKAGES}
        versions["python"] = platform.python_version()
        record = dict(measurements=measurements, cores=os.cpu_count(), versions=versions)
        text = json.dumps(record, indent=1) + "\n"
        args.output.write_text(text, "utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
