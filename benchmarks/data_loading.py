"""python -m benchmarks.data_loading: how fast records become rows, without a model.

Writes a made-up data set (by default 20 000 records in each of two formats, about 1 GB each) of the
kinds and sizes that Janus-Pro trains on, then reads, decodes, resizes and packs it into rows of
4096 tokens with Janus-Pro-1B's processor.
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
from janus_jax.data import packing
from janus_jax.data.loading import RowsConfig, open_rows
from janus_jax.data.records import Record
from janus_jax.data.writers import write_records
from janus_jax.flags import OneLineParser, one_line_errors
from janus_jax.interop.load import open_folder
from janus_jax.processing.processor import Processor

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "data_loading.json"
FORMATS = dict(jsonl="data.jsonl", tar="data.tar", arrayrecord="data.array_record")
IMAGES = 200  # different ones; to make more would take longer than to read them
KINDS = dict(understanding=0.4, text=0.2, generation=0.4)
WORDS = "a red fox in the snow looks at two old boats while clouds move over the quiet lake".split()
PACKAGES = ("grain", "numpy", "pillow", "tokenizers")


def make_images(rng: np.random.Generator, number: int) -> list[bytes]:
    """JPEG files of 320 to 640 pixels a side: smooth colours with some grain, as photographs."""
    files = []
    for _ in range(number):
        width, height = rng.integers(320, 641, 2)
        coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
        grained = np.clip(smooth + rng.integers(-12, 13, smooth.shape), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(grained).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def make_records(number: int) -> Iterator[Record]:
    """Records of KINDS, the same at every call."""
    rng = np.random.default_rng(0)
    images = make_images(rng, IMAGES)

    def words(least: int, most: int) -> str:
        return " ".join(rng.choice(WORDS, int(rng.integers(least, most))))

    for _ in range(number):
        kind = rng.choice(list(KINDS), p=list(KINDS.values()))
        image = images[rng.integers(IMAGES)]
        if kind == "understanding":
            turns = tuple((words(5, 30), words(1, 120)) for _ in range(rng.integers(1, 4)))
            yield Record(str(kind), turns, images=(image,))
        elif kind == "text":
            yield Record(str(kind), text=words(20, 1500))
        else:
            yield Record(str(kind), text=words(5, 90), images=(image,))


def measure(folder: Path, format: str, records: int, rows: int) -> dict[str, float | str]:
    """Writes the data set in a format and reads `rows` rows of it."""
    data = folder / FORMATS[format]
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
    for _ in range(packing.OPEN_ROWS):  # the first rows wait until all open ones are filled
        next(batches)
    start, filled, images, generated = time.monotonic(), [], 0, 0
    for _ in range(rows):
        batch = next(batches)
        filled.append(packing.efficiency(batch["segment_ids"]))
        images += int(batch["image_mask"].sum()) // 576
        generated += int(batch["gen_mask"].sum()) // 576
    seconds = time.monotonic() - start
    return dict(
        format=format,
        records=records,
        rows=rows,
        images_per_s=round((images + generated) / seconds, 1),
        tokens_per_s=round(sum(filled) * cfg.seq_len / seconds),
        packing_efficiency=round(float(np.mean(filled)), 4),
    )


def main() -> None:
    """Prints the record, and writes it where --output says."""
    parser = OneLineParser("data_loading", description=__doc__.splitlines()[0])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["jsonl", "arrayrecord"])
    parser.add_argument("--records", type=int, default=20_000, help="of each (default: 20000)")
    parser.add_argument("--rows", type=int, default=2000, help="to read (default: 2000)")
    parser.add_argument("--output", type=Path, default=RESULT, help="JSON file for the record")
    args = parser.parse_args()
    with one_line_errors("data_loading"), tempfile.TemporaryDirectory() as folder:
        found = [measure(Path(folder), one, args.records, args.rows) for one in args.formats]
        versions = {name: importlib.metadata.version(name) for name in PACKAGES}
        versions["python"] = platform.python_version()
        record = dict(measurements=found, cores=os.cpu_count(), versions=versions)
        text = json.dumps(record, indent=1) + "\n"
        args.output.write_text(text, "utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
