"""Compiles Janus-Pro for many devices, none of which need be present, and writes docs/devices.md.

    pip install -e ".[compile-tpu,compile-cuda]"
    python -m benchmarks.devices                  # all rows that are not in the results file yet
    python -m benchmarks.devices --only "7b .*v5e"  # rows whose name matches, again
    python -m benchmarks.devices --page_only      # only writes the page again

Each row runs `python -m janus_jax.compile_for` in a separate process and appends its report to
benchmarks/results/devices.jsonl, so that the script can be interrupted. If a row fails, its error
is printed, the other rows are compiled, and the exit status is 1. All rows take hours on two cores;
those of GPUs are the fastest.
"""

import argparse
import collections
import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from janus_jax.commands.terminal import OneLineParser, error_line, one_line_errors, set_up_program
from janus_jax.paths import write_file

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "devices.jsonl"
PAGE = ROOT / "docs" / "devices.md"
NAMES = {"janus_pro_1b": "Janus-Pro-1B", "janus_pro_7b": "Janus-Pro-7B"}
STATE = ("params", "optimizer", "ema", "frozen")  # what a device holds between steps
MIN_KERNEL_LENGTH = 128  # that of models/attention.py, which imports JAX
ROW_BATCH = {1: 256, 2: 512, 3: 128}  # rows of a step in the stages of the report
IMAGE_TOKENS = 576  # of a generated image

