"""python -m convert: PyTorch checkpoints of Janus to Orbax and back."""

import argparse
import os
import sys
from collections.abc import Sequence

from janus_jax.flags import OneLineParser, one_line_errors, place, set_up_program
from janus_jax.progress import Progress

COMMANDS = ("export", "inspect", "verify")
DESCRIPTION = """\
Convert checkpoint folders of Janus-1.3B, Janus-Pro-1B and Janus-Pro-7B.

  python -m convert SRC DST                    PyTorch weights to an Orbax folder
  python -m convert export SRC DST --layout L  any folder to PyTorch safetensors
  python -m convert inspect SRC                what a folder holds, and what would be skipped
  python -m convert verify MODEL               compare with PyTorch's transformers (docs/verify.md)

SRC is a folder in DeepSeek's layout or that of transformers (safetensors or .bin, one file or
shards with an index), or an Orbax folder that this command wrote. Converting is not needed to
load a folder. `export --help`, `inspect --help` and `verify --help` say more."""
VERIFY = """\
Compare MODEL in janus_jax with the same weights in PyTorch's `transformers`, on the CPU.

Prints a table of the differences in preprocessing, SigLIP features, image tokenizer, logits and
greedy generation. Exit status: 0 if all are within their limits, 1 if not, 2 after an error.
A folder in another layout than that of transformers is exported to a temporary folder first.
Needs torch and transformers. Limits, memory and time: docs/verify.md."""


def _parser(command: str | None) -> OneLineParser:
    kind = argparse.RawDescriptionHelpFormatter
    if command == "inspect":
        text = "Print components, parameter counts, dtypes and the tensors that would be skipped."
        parser = OneLineParser("convert", prog="python -m convert inspect", description=text)
        parser.add_argument("src", type=place, metavar="SRC", help="checkpoint folder to read")
        return parser
    if command == "export":
        text = (
            "Write PyTorch safetensors (shards above 5 GB) with config, tokenizer and processor "
            "files. Tensors that DeepSeek's class expects and nothing reads (attn_pool, "
            "codebook_used) come from SRC, or are zeros where SRC lacks them."
        )
        parser = OneLineParser("convert", prog="python -m convert export", description=text)
    else:
        parser = OneLineParser(
            "convert", prog="python -m convert", description=DESCRIPTION, formatter_class=kind
        )
    parser.add_argument("src", type=place, metavar="SRC", help="checkpoint folder to read")
    parser.add_argument("dst", type=place, metavar="DST", help="folder to write")
    if command == "export":
        layouts, text = ("deepseek", "transformers"), "names and files of which project"
        parser.add_argument("--layout", required=True, choices=layouts, help=text)
    text = "LoRA adapter in PEFT's format to merge into the weights (default: none)"
    parser.add_argument("--adapter", type=place, metavar="FOLDER", help=text)
    text = "replace DST if it is a checkpoint folder"
    parser.add_argument("--overwrite", action="store_true", help=text)
    return parser


def _verify_parser() -> OneLineParser:
    parser = OneLineParser(
        "convert",
        prog="python -m convert verify",
        description=VERIFY,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="checkpoint folder in any layout, or a hub id")
    text = "folder or hub id that transformers loads, in its layout (default: MODEL or its export)"
    add("--reference", metavar="FOLDER", help=text)
    add("--image", metavar="FILE", help="input image (default: a built-in test image)")
    text = "question about the image (default: %(default)r)"
    add("--question", metavar="TEXT", default="What is in this image?", help=text)
    text = "description of the image to generate (default: %(default)r)"
    add("--prompt", metavar="TEXT", default="a red circle left of a blue square", help=text)
    text = "check only this dtype (default: both)"
    add("--dtype", choices=("float32", "bfloat16"), help=text)
    text = (
        "image tokens to generate, at most those of a whole image (default: %(default)s of the 576 "
        "of Janus-Pro, because each takes a second or more of a 7B model on a CPU)"
    )
    add("--num_image_tokens", metavar="N", type=int, default=32, help=text)
    text = "length limit of the answer in tokens (default: %(default)s)"
    add("--max_new_tokens", metavar="N", type=int, default=32, help=text)
    add("--json", metavar="FILE", help="also write the table to this file as JSON")
    return parser


def _verify(argv: Sequence[str]) -> int:
    """Returns the exit status."""
    args = _verify_parser().parse_args(argv)
    from janus_jax.interop import verify_command

    with one_line_errors("convert", ImportError):
        return verify_command.run(args)


def _run(command: str | None, args: argparse.Namespace) -> list[str]:
    # Here, so that --help is quick and the platform can be chosen first.
    from janus_jax.interop import export

    if command == "inspect":
        return export.inspect_folder(args.src)
    with Progress("converting", "B") as progress:
        options = dict(overwrite=args.overwrite, adapter=args.adapter, progress=progress)
        if command == "export":
            return export.export_folder(args.src, args.dst, args.layout, **options)
        return export.import_folder(args.src, args.dst, **options)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command; what a user can cause ends in one line and status 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = argv.pop(0) if argv and argv[0] in COMMANDS else None
    os.environ["JAX_PLATFORMS"] = "cpu"  # all work is on the host
    if command == "verify":
        sys.exit(_verify(argv))
    args = _parser(command).parse_args(argv)
    with one_line_errors("convert"):
        print("\n".join(_run(command, args)))


if __name__ == "__main__":
    set_up_program()
    main()
