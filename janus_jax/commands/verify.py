"""The command line of `python -m convert verify`."""

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from janus_jax.commands.terminal import OneLineParser, one_line_errors, path_arg, program_name

DESCRIPTION = """\
Compare MODEL in janus_jax with the same weights in PyTorch's `transformers`, on the CPU.

Prints a table of the differences in preprocessing, SigLIP features, image tokenizer, logits and
greedy generation. The exit status is 0 if all are within their limits, 1 if not, 2 after an error.
If MODEL is not in the layout of transformers, it is first exported to a temporary folder.
Needs torch and transformers. See docs/verify.md in the repository for limits,
memory and time."""


def main(argv: Sequence[str], command: str) -> NoReturn:
    """Runs the command and exits: status 0 or 1 after a comparison, 2 after an error.

    Args:
        argv: arguments after `verify`.
        command: how the user calls the command that has `verify`, such as "python -m convert".
    """
    name = program_name(command)
    args = _parser(command, name).parse_args(argv)
    os.environ["JAX_PLATFORMS"] = "cpu"  # both implementations run on the host
    with one_line_errors(name, ImportError):
        status = _run(args)
    sys.exit(status)


def _parser(command: str, name: str) -> OneLineParser:
    parser = OneLineParser(
        name,
        prog=f"{command} verify",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="checkpoint folder in any layout, or a hub id")
    text = "folder or hub id that transformers loads instead of MODEL; must be in its layout"
    add("--reference", metavar="FOLDER", help=text)
    add("--image", metavar="FILE", help="input image (default: a built-in test image)")
    text = "question about the image (default: %(default)r)"
    add("--question", metavar="TEXT", default="What is in this image?", help=text)
    text = "description of the image to generate (default: %(default)r)"
    add("--prompt", metavar="TEXT", default="a red circle left of a blue square", help=text)
    text = "check only this dtype (default: both)"
    add("--dtype", choices=("float32", "bfloat16"), help=text)
    text = (
        "number of image tokens to generate (default: %(default)s; a whole image of Janus-Pro has "
        "576, which takes long on a CPU)"
    )
    add("--num_image_tokens", metavar="N", type=int, default=32, help=text)
    text = "length limit of the answer in tokens (default: %(default)s)"
    add("--max_new_tokens", metavar="N", type=int, default=32, help=text)
    add("--json", type=path_arg, metavar="FILE", help="also write the table to this file as JSON")
    return parser


def _run(args: argparse.Namespace) -> int:
    """Prints the table; returns 0 if all rows are within their limits, and 1 if not.

    Raises:
        ImportError: torch or transformers is not installed.
        FileNotFoundError, ValueError: a file or folder cannot be read, or a number is below 1.
    """
    # Imported late, so that --help is fast and main can select the platform before JAX starts.
    from janus_jax.checks import check_count
    from janus_jax.interop.folders import find_folder
    from janus_jax.processing.image_sources import open_image
    from janus_jax.verify import run
    from janus_jax.verify.outputs import Request
    from janus_jax.verify.table import format_table

    run.check_installed()
    request = Request(
        image=run.builtin_image() if args.image is None else open_image(args.image),
        question=args.question,
        prompt=args.prompt,
        max_new_tokens=check_count("--max_new_tokens", args.max_new_tokens),
        num_image_tokens=check_count("--num_image_tokens", args.num_image_tokens),
    )
    dtypes = ("float32", "bfloat16") if args.dtype is None else (args.dtype,)
    model = find_folder(args.model)
    reference = None if args.reference is None else find_folder(args.reference)
    run.check_reference(reference)
    if args.json is not None and not args.json.absolute().parent.is_dir():
        raise FileNotFoundError(f"--json: {args.json.parent} is not a folder")
    if args.json is not None and args.json.is_dir():
        raise ValueError(f"--json must be a file, got the folder {args.json}")
    print(run.memory_text(model), flush=True)
    start = time.monotonic()

    def report(step: str) -> None:
        print(f"{time.monotonic() - start:6.0f} s  {step}", file=sys.stderr, flush=True)

    rows = run.verify(model, reference, request, dtypes, report)
    print(f"{args.model}: {run.versions()}")
    print("\n".join(format_table(rows)))
    if args.json is not None:
        _write_json(args.json, args, run.versions(), rows)
    return 0 if all(row.passed for row in rows) else 1


def _write_json(path: Path, args: argparse.Namespace, versions: str, rows: Sequence) -> None:
    """Writes the table; numbers that are NaN or infinite become null. rows: table.Comparison."""
    from janus_jax.paths import atomic_write

    content = {name: value for name, value in vars(args).items() if name != "json"}
    content["versions"] = versions
    content["passed"] = all(row.passed for row in rows)
    content["rows"] = [
        {name: _json_value(value) for name, value in dataclasses.asdict(row).items()}
        for row in rows
    ]
    with atomic_write(path) as file:
        file.write(f"{json.dumps(content, indent=1)}\n".encode())


def _json_value(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value
