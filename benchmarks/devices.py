"""Compiles Janus-Pro for many devices, none of which need be there, and writes docs/devices.md.

    pip install -e ".[compile-tpu,compile-cuda]"
    python -m benchmarks.devices                  # all rows that are not in the results file yet
    python -m benchmarks.devices --only "7b .*v5e"  # rows whose name matches, again
    python -m benchmarks.devices --only none      # only writes the page again

Each row runs `python -m janus_jax.compile_for` in a separate process and appends its report to
benchmarks/results/devices.jsonl, so that the script can be interrupted. All rows take hours on two
cores; those of GPUs are the fastest.
"""

import argparse
import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from janus_jax.paths import write_file

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "devices.jsonl"
PAGE = ROOT / "docs" / "devices.md"
NAMES = {"janus_pro_1b": "Janus-Pro-1B", "janus_pro_7b": "Janus-Pro-7B"}
ROW_BATCH = {1: 256, 2: 512, 3: 128}  # rows of a step in the stages of the report

INTRODUCTION = "\n\n".join(
    (
        "# Devices",
        "This page lists devices on which Janus-Pro can be used, with the memory that it needs "
        "there. None of them was present: `python -m janus_jax.compile_for` compiled what "
        "`sample.py` and `train.py` run with the compilers for TPU and CUDA, and read the facts "
        "from the compiled programs. No times were measured.",
        "`python -m benchmarks.devices` writes this page from `benchmarks/results/devices.jsonl`. "
        "To compile another case, for example a longer prompt or another mesh, install the "
        'compilers with `pip install -e ".[compile-tpu,compile-cuda]"` and see '
        "`python -m janus_jax.compile_for --help`.",
        "JAX uses 75 % of a GPU's memory by default, which is the limit in these tables. With the "
        "environment variable `XLA_PYTHON_CLIENT_MEM_FRACTION=0.95` it uses more. A TPU7x chip is "
        "two devices, each with half of its memory.\n",
    )
)


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table.

    model: name of a released model. job: "draw", "answer" or the name of a config to train.
    device: name of the device. flags: further flags of compile_for. why: why this mesh.
    """

    model: str
    job: str
    device: str
    flags: tuple[str, ...]
    why: str

    @property
    def name(self) -> str:
        """The row in a few words, by which it is selected and found in the results."""
        return " ".join((self.model, self.job, self.device, *self.flags))

    @property
    def command(self) -> list[str]:
        """The arguments of compile_for."""
        job = ("--job", self.job)
        if self.job not in ("draw", "answer"):
            job = ("--job", "train", f"--config={self.job}")
        return ["--model", self.model, "--device", self.device, *job, *self.flags, "--json"]


def generation_rows() -> Iterator[Row]:
    """Yields the rows of drawing and answering."""
    one = "One device is enough."
    sharded = "Four chips read the weights four times as fast as one."
    small = ("v5e", "v6e", "l4", "rtx-4090")
    for device in (*small, "a100-40gb", "a100-80gb", "h100", "h200", "v5p", "tpu7x"):
        for model in NAMES:
            yield Row(model, "draw", device, ("--num_images", "4"), one)
            yield Row(model, "answer", device, (), one)
    for device in ("v5e", "v6e"):
        mesh = ("--mesh", "tensor=4")
        yield Row("janus_pro_7b", "draw", device, ("--num_images", "4", *mesh), sharded)
        yield Row("janus_pro_7b", "answer", device, mesh, sharded)


# Device, flags for its number, chips, model sizes that it is listed for.
_SLICES = (
    ("v5e", ("--topology", "16x16"), 256, ("1b", "7b")),
    ("v6e", ("--topology", "8x8"), 64, ("1b", "7b")),
    ("v5p", ("--topology", "2x2x4"), 16, ("1b",)),
    ("v5p", ("--topology", "4x4x4"), 64, ("7b",)),
    ("h100", ("--count", "8"), 8, ("1b",)),
    ("h100", ("--count", "64"), 64, ("1b", "7b")),
)


def training_rows() -> Iterator[Row]:
    """Yields the rows of the three stages of the report."""
    for device, slices, chips, sizes in _SLICES:
        for size in sizes:
            for stage in (1, 2, 3):
                yield _training_row(size, stage, device, slices, chips)


def _training_row(size: str, stage: int, device: str, slices: tuple, chips: int) -> Row:
    """Returns a row in which each device has at most four rows of a microbatch, or one for 7B."""
    shards = min(chips, ROW_BATCH[stage])
    at_a_time = 4 if size == "1b" and device != "v5e" else 1
    accumulate = max(1, ROW_BATCH[stage] // shards // at_a_time)
    mesh = f"fsdp={shards}"
    if shards < chips:
        mesh += f",tensor={chips // shards}"
    flags = (*slices, "--config.remat=full", f"--config.accumulate={accumulate}")
    flags += () if shards == chips else ("--mesh", mesh)
    rows = ROW_BATCH[stage] // shards // accumulate
    why = f"Parameters and moments are sharded over all devices; {rows} row"
    why += "s at a time on each." if rows > 1 else " at a time on each."
    return Row(f"janus_pro_{size}", f"janus_pro_{size}_stage{stage}", device, flags, why)


def lora_rows() -> Iterator[Row]:
    """Yields the rows of fine-tuning with LoRA."""
    tokens = "--config.tokenized=True"
    share = "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95"
    four = "The frozen weights are sharded over the four chips."
    flags = (tokens, "--memory_fraction", "0.95")
    short = f"With {share} and rows of 1024 instead of 2048 tokens."
    yield Row("janus_pro_7b", "finetune_lora", "l4", (*flags, "--config.seq_len=1024"), short)
    yield Row("janus_pro_7b", "finetune_lora", "rtx-4090", flags, f"With {share}.")
    flags = (tokens, "--topology", "2x2", "--config.accumulate=2")
    yield Row("janus_pro_7b", "finetune_lora", "v5e", flags, four)


TABLES = {
    "Drawing and answering": tuple(generation_rows()),
    "The three stages of the report": tuple(training_rows()),
    "Fine-tuning with LoRA": tuple(lora_rows()),
}


def compile_row(row: Row) -> dict:
    """Runs compile_for and returns its report.

    Raises:
        RuntimeError: the command failed for another reason than too little memory.
    """
    command = [sys.executable, "-m", "janus_jax.compile_for", *row.command]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode not in (0, 1) or not done.stdout:
        raise RuntimeError(f"{row.name}: {done.stderr[-2000:]}")
    return dict(row=row.name, **json.loads(done.stdout))


def read_results() -> dict[str, dict]:
    """Returns the newest report of each row by its name."""
    if not RESULTS.exists():
        return {}
    reports = map(json.loads, RESULTS.read_text().splitlines())
    return {report["row"]: report for report in reports}


def write_page(results: dict[str, dict]) -> None:
    """Writes docs/devices.md from the reports."""
    parts = [INTRODUCTION]
    for title, rows in TABLES.items():
        found = [(row, results[row.name]) for row in rows if row.name in results]
        if not found:
            continue
        lines = _generation_table(found) if "decode_step" in found[0][1] else _train_table(found)
        parts.append("\n".join((f"## {title}\n", *lines)) + "\n")
    versions = sorted({json.dumps(report["versions"]) for report in results.values()})
    texts = (", ".join(map(" ".join, json.loads(each).items())) for each in versions)
    parts.append(f"Compiled with {'; '.join(texts)}, on 2 CPU cores.\n")
    write_file(PAGE, "\n".join(parts).encode())


def _generation_table(found: list[tuple[Row, dict]]) -> Iterator[str]:
    yield (
        "The memory is that of four images at once, or of an answer of 256 tokens to a question "
        "about one image. The speed limit follows from the published rate at which the device "
        "reads its memory: each token needs the weights and the filled cache.\n"
    )
    yield (
        "| | device | mesh | memory needed | memory available | attention of the prompt | for each "
        "token | speed limit | note |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for row, report in found:
        prompt, tokens = report["programs"][:2] if len(report["programs"]) > 1 else ({}, {})
        kernels = prompt.get("attention", {}).get("prefill", ["-"])
        yield _line(
            f"{NAMES[row.model]} {row.job}",
            row.device,
            report["mesh"] or "one device",
            *_memory(report),
            ", ".join(kernels),
            _per_token(tokens),
            _floor(report),
            row.why if report["fits"] else _does_not_fit(report),
        )


def _floor(report: dict) -> str:
    settings, step = report["settings"], report["decode_step"]["floor_ms"] / 1000
    if report["job"] == "answer":
        return f"{1 / step:.0f} tokens/s"
    return f"{step * 576 / settings['batch']:.2f} s/image"


def _per_token(tokens: dict) -> str:
    words = []
    if "kernels_per_token" in tokens:
        words.append(f"{tokens['kernels_per_token']} kernels")
    for kind, moved in tokens.get("collectives", {}).items():
        words.append(f"{moved['count']} {kind}, {moved['bytes'] / 1e6:.1f} MB")
    return ", ".join(words) or "-"


def _train_table(found: list[tuple[Row, dict]]) -> Iterator[str]:
    yield "Collectives are those of one step on one device, see `aot/hlo_facts.py`.\n"
    yield (
        "| | devices | mesh | rows | microbatches | memory needed | memory available | collectives "
        "| note |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for row, report in found:
        step = report["programs"][-1] if report["programs"] else dict(collectives={})
        moved = (f"{kind} {x['bytes'] / 1e9:.1f} GB" for kind, x in step["collectives"].items())
        yield _line(
            row.job,
            f"{report['num_devices']} x {row.device}",
            report["mesh"],
            f"{report['settings']['batch_size']}",
            f"{report['settings']['accumulate']}",
            *_memory(report),
            ", ".join(moved) or "-",
            row.why if report["fits"] else _does_not_fit(report),
        )


def _memory(report: dict) -> tuple[str, str]:
    """Returns the memory needed and available on each device."""
    memory = report["memory"]
    return f"{memory['total'] / 1e9:.1f} GB", f"{memory['available'] / 1e9:.1f} GB"


def _does_not_fit(report: dict) -> str:
    change = report.get("change")
    return f"Does not fit; would with `{change}`." if change else "Does not fit."


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    text = "regular expression on the names of the rows to compile, even if there are results"
    parser.add_argument("--only", metavar="REGEX", help=text)
    flags = parser.parse_args()
    results = read_results()
    for row in (row for rows in TABLES.values() for row in rows):
        chosen = row.name not in results if flags.only is None else re.search(flags.only, row.name)
        if not chosen:
            continue
        print(row.name, flush=True)
        results[row.name] = compile_row(row)
        with RESULTS.open("a") as file:
            file.write(json.dumps(results[row.name]) + "\n")
        write_page(results)
    write_page(results)


if __name__ == "__main__":
    main()
