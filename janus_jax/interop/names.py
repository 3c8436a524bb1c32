"""Tensor names in messages, and the prefixes that wrapper modules add to all names."""

import itertools
from collections.abc import Iterable, Mapping, Sequence

from janus_jax.checks import shorten_text

MAX_LISTED = 3  # names per list in a message
WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel and torch.compile
PEFT = "base_model.model."


def abbreviate(names: Sequence[str]) -> str:
    """Joins the first names; for a longer list also states the prefix that all names share."""
    text = ", ".join(names[:MAX_LISTED])
    if len(names) <= MAX_LISTED:
        return text
    prefix = shared_prefix(names)
    return f"{text}, ..." + (f" (all begin with {prefix!r})" if prefix else "")


def shared_prefix(names: Sequence[str]) -> str:
    """Returns the longest prefix of whole components ('a.b.') that all names share."""
    # In sorted order every name lies between the first and the last, so it shares their prefix.
    first, last = min(names), max(names)
    pairs = zip(first.split(".")[:-1], last.split("."), strict=False)
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
    return shorten_text("".join(f"{part}." for part, _ in shared))


def summarize_problems(problems: Mapping[str, Sequence[str]]) -> str:
    """Lists each kind of problem with its count and the first names affected; '' if none."""
    return "; ".join(
        f"{len(names)} {kind}: {abbreviate(names)}" for kind, names in problems.items() if names
    )


def wrapper_prefix(names: Iterable[str]) -> str:
    """Returns the wrapper prefix that all names share, such as 'module._orig_mod.', or ''."""
    names, prefix = list(names), ""
    while names:
        more = [w for w in WRAPPERS if all(name.startswith(prefix + w) for name in names)]
        if not more:
            break
        prefix += more[0]
    return prefix


def hint(names: Sequence[str]) -> str:
    """Returns what to do about tensor names that the model does not have, or '' if unknown."""
    if len(names) and all(name.startswith(PEFT) for name in names):
        return (
            f"; PEFT added the prefix {PEFT!r}: merge its adapters (merge_and_unload) and save the "
            "model again"
        )
    return ""
