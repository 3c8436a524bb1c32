"""The command line of `python -m convert` and `janus-convert`: checkpoint conversion."""

import argparse
import os
import sys
from collections.abc import Sequence

from janus_jax.commands import verify as verify_cli
from janus_jax.commands.terminal import (
    OneLineParser,
    Progress,
    one_line_errors,
    path_arg,
    program_name,
)

COMMANDS = ("export", "inspect", "verify")


def _description(command: str) -> str:
    uses = {
        "SRC DST": "convert PyTorch weights to an Orbax folder",
        "export SRC DST --layout L": "convert any folder to PyTorch safetensors",
        "inspect SRC": "list the contents of a folder, and unused tensors",
        "verify MODEL": "compare a model with the same model in transformers",
    }
    width = max(map(len, uses)) + 2
    lines = [f"  {command} {arguments:{width}}{text}" for arguments, text in uses.items()]
    return "\n".join(
        [
            "Convert checkpoint folders of Janus-1.3B, Janus-Pro-1B and Janus-Pro-7B.",
            "",
            *lines,
            "",
            "SRC is a folder in DeepSeek's layout or in the layout of transformers (safetensors or",
            ".bin, a single file or shards with an index), or an Orbax folder that this command",
            "wrote. All of these can be loaded without converting them. Run `export --help`,",
            "`inspect --help` and `verify --help` for their options.",
        ]
    )


def _parser(command: str, subcommand: str | None) -> OneLineParser:
    name = program_name(command)
    if subcommand == "inspect":
        text = "Print components, parameter counts, dtypes and the tensors that are not read."
        parser = OneLineParser(name, prog=f"{command} inspect", description=text)
        parser.add_argument("src", type=path_arg, metavar="SRC", help="checkpoint folder to read")
        return parser
    if subcommand == "export":
        text = (
            "Write PyTorch safetensors (in shards above 5 GB) with the config, tokenizer and "
            "processor files. DeepSeek's model class also expects tensors that are never used "
            "(attn_pool, codebook_used); they are copied from SRC, or are zeros if SRC lacks them."
        )
        parser = OneLineParser(name, prog=f"{command} export", description=text)
    else:
        kind = argparse.RawDescriptionHelpFormatter
        text = _description(command)
        parser = OneLineParser(name, prog=command, description=text, formatter_class=kind)
    parser.add_argument("src", type=path_arg, metavar="SRC", help="checkpoint folder to read")
    parser.add_argument("dst", type=path_arg, metavar="DST", help="folder to write")
    if subcommand == "export":
        layouts, text = ("deepseek", "transformers"), "layout of the tensor names and files in DST"
        parser.add_argument("--layout", required=True, choices=layouts, help=text)
    text = "LoRA adapter in PEFT's format to merge into the weights (default: none)"
    parser.add_argument("--adapter", type=path_arg, metavar="FOLDER", help=text)
    text = "replace DST if it is a checkpoint folder"
    parser.add_argument("--overwrite", action="store_true", help=text)
    return parser


def _run(subcommand: str | None, args: argparse.Namespace) -> list[str]:
    # Imported late, so that --help is fast and main can select the platform before JAX starts.
    from janus_jax.interop import convert

    if subcommand == "inspect":
        return convert.inspect_folder(args.src)
    with Progress("converting", "B") as progress:
        options = dict(overwrite=args.overwrite, adapter=args.adapter, progress=progress)
        if subcommand == "export":
            return convert.export_folder(args.src, args.dst, args.layout, **options)
        return convert.import_folder(args.src, args.dst, **options)


def main(argv: Sequence[str] | None = None, command: str = "python -m convert") -> None:
    """Runs a conversion; an error that the user can fix ends it with one line and status 2.

    Args:
        argv: arguments after the command; None means those of the process.
        command: how the user calls this program, for --help and error messages.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    subcommand = argv.pop(0) if argv and argv[0] in COMMANDS else None
    if subcommand == "verify":
        verify_cli.main(argv, command)
    args = _parser(command, subcommand).parse_args(argv)
    os.environ["JAX_PLATFORMS"] = "cpu"  # conversion runs on the host
    with one_line_errors(program_name(command)):
        print("\n".join(_run(subcommand, args)))
