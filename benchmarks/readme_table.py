"""Writes the tables of README.md about speed from the records of the benchmarks.

    python -m benchmarks.readme_table

The records of benchmarks/on_gpu.sh are in benchmarks/results/on_gpu; what has no record there is
written as "not measured". Records of draw and load on a CPU may be in benchmarks/results/on_cpu.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from benchmarks import answer, draw, train
from benchmarks.records import OURS, middle, ratios
from benchmarks.tables import NOT_MEASURED, markdown, number

ROOT = Path(__file__).parents[1]
README, RESULTS = ROOT / "README.md", ROOT / "benchmarks" / "results"
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


def tables(results: Path) -> str:
    """Returns the tables with sentences that say where they were measured.

    results: the folder with the folders of records.
    """
    gpu, cpu = (read_records(results / name) for name in ("on_gpu", "on_cpu"))
    parts = [_origin(gpu), _drawings(gpu), _speeds(gpu)]
    return "\n".join([*parts, _cpu_origin(cpu), _cpu(cpu)] if cpu else parts)


def _origin(records: Records) -> str:
    used = [record["hardware"] for record in records.values() if record["hardware"]]
    if not used:
        return "No GPU was available yet. `benchmarks/on_gpu.sh OUT` measures these rows:\n"
    device = used[0]["device"]
    return f"Measured by `benchmarks/on_gpu.sh` on one {device} with {_versions(records)}:\n"


def _versions(records: Records) -> str:
    versions = {n: text for record in records.values() for n, text in record["versions"].items()}
    return ", ".join(f"{name} {versions[name]}" for name in LIBRARIES if name in versions)


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


def _cpu_origin(records: Records) -> str:
    facts = next(iter(records.values()))["hardware"]
    return f"Measured on {facts['cores']} cores ({facts['cpu']}) with {_versions(records)}:\n"


def _cpu(records: Records) -> str:
    """Returns the table of the CPU; rows that have no record are omitted."""
    tiny = dict(model="janus_tiny")
    drawing = dict(model="janus_pro_1b", dtype="float32", num_images=1)
    rows = [
        (
            f"`janus_tiny`, from starting `sample.py` to four images, {start}",
            figure(records, "load", "seconds", **tiny, what=f"sample.py, {start}"),
            "",
        )
        for start in ("cold", "warm")
    ]
    eager, compiled = (
        ratio(records, "draw", draw.RATE, **drawing, implementation=name) for name in draw.TORCH
    )
    seconds = figure(records, "draw", "image_s", **drawing)
    rows.append(
        ("Janus-Pro-1B, one image, float32", seconds, f"eager {eager}, compiled {compiled}")
    )
    header = ["on a CPU", "seconds", "images/s, compared with PyTorch"]
    return markdown(header, [row for row in rows if row[1] != NOT_MEASURED])


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
    README.write_text(replaced(text, tables(RESULTS)), "utf-8")


if __name__ == "__main__":
    main()
