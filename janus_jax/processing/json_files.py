"""Reads and writes the small JSON files of a checkpoint folder."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from janus_jax.checks import shorten_text
from janus_jax.paths import atomic_write, bounded_size

MAX_JSON_BYTES = 2**25  # Janus's tokenizer.json has 5 MB; parsed, JSON needs up to 25 times that


def parse(text: str | bytes, **settings) -> Any:
    """Parses JSON like json.loads, but raises ValueError, too, if values are nested too deeply."""
    try:
        return json.loads(text, **settings)
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None


def read_json(path: Path) -> dict[str, Any]:
    """Reads the object in a JSON file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not a regular file, is too large, is not JSON, or is not an object.
    """
    bounded_size(path, MAX_JSON_BYTES)
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except ValueError as error:
        reason = shorten_text(str(error))
        raise ValueError(f"{path} is not valid JSON: {reason}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must contain a JSON object, got a {type(value).__name__}")
    return value


def read_json_if_any(path: Path) -> dict[str, Any]:
    """Like read_json, but returns an empty dict if the file does not exist."""
    return read_json(path) if os.path.lexists(path) else {}


def write_json(path: Path, value: Mapping) -> None:
    """Writes an object as UTF-8 JSON for humans: indented by 2, without escaping non-ASCII."""
    try:
        data = json.dumps(value, indent=2, ensure_ascii=False).encode()
    except UnicodeError:  # lone surrogates must be escaped
        data = json.dumps(value, indent=2).encode()
    with atomic_write(path) as file:
        file.write(data + b"\n")
