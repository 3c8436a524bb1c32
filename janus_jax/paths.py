"""Where things are written: checked first, and there whole or not at all."""

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def check_local(name: str, path: str | Path) -> None:
    """Raises ValueError for gs://... and the like, of which Path makes a folder here."""
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(path)):
        raise ValueError(f"{name} must be a place on a disk of this machine, got {path}")


def sibling(path: Path) -> Path:
    """A hidden name beside `path` that nothing has yet."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under `path` when it is complete, and leaves nothing otherwise."""
    beside = sibling(path)
    try:
        with beside.open("xb") as file:
            yield file
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
