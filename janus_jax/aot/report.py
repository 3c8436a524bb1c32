"""The report about a job: as a dict for JSON, and as lines of text."""

from collections.abc import Iterator
from typing import Any

from janus_jax.aot.changes import Advice
from janus_jax.aot.measure import Measurement, PartFacts, versions

_GB = 1e9


def as_dict(measured: Measurement, model: str, advice: Advice | None = None) -> dict[str, Any]:
    """Returns the facts of a report; sizes in bytes per device, times in seconds unless named.

    model: how the user named the model. advice: what would fit, for a job that does not.
    """
    job, step = measured.job, measured.step
    report: dict[str, Any] = dict(
        job=type(job).__name__.lower(),
        model=model,
        device=job.facts.name,
        num_devices=job.num_devices,
        topology=job.topology,
        mesh=job.mesh,
        settings=job.settings,
        versions=versions(job.facts.platform),
        memory=dict(
            held=measured.held,
            added=measured.added,
            total=measured.total,
            available=measured.available,
        ),
        programs=[_part_dict(part) for part in measured.parts],
        fits=measured.fits,
    )
    if step is not None:
        report["decode_step"] = dict(
            weights=step.weights, cache=round(step.cache), floor_ms=round(measured.floor_ms, 4)
        )
    if measured.error is not None:
        report["error"] = str(measured.error)
    if advice is not None:
        report["change"] = advice.change and advice.change.text
        report["tried"] = list(advice.tried)
    return report


def _part_dict(part: PartFacts) -> dict[str, Any]:
    facts = dict(
        name=part.name,
        trace_s=round(part.trace_s, 2),
        compile_s=round(part.compile_s, 2),
        cpu_s=round(part.cpu_s, 2),
        added=part.added,
        temporaries=part.temporaries,
        attention={name: list(kernels) for name, kernels in part.attention.items()},
        collectives={
            kind: dict(count=count, bytes=size)
            for kind, (count, size) in part.collectives.items()
        },
    )
    if part.kernels is not None:
        facts["kernels_per_token"] = sum(part.kernels.values())
        facts["kernels_by_kind"] = part.kernels
    if part.weight_copies is not None:
        facts["weight_copies"] = part.weight_copies
    return facts


def lines(report: dict[str, Any]) -> Iterator[str]:
    """Yields the lines of a report, from what as_dict returns."""
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
            f"a decode step must read {_gb(total)} (weights {_gb(step['weights'])}, cache "
            f"{_gb(step['cache'])}): at least {step['floor_ms']:.3f} ms"
        )
    memory = report["memory"]
    held = ", ".join(f"{name} {_gb(size)}" for name, size in memory["held"].items())
    yield (
        f"memory of each device: {_gb(memory['total'])} of {_gb(memory['available'])} "
        f"(held: {held}; added: {_gb(memory['added'])})"
    )
    if "error" in report:
        yield report["error"]
    if report["fits"]:
        yield "fits"
    elif change := report.get("change"):
        yield f"does not fit; the smallest change that does: {change}"
    else:
        tried = "; ".join(report["tried"]) or "nothing, because no change seemed to be enough"
        yield f"does not fit; tried {tried}"


def _part_lines(part: dict[str, Any]) -> Iterator[str]:
    seconds = f"traced in {part['trace_s']:.1f} s, compiled in {part['compile_s']:.1f} s"
    seconds += f" ({part['cpu_s']:.1f} CPU s)"
    yield (
        f"{part['name']}: {seconds}; adds {_gb(part['added'])} to what is held, of which "
        f"temporaries {_gb(part['temporaries'])}"
    )
    per = " for each token" if "weight_copies" in part else ""
    for name, kernels in part["attention"].items():
        yield f"  attention of {name}: {', '.join(kernels)}"
    for kind, moved in part["collectives"].items():
        yield f"  {moved['count']} {kind}{per}, {_gb(moved['bytes'])}"
    if "kernels_per_token" in part:
        kinds = ", ".join(f"{count} {kind}" for kind, count in part["kernels_by_kind"].items())
        yield f"  {part['kernels_per_token']} kernels{per}: {kinds}"
    for what, count in part.get("weight_copies", {}).items():
        yield f"  weights: {count} x {what}"
    if part.get("weight_copies") == {}:
        yield "  no weight is copied or converted"


def _gb(size: float) -> str:
    """Formats bytes as GB, or as MB below 0.1 GB."""
    return f"{size / _GB:.2f} GB" if size >= 0.1 * _GB else f"{size / 1e6:.2f} MB"
