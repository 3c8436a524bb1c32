"""The command `python -m convert verify`: from its arguments to a table and an exit status."""

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from janus_jax.checks import check_count
from janus_jax.generation.loading import find_folder
from janus_jax.interop import verify
from janus_jax.interop.verify_outputs import Request
from janus_jax.interop.verify_table import Row, format_table
from janus_jax.paths import atomic_write
from janus_jax.processing.image_sources import open_image


def run(args: argparse.Namespace) -> int:
    """Prints the table; returns 0 if all rows are within their limits, and 1 if not.

    args: as convert/__main__.py defines them.

    Raises:
      ImportError: torch or transformers is not installed.
      FileNotFoundError, ValueError: a file or folder cannot be read, or a number is below 1.
    """
    verify.check_installed()
    request = Request(
        image=verify.builtin_image() if args.image is None else open_image(args.image),
        question=args.question,
        prompt=args.prompt,
        max_new_tokens=check_count("--max_new_tokens", args.max_new_tokens),
        num_image_tokens=check_count("--num_image_tokens", args.num_image_tokens),
    )
    dtypes = ("float32", "bfloat16") if args.dtype is None else (args.dtype,)
    model = find_folder(args.model)
    reference = None if args.reference is None else find_folder(args.reference)
    verify.check_reference(reference)
    if args.json is not None and not Path(args.json).absolute().parent.is_dir():
        raise FileNotFoundError(f"--json: {Path(args.json).parent} is not a folder")
    print(verify.memory_text(model), flush=True)
    start = time.monotonic()

    def report(step: str) -> None:
        print(f"{time.monotonic() - start:6.0f} s  {step}", file=sys.stderr, flush=True)

    rows = verify.verify(model, reference, request, dtypes, report)
    print(f"{args.model}: {verify.versions()}")
    print("\n".join(format_table(rows)))
    if args.json is not None:
        _write_json(Path(args.json), args, rows)
    return 0 if all(row.passed for row in rows) else 1


def _write_json(path: Path, args: argparse.Namespace, rows: Sequence[Row]) -> None:
    """Writes the table; numbers that are NaN or infinite become null."""
    content = {name: value for name, value in vars(args).items() if name != "json"}
    content["versions"] = verify.versions()
    content["passed"] = all(row.passed for row in rows)
    content["rows"] = [
        {name: _json_value(value) for name, value in dataclasses.asdict(row).items()}
        for row in rows
    ]
    with atomic_write(path) as file:
        file.write(f"{json.dumps(content, indent=1)}\n".encode())


def _json_value(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value
