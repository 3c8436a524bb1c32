"""Tables of records, in Markdown."""

import math
from collections.abc import Iterable, Mapping, Sequence

from benchmarks.records import ratios

NOT_MEASURED = "not measured"


def number(value: float) -> str:
    """Returns a number with three significant digits, but all digits of integers, as text."""
    if not isinstance(value, float):
        return f"{value:,}" if type(value) is int else str(value)
    rounded = float(f"{value:.3g}")
    if rounded and abs(rounded) < 1e-3:
        return f"{value:.1e}"
    exponent = math.floor(math.log10(abs(rounded))) if rounded else 2
    return f"{value:,.{max(2 - exponent, 0)}f}"


def figure(value: float | Mapping) -> str:
    """Returns a figure as text: a number, or the median with its range and the number of runs."""
    if not isinstance(value, Mapping):
        return number(value)
    median = number(value["median"])
    if value["runs"] == 1:
        return f"{median} (1 run)"
    low, high = number(value["min"]), number(value["max"])
    return f"{median} ({low} to {high}, {value['runs']} runs)"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def record_table(record: Mapping) -> str:
    """Returns all rows of a record as one table: the cases, then the figures."""
    rows = record["rows"]
    keys = _names(row["case"] for row in rows)
    names = _names(row.get("figures", {}) for row in rows)

    def cells(row: Mapping) -> list[str]:
        case = [str(row["case"].get(key, "")) for key in keys]
        if "figures" not in row:
            return [*case, f"{NOT_MEASURED}: {row['not_measured']}", *[""] * (len(names) - 1)]
        found = row["figures"]
        return [*case, *(figure(found[name]) if name in found else "" for name in names)]

    return markdown([*keys, *(names or ["figures"])], map(cells, rows))


def ratio_table(record: Mapping, rate: str) -> str:
    """Returns our rate divided by that of each other implementation as a table; "" if none."""
    found = ratios(record, rate)
    if not found:
        return ""
    keys = _names(entry["case"] for entry in found)
    rows = ([*(str(e["case"][key]) for key in keys), number(e["ratio"])] for e in found)
    return markdown([*keys, f"{rate}, janus_jax / implementation"], rows)


def profile_tables(record: Mapping) -> str:
    """Returns a table of the kernels that take the longest for each row with a profile."""
    parts = []
    for row in record["rows"]:
        profile = row.get("profile", {})
        if profile.get("top"):
            name = ", ".join(f"{key} {value}" for key, value in row["case"].items())
            busy, wall = number(profile["busy_ms"]), number(profile["wall_ms"])
            text = f"{name}: {profile['kernels']} kernels, {busy} ms of {wall} ms a step\n"
            kernels = ([kernel, number(ms), number(count)] for kernel, ms, count in profile["top"])
            parts += [text, markdown(["kernel", "ms a step", "number a step"], kernels)]
    return "\n".join(parts)


def summary(record: Mapping, rate: str | None) -> str:
    """Returns a section about a record: the machine, the versions and the tables."""
    described = filter(None, (record["hardware"], record["versions"]))  # empty if nothing ran
    facts = (", ".join(f"{name} {value}" for name, value in x.items()) for x in described)
    parts = [f"## {record['benchmark']}\n"]
    if line := "; ".join(facts):
        parts.append(f"{line}\n")
    parts.append(record_table(record))
    if rate is not None and (table := ratio_table(record, rate)):
        parts.append(table)
    if text := profile_tables(record):
        parts.append(text)
    return "\n".join(parts)


def _names(objects: Iterable[Mapping]) -> list[str]:
    """Returns the keys of all objects, each once, in the order in which they first appear."""
    return list(dict.fromkeys(name for entry in objects for name in entry))
