"""Writes the tables of README.md about speed from the records of the benchmarks.

    python -m benchmarks.readme_table

The records of benchmarks/on_gpu.sh are in benchmarks/results/on_gpu; what has no record there is
written as "not measured". Records of draw and load on a CPU may be in benchmarks/results/on_cpu.
All records of a folder must be of one machine.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import answer, draw, parity, train
from benchmarks.records import OURS, SAME, middle, ratios, read_record
from benchmarks.suite import bare_parser
from benchmarks.tables import NOT_MEASURED, markdown, number
from janus_jax.commands.terminal import one_line_errors

ROOT = Path(__file__).parents[1]
README, RESULTS = ROOT / "README.md", ROOT / "benchmarks" / "results"
BEGIN = "<!-- written by python -m benchmarks.readme_table -->\n"
END = "<!-- end -->\n"
NAMES = dict(janus_pro_1b="Janus-Pro-1B", janus_pro_7b="Janus-Pro-7B")
BFLOAT16 = "bfloat16"
STARTS = dict(cold="first run, which compiles", warm="later runs")  # by the name in the records
LIBRARIES = ("jax", "torch", "transformers")
DRAWINGS = [(model, images) for model in NAMES for images in (1, 16)]

Records = Mapping[str, Mapping]  # contents of the records by benchmark


def read_records(folder: Path) -> dict[str, dict]:
    """Returns the contents of the records in a folder by benchmark; empty without the folder.

    Raises:
        ValueError: a file is not a record.
    """
    return {path.stem: read_record(path) for path in sorted(folder.glob("*.json"))}


def machine(folder: Path, records: Mapping[str, Mapping]) -> Mapping:
    """Returns the hardware on which the records of a folder were measured; empty if none was.

    Raises:
        ValueError: they are of several machines, or of a CPU in on_gpu or the reverse.
    """
    found = [record["hardware"] for record in records.values() if record["hardware"]]
    names = sorted({" with ".join(str(facts.get(name)) for name in SAME) for facts in found})
    if len(names) > 1:
        raise ValueError(
            f"expected records of one machine in {folder.name}, got {'; '.join(names)}; remove "
            "those of the others"
        )
    if found and (found[0]["device"] == "cpu") != (folder.name == "on_cpu"):
        raise ValueError(
            f"{folder.name} has records of the device {found[0]['device']}; move them to another "
            "folder"
        )
    return found[0] if found else {}


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

    Raises:
        ValueError: see read_records and machine.
    """
    folders = [results / name for name in ("on_gpu", "on_cpu")]
    gpu, cpu = map(read_records, folders)
    gpu_facts, cpu_facts = map(machine, folders, (gpu, cpu))
    parts = [_origin(gpu, gpu_facts), _drawings(gpu), _others(gpu)]
    return "\n".join([*parts, _cpu_origin(cpu, cpu_facts), _cpu(cpu)] if cpu_facts else parts)


def _origin(records: Records, facts: Mapping) -> str:
    if not facts:
        return "No GPU was available yet. `benchmarks/on_gpu.sh OUT` measures these rows:\n"
    where = f"on one {facts['device']} with {_versions(records)}"
    return f"Measured by `benchmarks/on_gpu.sh` {where}:\n"


def _parity(records: Records) -> str:
    """Returns whether the checks in float32 passed, as text."""
    required = {*parity.RECORDED, parity.same_seeds(parity.BATCHES)}
    passed = {
        (row["case"]["model"], row["case"]["check"]): row["figures"]["ok"]
        for row in records.get("parity", dict(rows=[]))["rows"]
        if row["case"]["dtype"] == "float32" and "figures" in row
    }
    if not all(passed.values()):
        return "no"
    return "yes" if {("small", check) for check in required} <= passed.keys() else NOT_MEASURED


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


def _others(records: Records) -> str:
    one, tiny = dict(model="janus_pro_1b"), dict(model="janus_tiny")
    question = one | dict(dtype=BFLOAT16, conversations=1, num_tokens=128)
    steps = one | dict(rows=4, seq_len=4096, remat="dots")
    rows = [
        (
            "float32: equal to the recordings, and the same image for a seed in all batch sizes",
            _parity(records),
        ),
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
            figure(records, "train", train.RATE, **steps),
        ),
        ("model FLOPs utilization of this step", figure(records, "train", "mfu", **steps)),
    ]
    rows += [
        (
            f"`janus_tiny`, seconds from starting `sample.py` to four images, {run}",
            figure(records, "load", "seconds", **tiny, what=f"sample.py, {start}"),
        )
        for start, run in STARTS.items()
    ]
    return markdown(["other figures", "measured"], rows)


def _cpu_origin(records: Records, facts: Mapping) -> str:
    return f"Measured on {facts['cores']} cores ({facts['cpu']}) with {_versions(records)}:\n"


def _cpu(records: Records) -> str:
    """Returns the table of the CPU; rows that have no record are omitted."""
    tiny = dict(model="janus_tiny")
    drawing = dict(model="janus_pro_1b", dtype="float32", num_images=1)
    rows = [
        (
            f"`janus_tiny`, from starting `sample.py` to four images, {run}",
            figure(records, "load", "seconds", **tiny, what=f"sample.py, {start}"),
            "",
        )
        for start, run in STARTS.items()
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


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the README."""
    bare_parser("readme_table", __doc__.splitlines()[0]).parse_args(argv)
    with one_line_errors("readme_table"):
        text = README.read_text("utf-8")
        README.write_text(replaced(text, tables(RESULTS)), "utf-8")


if __name__ == "__main__":
    main()
