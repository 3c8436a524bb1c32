"""Records of benchmarks that were not run."""

import json
from pathlib import Path

from benchmarks import parity


def speed_record(rates: dict[str, float | str]) -> dict:
    """Returns a record with one row per implementation: a rate, or why there is none."""
    rows = [
        dict(case=dict(model="tiny", num_images=1, implementation=name))
        | (dict(not_measured=rate) if isinstance(rate, str) else dict(figures=dict(rate=rate)))
        for name, rate in rates.items()
    ]
    rows[0]["case"]["remat"] = "dots"  # a setting that the others do not have
    return dict(benchmark="draw", hardware=dict(device="X"), versions={}, rows=rows)


def parity_record(**ok: bool) -> dict:
    """Returns a record of parity in which all checks passed but those with another value."""
    names = [*parity.RECORDED, parity.same_seeds(parity.BATCHES)]
    rows = [
        dict(case=parity.case("small", "float32", name), figures=dict(ok=ok.get(name, True)))
        for name in names
    ]
    facts = dict(device="X", cpu="Y")
    return dict(benchmark="parity", hardware=facts, versions={}, rows=rows)


def write_record(folder: Path, name: str, content: dict | str) -> None:
    """Writes a record, or text that is not one, to a folder, which is created if needed."""
    folder.mkdir(exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / f"{name}.json").write_text(text)