INTRODUCTION = "\n\n".join(
    (
        "# Devices",
        "This page lists devices on which Janus-Pro can be used, with the memory that it needs "
        "there. No device was present. `python -m janus_jax.compile_for` compiled the programs of "
        "`sample.py` and `train.py` with the compilers for TPU and CUDA, and read the facts from "
        "the compiled programs. No times were measured.",
        "`python -m benchmarks.devices` writes this page from `benchmarks/results/devices.jsonl`. "
        "To compile another case, for example a longer prompt or another mesh, install the "
        'compilers with `pip install -e ".[compile-tpu,compile-cuda]"` and see '
        "`python -m janus_jax.compile_for --help`.",
        "JAX uses 75 % of a GPU's memory by default, which is the limit in these tables. With the "
        "environment variable `XLA_PYTHON_CLIENT_MEM_FRACTION=0.95` it uses more. A TPU7x chip is "
        "two devices, each with half of its memory.",
        "Collectives of training are those of one step on one device, without kinds below 0.05 GB. "
        "The bytes of a collective are those of its operands or of its results, whichever is more; "
        "an all-reduce sends about twice these bytes, the others at most these "
        "(`janus_jax/aot/hlo_facts.py`). XLA for TPUs may split gathers into "
        "collective-permutes, or compute them as all-reduces.\n",
    )
)


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table.

    model: name of a released model. job: "draw", "answer" or the name of a config to train.
    device: name of the device. flags: further flags of compile_for. why: returns the reason for
    the mesh and the microbatches, given the report.
    """

    model: str
    job: str
    device: str
    flags: tuple[str, ...]
    why: Callable[[Mapping], str]

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


def _always(text: str) -> Callable[[Mapping], str]:
    return lambda report: text


def _memory_left(report: Mapping) -> str:
    """Says why one device is enough."""
    memory = report["memory"]
    return f"Fits on one device; {_size(memory['available'] - memory['total'])} are left."


def generation_rows() -> Iterator[Row]:
    """Yields the rows of drawing and answering."""
    sharded = _always("Four chips read the weights four times as fast as one.")
    small = ("v5e", "v6e", "l4", "rtx-4090")
    for device in (*small, "a100-40gb", "a100-80gb", "h100", "h200", "v5p", "tpu7x"):
        for model in NAMES:
            yield Row(model, "draw", device, ("--num_images", "4"), _memory_left)
            yield Row(model, "answer", device, (), _memory_left)
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
    ("h100", ("--count", "8"), 8, ("1b", "7b")),
    ("h100", ("--count", "64"), 64, ("1b", "7b")),
)


def training_rows() -> Iterator[Row]:
    """Yields the rows of the three stages of the report."""
    for device, slices, chips, sizes in _SLICES:
        for size in sizes:
            for stage in (1, 2, 3):
                yield _training_row(size, stage, device, slices, chips)


def _training_row(size: str, stage: int, device: str, slices: tuple, chips: int) -> Row:
    """Returns a row in which each device has at most four rows of a microbatch.

    Each microbatch gathers all parameters, so more rows at a time are better. It is one row on a
    v5e and for 7B on a v6e, because of their smaller memory.
    """
    shards = min(chips, ROW_BATCH[stage])
    is_small = device == "v5e" or (device, size) == ("v6e", "7b")
    at_a_time = 1 if is_small else 4
    accumulate = max(1, ROW_BATCH[stage] // shards // at_a_time)
    mesh = f"fsdp={shards}"
    if shards < chips:
        mesh += f",tensor={chips // shards}"
    flags = (*slices, "--config.remat=full", f"--config.accumulate={accumulate}")
    flags += () if shards == chips else ("--mesh", mesh)
    return Row(f"janus_pro_{size}", f"janus_pro_{size}_stage{stage}", device, flags, _memory_note)


def _memory_note(report: Mapping) -> str:
    """Says what the mesh and the microbatches of a training step save."""
    settings, memory = report["settings"], report["memory"]
    axes = dict(part.split("=") for part in report["mesh"].split(","))
    rows = settings["batch_size"] // int(axes["fsdp"]) // settings["accumulate"]
    state = sum(memory["held"].get(name, 0) for name in STATE)
    return (
        f"Each device holds about 1/{report['num_devices']} of the state, {_size(state)}; a "
        f"microbatch of {rows} {'row' if rows == 1 else 'rows'} on each adds "
        f"{_size(memory['added'])}."
    )


def _size(value: float) -> str:
    """Returns bytes as text."""
    return f"{value / 1e9:.1f} GB" if value >= 1e8 else f"{value / 1e6:.0f} MB"


def lora_rows() -> Iterator[Row]:
    """Yields the rows of fine-tuning with LoRA."""
    tokens = "--config.tokenized=True"
    share = "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95"
    four = "The frozen weights are sharded over the four chips."
    flags = (tokens, "--memory_fraction", "0.95")
    short = f"With {share} and rows of 1024 instead of 2048 tokens."
    flags_l4 = (*flags, "--config.seq_len=1024")
    yield Row("janus_pro_7b", "finetune_lora", "l4", flags_l4, _always(short))
    yield Row("janus_pro_7b", "finetune_lora", "rtx-4090", flags, _always(f"With {share}."))
    flags = (tokens, "--topology", "2x2", "--config.accumulate=2")
    yield Row("janus_pro_7b", "finetune_lora", "v5e", flags, _always(four))


TABLES = {
    "Generating images and answering questions": tuple(generation_rows()),
    "The three stages of the report": tuple(training_rows()),
    "Fine-tuning with LoRA": tuple(lora_rows()),
}


def compile_row(row: Row) -> dict:
    """Runs compile_for and returns its report.

    Raises:
        RuntimeError: with one line, the command failed for another reason than too little memory.
    """
    command = [sys.executable, "-m", "janus_jax.compile_for", *row.command]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode not in (0, 1) or not done.stdout:
        lines = done.stderr.split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "no error message")
        raise RuntimeError(f"{row.name}: {last}")
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
    parts.append(f"Compiled with {_versions(results)}.\n")
    write_file(PAGE, "\n".join(parts).encode())


def _versions(results: dict[str, dict]) -> str:
    """Returns each package once, with all of its versions."""
    found = collections.defaultdict(set)
    for report in results.values():
        for name, version in report["versions"].items():
            found[name].add(version)
    return ", ".join(f"{name} {' and '.join(sorted(found[name]))}" for name in sorted(found))


def _generation_table(found: list[tuple[Row, dict]]) -> Iterator[str]:
    lengths = {report["job"]: report["settings"]["prompt_length"] for _, report in found}
    prompts = (f"{job} {length} tokens" for job, length in sorted(lengths.items(), reverse=True))
    yield (
        "Draw: four images at once. Answer: 256 tokens about one image. Prompt, with the tokens of "
        f"its images: {', '.join(prompts)}. Prompts below {MIN_KERNEL_LENGTH} tokens use plain XLA "
        "attention on all devices (`janus_jax/models/attention.py`). The speed limit follows "
        "from the published rate at which the device reads its memory: each token needs the "
        "weights and the filled cache.\n"
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
            row.why(report) if report["fits"] else _does_not_fit(report),
        )


def _floor(report: dict) -> str:
    if not report["fits"]:
        return "-"
    settings, step = report["settings"], report["decode_step"]["floor_ms"] / 1000
    if report["job"] == "answer":
        return f"{1 / step:.0f} tokens/s"
    return f"{step * IMAGE_TOKENS / settings['batch']:.2f} s/image"


def _per_token(tokens: dict) -> str:
    words = []
    if "kernels_per_token" in tokens:
        words.append(f"{tokens['kernels_per_token']} kernels")
    for kind, moved in sorted(tokens.get("collectives", {}).items()):
        words.append(f"{moved['count']} {kind}, {moved['bytes'] / 1e6:.1f} MB")
    return ", ".join(words) or "-"


def _train_table(found: list[tuple[Row, dict]]) -> Iterator[str]:
    yield _stage_facts(found) if "stage" in found[0][0].job else _LORA_FACTS
    yield (
        "| | devices | mesh | rows | microbatches | memory needed | memory available | collectives "
        "| note |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for row, report in found:
        step = report["programs"][-1] if report["programs"] else dict(collectives={})
        job = row.job.removeprefix(f"{row.model}_").replace("stage", "stage ")
        yield _line(
            f"{NAMES[row.model]}, {job}",
            f"{report['num_devices']} x {row.device}",
            report["mesh"],
            f"{report['settings']['batch_size']}",
            f"{report['settings']['accumulate']}",
            *_memory(report),
            _moved(step["collectives"]),
            row.why(report) if report["fits"] else _does_not_fit(report),
        )


def _stage_facts(found: list[tuple[Row, dict]]) -> str:
    """Returns a paragraph about the meshes, the microbatches and the devices of 7B."""
    sevens = {
        f"{report['num_devices']} x {row.device}": None
        for row, report in found
        if row.model == "janus_pro_7b"
    }
    return (
        "The mesh puts all devices on `fsdp`, up to the number of rows in a step, so that each "
        "holds its part of the state: parameters, AdamW moments and frozen weights. A microbatch "
        "has at most 4 rows on each device, because each microbatch gathers all parameters; on "
        "v5e, and on v6e for 7B, only one row, because of the smaller memory. All rows have 4096 "
        "tokens and `remat=full`. "
        f"The stages of 7B are listed for {', '.join(sevens) or 'no device'}.\n"
    )


_LORA_FACTS = (
    "`configs/finetune_lora.py` with image tokens that were computed before "
    "(`--config.tokenized=True`).\n"
)


def _moved(collectives: dict[str, dict]) -> str:
    """Returns the kinds of collectives with their bytes; omits those that would be "0.0 GB"."""
    sizes = {kind: moved["bytes"] / 1e9 for kind, moved in sorted(collectives.items())}
    large = (f"{kind} {size:.1f} GB" for kind, size in sizes.items() if size >= 0.05)
    return ", ".join(large) or "-"


def _memory(report: dict) -> tuple[str, str]:
    """Returns the memory needed and available on each device."""
    memory = report["memory"]
    return f"{memory['total'] / 1e9:.1f} GB", f"{memory['available'] / 1e9:.1f} GB"


def _does_not_fit(report: dict) -> str:
    change = report.get("change")
    return f"Does not fit. `{change}` would fit." if change else "Does not fit."


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _regex(text: str) -> re.Pattern:
    try:
        return re.compile(text)
    except re.error as error:
        message = f"expected a regular expression, got {text!r}: {error}"
        raise argparse.ArgumentTypeError(message) from error


def _chosen(flags: argparse.Namespace, results: dict[str, dict]) -> list[Row]:
    """Returns the rows to compile."""
    rows = [row for rows in TABLES.values() for row in rows]
    if flags.page_only:
        return []
    if flags.only is None:
        return [row for row in rows if row.name not in results]
    found = [row for row in rows if flags.only.search(row.name)]
    if not found:
        names = f"{rows[0].name!r} and {rows[-1].name!r}"
        raise ValueError(f"--only {flags.only.pattern!r} matches no row; names are like {names}")
    return found


def compile_rows(rows: Iterable[Row], results: dict[str, dict]) -> bool:
    """Compiles rows, and writes each report and the page. Returns whether all could be compiled."""
    success = True
    for row in rows:
        print(row.name, flush=True)
        try:
            report = compile_row(row)
        except RuntimeError as error:
            print(error_line("devices", str(error)), file=sys.stderr)
            success = False
            continue
        results[row.name] = report
        with RESULTS.open("a") as file:
            file.write(json.dumps(report) + "\n")
        write_page(results)
    return success


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; exits with status 1 if a row could not be compiled."""
    command = "python -m benchmarks.devices"
    parser = OneLineParser("devices", prog=command, description=__doc__.splitlines()[0])
    group = parser.add_mutually_exclusive_group()
    text = "regular expression on the names of the rows to compile, even if there are results"
    group.add_argument("--only", metavar="REGEX", type=_regex, help=text)
    text = "compile nothing, only write the page again"
    group.add_argument("--page_only", action="store_true", help=text)
    flags = parser.parse_args(argv)
    set_up_program()  # so that SIGTERM also ends the process that compiles
    with one_line_errors("devices"):
        results = read_results()
        success = compile_rows(_chosen(flags, results), results)
        write_page(results)
    if not success:
        sys.exit(1)


if __name__ == "__main__":
    main()
