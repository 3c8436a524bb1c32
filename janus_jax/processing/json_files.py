"""The small JSON files of a checkpoint folder, read and written."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from janus_jax.checks import shorten_text
from janus_jax.paths import atomic_write, bounded_size

MAX_JSON_BYTES = 2**25  # Janus's tokenizer.json has 5 MB; parsed, JSON takes up to 25 times that


def parse(text: str | bytes, **settings) -> Any:
    """As json.loads, but raises ValueError for what is nested too deeply, too."""
    try:
        return json.loads(text, **settings)
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a regular file, too large, not JSON, or not an object.
    """
    bounded_size(path, MAX_JSON_BYTES)
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except ValueError as error:
        reason = shorten_text(str(error))
        raise ValueError(f"{path} is not valid JSON: {reason}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(value).__name__}")
    return value


def read_json_if_any(path: Path) -> dict[str, Any]:
    """As `read_json`; an empty dict where there is no such file."""
    return read_json(path) if os.path.lexists(path) else {}


def write_json(path: Path, value: Mapping) -> None:
    """Writes UTF-8 text as a person may edit it: indented by 2, letters as they are."""
    try:
        data = json.dumps(value, indent=2, ensure_ascii=False).encode()
    except UnicodeError:  # lone surrogates, which must be escaped
        data = json.dumps(value, indent=2).encode()
    with atomic_write(path) as file:
        file.write(data + b"\n")
