"""python -m convert: PyTorch checkpoints of Janus to Orbax and back."""

import argparse
import os
import sys
from collections.abc import Sequence

from janus_jax.flags import OneLineParser, one_line_errors, path_arg, set_up_program
from janus_jax.interop import verify_cli
from janus_jax.progress import Progress

COMMANDS = ("export", "inspect", "verify")
DESCRIPTION = """\
Convert checkpoint folders of Janus-1.3B, Janus-Pro-1B and Janus-Pro-7B.

  python -m convert SRC DST                    PyTorch weights to an Orbax folder
  python -m convert export SRC DST --layout L  any folder to PyTorch safetensors
  python -m convert inspect SRC                what a folder holds, and what would be skipped
  python -m convert verify MODEL               compare a model with PyTorch's transformers

SRC is a folder in DeepSeek's layout or that of transformers (safetensors or .bin, one file or
shards with an index), or an Orbax folder that this command wrote. Converting is not needed to
load a folder. `export --help`, `inspect --help` and `verify --help` say more."""


def _parser(command: str | None) -> OneLineParser:
    kind = argparse.RawDescriptionHelpFormatter
    if command == "inspect":
        text = "Print components, parameter counts, dtypes and the tensors that would be skipped."
        parser = OneLineParser("convert", prog="python -m convert inspect", description=text)
        parser.add_argument("src", type=path_arg, metavar="SRC", help="checkpoint folder to read")
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
    parser.add_argument("src", type=path_arg, metavar="SRC", help="checkpoint folder to read")
    parser.add_argument("dst", type=path_arg, metavar="DST", help="folder to write")
    if command == "export":
        layouts, text = ("deepseek", "transformers"), "names and files of which project"
        parser.add_argument("--layout", required=True, choices=layouts, help=text)
    text = "LoRA adapter in PEFT's format to merge into the weights (default: none)"
    parser.add_argument("--adapter", type=path_arg, metavar="FOLDER", help=text)
    text = "replace DST if it is a checkpoint folder"
    parser.add_argument("--overwrite", action="store_true", help=text)
    return parser


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
    if command == "verify":
        verify_cli.main(argv, "python -m convert")
    args = _parser(command).parse_args(argv)
    os.environ["JAX_PLATFORMS"] = "cpu"  # all work is on the host
    with one_line_errors("convert"):
        print("\n".join(_run(command, args)))


if __name__ == "__main__":
    set_up_program()
    main()
