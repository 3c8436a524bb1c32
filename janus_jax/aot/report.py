"""The report about a job: as a dict for JSON, and as lines of text."""

from collections.abc import Iterator
from typing import Any

from janus_jax.aot.changes import Advice
from janus_jax.aot.measure import Measurement, PartFacts, versions

_GB = 1e9
_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def as_dict(measured: Measurement, model: str) -> dict[str, Any]:
    """Returns the facts of a report; sizes in bytes per device, times in seconds unless named.

    model: how the user named the model. The facts of each of the `programs` are the attributes of
    measure.PartFacts.
    """
    job, step = measured.job, measured.step
    report: dict[str, Any] = dict(
        job=job.name,
        model=model,
        device=job.facts.name,
        num_devices=job.num_devices,
        topology=job.slice,
        mesh=job.mesh,
        settings=job.settings,
        versions=versions(job.facts.platform),
        memory=dict(
            held=measured.held,
            added=measured.added,
            total=measured.total,
            available=measured.available,
            device=job.facts.memory_bytes,
        ),
        programs=[_part_dict(part) for part in measured.parts],
        fits=measured.fits,
    )
    if step is not None:
        report["decode_step"] = dict(
            weights=step.weights,
            cache=round(step.cache),
            bytes_per_s=job.facts.memory_bytes_per_s,
            floor_ms=round(measured.floor_ms, 4),
        )
    if measured.error is not None:
        report["error"] = str(measured.error)
    return report


def advice_dict(advice: Advice) -> dict[str, Any]:
    """Returns the facts that a report about a job that does not fit has in addition."""
    return dict(change=advice.change and advice.change.text, tried=list(advice.tried))


def _part_dict(part: PartFacts) -> dict[str, Any]:
    facts = dict(
        name=part.name,
        trace_s=round(part.trace_s, 2),
        compile_s=round(part.compile_s, 2),
        cpu_s=round(part.cpu_s, 2),
        added=part.added,
        temporaries=part.temporaries,
        code=part.code,
        attention={name: list(kernels) for name, kernels in part.attention.items()},
        collectives={
            kind: dict(count=count, bytes=size)
            for kind, (count, size) in part.collectives.items()
        },
    )
    if part.options:
        facts["options"] = part.options
    if part.kernels is not None:
        facts["kernels_per_token"] = sum(part.kernels.values())
        facts["kernels_by_kind"] = part.kernels
    if part.weight_copies is not None:
        facts["weight_copies"] = part.weight_copies
    return facts


def lines(report: dict[str, Any]) -> Iterator[str]:
    """Yields the lines of a report without the verdict, from what as_dict returns."""
    slices = f":{report['topology']}" if report["topology"] else ""
    mesh = f", mesh {report['mesh']}" if report["mesh"] else ""
    compiler = ", ".join(" ".join(pair) for pair in report["versions"].items())
    settings = ", ".join(f"{name} {value}" for name, value in report["settings"].items())
    yield (
        f"{report['job']} {report['model']} on {report['num_devices']} x {report['device']}{slices}"
        f"{mesh} ({compiler})"
    )
    yield f"settings: {settings}"
    for part in report["programs"]:
        yield from _part_lines(part)
    if step := report.get("decode_step"):
        total = step["weights"] + step["cache"]
        yield (
            f"a decode step must read {_size(total)} (weights {_size(step['weights'])}, cache "
            f"{_size(step['cache'])}): at least {step['floor_ms']:.3g} ms at "
            f"{step['bytes_per_s'] / _GB:.0f} GB/s"
        )
    memory = report["memory"]
    held = ", ".join(f"{name} {_size(size)}" for name, size in memory["held"].items())
    share = memory["available"] / memory["device"]
    of = f" ({share:.2g} of {_size(memory['device'])})" if share < 1 else ""
    yield (
        f"memory of each device: {_size(memory['total'])} of {_size(memory['available'])}{of}; "
        f"held: {held}; added by the programs: {_size(memory['added'])}"
    )
    if "error" in report:
        yield report["error"]


def verdict(report: dict[str, Any]) -> str:
    """Returns the last line of a report, from what as_dict and advice_dict return."""
    if report["fits"]:
        return "fits"
    if change := report["change"]:
        return f"does not fit; it would with {change}"
    if not report["tried"]:
        return "does not fit; no change was compiled, because none is estimated to be enough"
    return f"does not fit, also not with any of: {'; '.join(report['tried'])}"


def _part_lines(part: dict[str, Any]) -> Iterator[str]:
    seconds = f"traced in {part['trace_s']:.1f} s, compiled in {part['compile_s']:.1f} s"
    seconds += f" ({part['cpu_s']:.1f} CPU s)"
    yield (
        f"{part['name']}: {seconds}; adds {_size(part['added'])} to what is held "
        f"({_size(part['temporaries'])} of it temporary)"
    )
    for name, value in part.get("options", {}).items():
        yield f"  compiled with {name}={str(value).lower()}, without which XLA refuses the program"
    per = " for each token" if "weight_copies" in part else ""
    for name, kernels in part["attention"].items():
        yield f"  attention of {name}: {', '.join(kernels)}"
    for kind, moved in part["collectives"].items():
        yield f"  {moved['count']} {kind}{per}, {_size(moved['bytes'])}"
    if "kernels_per_token" in part:
        kinds = ", ".join(f"{count} {kind}" for kind, count in part["kernels_by_kind"].items())
        yield f"  {part['kernels_per_token']} kernels{per}: {kinds}"
    for what, count in part.get("weight_copies", {}).items():
        yield f"  weights: {count} x {what}"
    if part.get("weight_copies") == {}:
        yield "  no weight is copied or converted"


def _size(size: float) -> str:
    """Formats bytes as GB, as MB below 0.1 GB, or as kB below 0.1 MB."""
    unit, name = next(each for each in _UNITS if size >= 0.1 * each[0] or each is _UNITS[-1])
    return f"{size / unit:.2f} {name}"
