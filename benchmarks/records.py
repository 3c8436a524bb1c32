"""Records of benchmarks: JSON files that are rewritten after every measurement.

A record is an object with these fields:

benchmark: its name.
hardware: device, number and memory of GPUs with their driver, CPU, cores and memory.
versions: versions of Python and of the libraries that were used.
rows: one object per case. `case` says what was measured, `implementation` in it whose code ran.
    Either `figures` has the results or `not_measured` the reason why there are none. Further fields
    of a row are details that the tables omit.

A figure is a number, or the spread of several runs: {"median", "min", "max", "runs"}.
"""

import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from janus_jax.paths import write_file

Case = Mapping[str, object]
PACKAGES = ("jax", "jaxlib", "flax", "numpy")
FIELDS = {"benchmark", "hardware", "versions", "rows"}  # of a record
SAME = ("device", "cpu")  # facts that must be the same in all rows; virtual machines may grow
OURS = "janus_jax"  # the implementation that the others are compared with


def spread(values: Sequence[float]) -> dict[str, float]:
    """Returns the spread of the results of one or more runs, as figures have it."""
    return dict(
        median=statistics.median(values), min=min(values), max=max(values), runs=len(values)
    )


def middle(figure: float | Mapping) -> float:
    """Returns the number that stands for a figure: the median of a spread."""
    return figure["median"] if isinstance(figure, Mapping) else figure


def read_record(path: Path) -> dict:
    """Returns the content of a record.

    Raises:
        ValueError: the file is not a record.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"expected a record in {path}, got invalid JSON: {error}") from error
    if not isinstance(content, dict) or not FIELDS <= content.keys():
        names = ", ".join(sorted(FIELDS))
        raise ValueError(f"expected a record in {path}, an object with {names}; remove the file")
    return content


def failed_checks(record: Mapping) -> list[str]:
    """Returns the cases of a record in which a result is not as required (`ok` is false)."""
    rows = (row for row in record["rows"] if not row.get("figures", {}).get("ok", True))
    return [", ".join(map(str, row["case"].values())) for row in rows]


class Record:
    """The record in a file. Rows that the file already has are kept.

    Attributes:
        path: the file.
        content: the object described at the top of this module.
    """

    def __init__(self, path: Path, benchmark: str):
        """Reads the file if it exists.

        Raises:
            ValueError: the file is not a record, or one of another benchmark.
        """
        self.path = path
        self.content = dict(benchmark=benchmark, hardware={}, versions={}, rows=[])
        if path.exists():
            self.content = read_record(path)
            if (other := self.content["benchmark"]) != benchmark:
                raise ValueError(f"{path} is a record of {other}; choose another output file")

    def describe(self, device: str, packages: Iterable[str] = PACKAGES) -> None:
        """Notes the machine and the versions. Each process calls this before it measures.

        device: the name of the accelerator, or "cpu".

        Raises:
            ValueError: the file has rows that were measured on another machine or with other
                versions.
        """
        found, before = hardware(device), self.content["hardware"]
        if before and any(before[name] != found[name] for name in SAME):
            raise ValueError(f"{self.path} was measured on another machine; choose another file")
        used, before = versions(packages), self.content["versions"]
        for name, version in used.items():
            if (other := before.get(name, version)) != version and self._is_measured:
                raise ValueError(
                    f"{self.path} was measured with {name} {other}, this is {version}; choose "
                    "another file"
                )
        self.content["hardware"] = found
        self.content["versions"] |= used
        self._write()

    @property
    def _is_measured(self) -> bool:
        return any("figures" in row for row in self.content["rows"])

    def add(self, case: Case, figures: Mapping, **details) -> None:
        """Adds a measured row, in place of an earlier row of the same case."""
        self._put(case, _rounded(dict(figures=figures, **details)))

    def skip(self, case: Case, reason: str) -> None:
        """Adds the row of a case that was not measured. A measured row of the case stays."""
        if not any(row["case"] == case and "figures" in row for row in self.content["rows"]):
            self._put(case, dict(not_measured=reason))

    def _put(self, case: Case, result: dict) -> None:
        rows, row = self.content["rows"], dict(case=dict(case)) | result
        for number, other in enumerate(rows):
            if other["case"] == case:
                rows[number] = row
                break
        else:
            rows.append(row)
        self._write()

    def _write(self) -> None:
        write_file(self.path, (json.dumps(self.content, indent=1) + "\n").encode())


def _rounded(value):
    """Returns a value with all floats in it rounded to five significant digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {name: _rounded(entry) for name, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, list) else value


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Returns the versions of Python and of those packages that are installed."""
    found = dict(python=platform.python_version())
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware(device: str) -> dict:
    """Returns facts about the machine; those about GPUs are of `nvidia-smi`, if a GPU is used."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    facts = dict(
        device=device,
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        memory_gb=round(memory / 1e9, 1),
    )
    return facts | (_gpu_facts() if device != "cpu" else {})


def _cpu_name() -> str:
    """Returns the name of the processor, or that of its architecture where Linux gives none."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _gpu_facts() -> dict:
    """Returns number, memory and driver of the GPUs; nothing without `nvidia-smi`."""
    if not shutil.which("nvidia-smi"):
        return {}
    query = ["nvidia-smi", "--query-gpu=memory.total,driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {}
    memory, _, driver = lines[0].partition(", ")
    return dict(gpus=len(lines), gpu_memory=memory, driver=driver)


def ratios(record: Mapping, rate: str) -> list[dict]:
    """Returns how many times as fast this project is as each other implementation.

    record: contents of a record. rate: name of a figure of which more is better.
    Returns one object per row of another implementation that has a counterpart: its case, and
    `ratio`, our rate divided by its rate.
    """
    rates = [
        (row["case"], middle(row["figures"][rate]))
        for row in record["rows"]
        if rate in row.get("figures", {})
    ]
    return [
        dict(case=case, ratio=own_rate / other_rate)
        for case, other_rate in rates
        for own, own_rate in rates
        if case["implementation"] != OURS and _is_counterpart(own, case)
    ]


def _is_counterpart(own: Case, case: Case) -> bool:
    """Whether `own` is our case of the same work; it may have settings that `case` does not."""
    return own["implementation"] == OURS and all(
        own.get(name) == value for name, value in case.items() if name != "implementation"
    )
