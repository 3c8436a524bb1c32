"""Names of tensors: how a message lists many, and the prefixes that wrappers put before all."""

import itertools
from collections.abc import Iterable, Mapping, Sequence

from janus_jax.checks import shorten_text

SHOWN = 3  # of a list of names in a message
WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
PEFT = "base_model.model."


def few(names: Sequence[str]) -> str:
    """The first names, and the prefix that all of a longer list have."""
    shown = ", ".join(names[:SHOWN])
    if len(names) <= SHOWN:
        return shown
    prefix = shared_prefix(names)
    return f"{shown}, ..." + (f" (all begin with {prefix!r})" if prefix else "")


def shared_prefix(names: Sequence[str]) -> str:
    """The longest prefix of whole components ('a.b.') that all names have."""
    first, last = min(names), max(names)  # in sorted order: all names between share their prefix
    pairs = zip(first.split(".")[:-1], last.split("."), strict=False)
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
    return shorten_text("".join(f"{part}." for part, _ in shared))


def listed(faults: Mapping[str, Sequence[str]]) -> str:
    """Kinds of faults, each with its count and a few of the names at fault; '' for none."""
    found = (f"{len(names)} {kind}: {few(names)}" for kind, names in faults.items() if names)
    return "; ".join(found)


def wrapper(names: Iterable[str]) -> str:
    """What wrappers put before every one of these names, such as 'module._orig_mod.'; often ''."""
    names, prefix = list(names), ""
    while names:
        more = [w for w in WRAPPERS if all(name.startswith(prefix + w) for name in names)]
        if not more:
            break
        prefix += more[0]
    return prefix


def advice(names: Sequence[str]) -> str:
    """What to do about stored names that the model does not have, where it is known."""
    if len(names) and all(name.startswith(PEFT) for name in names):
        return f"; PEFT put {PEFT!r} there: merge its adapters (merge_and_unload) and save again"
    return ""
