"""Writes the tables of README.md about GPUs from the records of benchmarks/on_gpu.sh.

    python -m benchmarks.readme_table

The records are in benchmarks/results/on_gpu. What has no record is written as "not measured".
"""

import json
from collections.abc import Mapping
from pathlib import Path

from benchmarks import answer, draw, train
from benchmarks.records import OURS, middle, ratios
from benchmarks.tables import NOT_MEASURED, markdown, number

ROOT = Path(__file__).parents[1]
README, RESULTS = ROOT / "README.md", ROOT / "benchmarks" / "results" / "on_gpu"
BEGIN = "<!-- written by python -m benchmarks.readme_table -->\n"
END = "<!-- end -->\n"
NAMES = dict(janus_pro_1b="Janus-Pro-1B", janus_pro_7b="Janus-Pro-7B")
BFLOAT16 = "bfloat16"
LIBRARIES = ("jax", "torch", "transformers")
DRAWINGS = [(model, images) for model in NAMES for images in (1, 16)]

Records = Mapping[str, Mapping]  # contents of the records by benchmark


def read_records(folder: Path) -> dict[str, dict]:
    """Returns the contents of the records in a folder by benchmark; empty without the folder."""
    paths = sorted(folder.glob("*.json"))
    return {path.stem: json.loads(path.read_text("utf-8")) for path in paths}


def figure(records: Records, benchmark: str, name: str, **case) -> str:
    """Returns a figure of our row whose case has the given values, as text."""
    rows = records.get(benchmark, dict(rows=[]))["rows"]
    for row in rows:
        own = case | dict(implementation=OURS)
        if own.items() <= row["case"].items() and name in row.get("figures", {}):
            return number(float(middle(row["figures"][name])))
    return NOT_MEASURED


def ratio(records: Records, benchmark: str, rate: str, **case) -> str:
    """Returns how many times as fast we are as the row with the given case, as text."""
    record = records.get(benchmark, dict(rows=[]))
    found = [entry for entry in ratios(record, rate) if case.items() <= entry["case"].items()]
    return f"{number(float(found[0]['ratio']))} x" if found else NOT_MEASURED


def tables(records: Records) -> str:
    """Returns the tables with a sentence that says where they were measured."""
    return "\n".join([_origin(records), _drawings(records), _speeds(records)])


def _origin(records: Records) -> str:
    used = [record for record in records.values() if record["hardware"]]
    if not used:
        return "No GPU was available yet. `benchmarks/on_gpu.sh OUT` measures these rows:\n"
    versions = {name: text for record in used for name, text in record["versions"].items()}
    names = ", ".join(f"{name} {versions[name]}" for name in LIBRARIES if name in versions)
    device = used[0]["hardware"]["device"]
    return f"Measured by `benchmarks/on_gpu.sh` on one {device} with {names}:\n"


def _drawings(records: Records) -> str:
    header = [
        "image generation, bfloat16",
        "seconds per image",
        "share of the copy bandwidth",
        "images/s, compared with the original's loop in PyTorch",
        "compared with `transformers`, compiled",
    ]
    rows = []
    for model, images in DRAWINGS:
        case = dict(model=model, dtype=BFLOAT16, num_images=images)
        rows.append(
            [
                f"{NAMES[model]}, {'one image' if images == 1 else f'{images} images at once'}",
                figure(records, "draw", "image_s", **case),
                figure(records, "draw", "bandwidth_share", **case),
                *(ratio(records, "draw", draw.RATE, **case, implementation=n) for n in draw.TORCH),
            ]
        )
    return markdown(header, rows)


def _speeds(records: Records) -> str:
    one, tiny = dict(model="janus_pro_1b"), dict(model="janus_tiny")
    question = one | dict(dtype=BFLOAT16, conversations=1)
    rows = [
        (
            "Janus-Pro-1B, seconds to the first token of an answer about an image",
            figure(records, "answer", "first_token_s", **question),
        ),
        (
            "Janus-Pro-1B, tokens/s of an answer of 128 tokens",
            figure(records, "answer", answer.RATE, **question),
        ),
        (
            "Janus-Pro-1B, tokens/s of training in stage 2, 4 rows of 4096 tokens",
            figure(records, "train", train.RATE, **one),
        ),
        ("the same, model FLOPs utilization", figure(records, "train", "mfu", **one)),
    ]
    rows += [
        (
            f"`janus_tiny`, seconds from starting `sample.py` to four images, {start}",
            figure(records, "load", "seconds", **tiny, what=f"sample.py, {start}"),
        )
        for start in ("cold", "warm")
    ]
    return markdown(["other figures", "measured"], rows)


def replaced(readme: str, text: str) -> str:
    """Returns the README with the text between the two comments replaced.

    Raises:
        ValueError: a comment is missing.
    """
    start, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md must contain {BEGIN.strip()} and {END.strip()}")
    return f"{start}{begin}\n{text}\n{end}{after}"


def main() -> None:
    """Writes the README."""
    text = README.read_text("utf-8")
    README.write_text(replaced(text, tables(read_records(RESULTS))), "utf-8")


if __name__ == "__main__":
    main()
