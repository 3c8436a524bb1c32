"""The command line of sample.py: generates images as PNG files, or prints answers."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from janus_jax import checks
from janus_jax.commands.answers import chat, print_answer
from janus_jax.commands.terminal import (
    OneLineParser,
    Progress,
    device_memory_errors,
    one_line_errors,
    path_arg,
    program_name,
)
from janus_jax.paths import MAX_TEXT_BYTES, atomic_write, check_local

if TYPE_CHECKING:
    from janus_jax.generation.pipeline import Pipeline

_EXAMPLES = """examples:
  generate four images with the small model that ships with janus_jax:
    python sample.py --prompt "a red circle left of a blue square"
  generate 16 images with Janus-Pro-1B:
    python sample.py --model deepseek-ai/Janus-Pro-1B --prompt "a cat" --num_images 16 --seed 7
  ask about two images:
    python sample.py --model deepseek-ai/Janus-Pro-1B --image a.png --image b.png \\
      --question "What has changed?"
  chat about an image:
    python sample.py --chat --image a.png
"""

# Flags, grouped by their heading in --help.
_FLAGS = {
    "model": {
        "--model": dict(
            metavar="PATH",
            help="checkpoint folder or Hugging Face hub id "
            "(default: janus_tiny, the small model that ships with janus_jax)",
        ),
        "--adapter": dict(
            metavar="PATH",
            help="LoRA adapter in PEFT format to merge into the weights: folder or Hugging Face "
            "hub id (default: none)",
        ),
        "--dtype": dict(
            metavar="TYPE",
            help="float32 or bfloat16 (default: float32 on CPU, bfloat16 elsewhere)",
        ),
        "--mesh": dict(
            metavar="AXES",
            help="device mesh, for example data=1,fsdp=1,tensor=4 (default: one device)",
        ),
    },
    "sampling": {
        "--seed": dict(
            type=int,
            default=0,
            metavar="N",
            help="random seed below 2**64; no effect at temperature 0 (default: 0)",
        ),
        "--temperature": dict(
            type=float,
            metavar="X",
            help="sampling temperature; 0 is greedy decoding (default: for images the value in the "
            "checkpoint, or 1 if it has none; for text 0)",
        ),
        "--top_k": dict(
            type=int,
            metavar="N",
            help="sample from the N most likely tokens only; needs a temperature above 0 "
            "(default: all tokens)",
        ),
        "--top_p": dict(
            type=float,
            metavar="X",
            help="nucleus sampling: keep the smallest set of tokens whose probability reaches X; "
            "needs a temperature above 0 (default: all tokens)",
        ),
    },
    "image generation (with --prompt or --prompts_file)": {
        "--num_images": dict(type=int, metavar="N", help="images per prompt (default: 4)"),
        "--guidance_weight": dict(
            type=float,
            metavar="X",
            help="weight of classifier-free guidance: higher values follow the prompt more "
            "closely, 1 disables guidance (default: the value in the checkpoint, or 5 if it has "
            "none)",
        ),
        "--output_dir": dict(
            type=path_arg,
            metavar="DIR",
            help="output directory; files from an identical request are overwritten "
            "(default: samples)",
        ),
        "--max_batch": dict(
            type=int,
            metavar="N",
            help="maximum number of images generated at once "
            "(default: as many as fit a key-value cache of 4 GiB per device)",
        ),
        "--save_indices": dict(
            type=path_arg,
            metavar="FILE.npz",
            help="also save the image tokens to this file (default: do not save them)",
        ),
    },
    "questions (with --question or --chat)": {
        "--image": dict(
            action="append",
            metavar="FILE",
            help="image to ask about; repeat the flag for several images (default: none)",
        ),
        "--allow_urls": dict(
            action="store_true",
            default=None,
            help="allow --image to be an http: or https: URL and download it "
            "(at most 30 s and 64 MiB per image)",
        ),
        "--max_new_tokens": dict(
            type=int, metavar="N", help="maximum number of tokens in an answer (default: 256)"
        ),
    },
}

# Defaults of the flags of each mode. A flag of the other mode is an error.
_IMAGE_DEFAULTS = {
    "num_images": 4,
    "guidance_weight": None,
    "temperature": None,
    "output_dir": Path("samples"),
    "max_batch": None,
    "save_indices": None,
}
_TEXT_DEFAULTS = {"image": [], "allow_urls": False, "max_new_tokens": 256, "temperature": 0.0}


def make_parser(command: str = "python sample.py") -> argparse.ArgumentParser:
    """Returns the parser of all flags. command: how the user calls this program."""
    name = program_name(command)
    parser = OneLineParser(
        name,
        prog=name,
        description="Generate images from text, or answer questions about images, with a Janus "
        "model.",
        epilog=_EXAMPLES.replace("python sample.py", command),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    task = parser.add_argument_group("task (exactly one of these is required)")
    add = task.add_mutually_exclusive_group(required=True).add_argument
    add("--prompt", metavar="TEXT", help="generate images from this text")
    text = "generate images from each line of this text file"
    add("--prompts_file", type=path_arg, metavar="FILE", help=text)
    text = "answer this question; --image adds images to it"
    add("--question", metavar="TEXT", help=text)
    text = "chat in the terminal; --image adds images to the first message"
    add("--chat", action="store_true", help=text)
    for title, flags in _FLAGS.items():
        group = parser.add_argument_group(title)
        for name, settings in flags.items():
            group.add_argument(name, **settings)
    parser.set_defaults(program=parser.prog)
    return parser


def parse_flags(
    argv: Sequence[str] | None, command: str = "python sample.py"
) -> argparse.Namespace:
    """Parses the flags and fills in the defaults of the selected mode.

    Raises:
        ValueError: a flag cannot be combined with the other flags.
    """
    parser = make_parser(command)
    _check_size_flags(parser, sys.argv[1:] if argv is None else argv)
    flags = parser.parse_args(argv)
    for_images = flags.prompt is not None or flags.prompts_file is not None
    mode = "--prompt or --prompts_file" if for_images else "--question or --chat"
    defaults, other = (_IMAGE_DEFAULTS, _TEXT_DEFAULTS)[:: 1 if for_images else -1]
    for name in other.keys() - defaults.keys():
        if getattr(flags, name) is not None:
            raise ValueError(f"--{name} cannot be combined with {mode}; remove it")
    for name, default in defaults.items():
        if getattr(flags, name) is None:
            setattr(flags, name, default)
    for name in ("top_k", "top_p"):
        if getattr(flags, name) is not None and flags.temperature == 0:
            raise ValueError(
                f"--{name} has no effect at temperature 0 (the default for text); set "
                f"--temperature above 0 or remove --{name}"
            )
    return flags


# Names that other programs use for the image size.
_SIZE_FLAGS = ("image_size", "img_size", "size", "width", "height", "resolution", "W", "H")


def _check_size_flags(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Exits with an error if a flag requests an image size."""
    for word in argv:
        flag = word.partition("=")[0]
        if word.startswith("-") and flag.lstrip("-").replace("-", "_") in _SIZE_FLAGS:
            parser.error(
                "a Janus model generates images of one fixed size (384 x 384 pixels for the "
                f"released models); remove {flag} and resize the images afterwards"
            )


def _short_path(path: Path) -> str:
    """Shortens a path for an error message."""
    return checks.shorten_text(str(path))


def read_prompts(path: Path) -> list[str]:
    """Returns the lines of a text file that are not blank, without surrounding white space.

    The file may be a pipe, as the shell creates for <(COMMAND).

    Raises:
        FileNotFoundError: the file does not exist, or is a folder.
        ValueError: the file is not UTF-8 text, is longer than MAX_TEXT_BYTES, or has only blank
            lines.
    """
    shown = _short_path(path)
    if not os.path.exists(path) or os.path.isdir(path):  # Path.exists raises for long names
        raise FileNotFoundError(f"--prompts_file {shown} is not a file")
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(MAX_TEXT_BYTES + 1)  # a device file may be endless
    except UnicodeDecodeError:
        raise ValueError(f"--prompts_file {shown} is not UTF-8 text") from None
    if len(text) > MAX_TEXT_BYTES:
        raise ValueError(f"--prompts_file {shown} must have at most {MAX_TEXT_BYTES} characters")
    lines = text.split("\n")  # not splitlines, which also splits at form feeds
    if not any(line.strip() for line in lines):
        raise ValueError(f"--prompts_file {shown} contains no prompt: all lines are blank")
    return [line.strip() for line in lines if line.strip()]


def _check_paths(flags: argparse.Namespace) -> None:
    """Checks, before the model is loaded, that the output files can be written."""
    if flags.output_dir:
        check_local("--output_dir", flags.output_dir)
        parents = (flags.output_dir, *flags.output_dir.absolute().parents)
        existing = next(folder for folder in parents if os.path.lexists(folder))
        shown = _short_path(flags.output_dir)
        if not existing.is_dir():
            raise ValueError(f"--output_dir {shown}: {existing} is not a folder")
        if not os.access(existing, os.W_OK):
            raise ValueError(f"--output_dir {shown}: {existing} is not writable")
    if flags.save_indices:
        shown = _short_path(flags.save_indices)
        if flags.save_indices.suffix != ".npz":
            raise ValueError(f"--save_indices must name a .npz file, got {shown}")
        folder = flags.save_indices.absolute().parent
        if os.path.isdir(flags.save_indices):
            raise ValueError(f"--save_indices must name a file, but {shown} is a folder")
        if folder == flags.output_dir.absolute():
            return  # it is created later if it does not exist
        if not os.path.isdir(folder):
            raise ValueError(f"--save_indices: folder {_short_path(folder)} does not exist")
        if not os.access(folder, os.W_OK):
            raise ValueError(f"--save_indices: folder {folder} is not writable")


def _check_values(flags: argparse.Namespace) -> None:
    """Checks the values of flags before the model is loaded, and reads the --image files."""
    from janus_jax.generation import samplers
    from janus_jax.processing.image_sources import open_image

    for name in ("prompt", "question"):
        if getattr(flags, name) is not None and not getattr(flags, name).strip():
            got = checks.shorten(getattr(flags, name))
            raise ValueError(f"--{name} must not be blank, got {got}")
    temperature = 1.0 if flags.temperature is None else flags.temperature
    samplers.check_sampling(temperature, flags.top_k, flags.top_p)
    checks.check_seed(flags.seed)
    if flags.guidance_weight is not None:
        checks.check_number("guidance_weight", flags.guidance_weight)
    for name in ("num_images", "max_batch", "max_new_tokens"):
        if getattr(flags, name) is not None:
            checks.check_count(name, getattr(flags, name))
    flags.image = [open_image(image, flags.allow_urls) for image in flags.image or []]


def write_images(flags: argparse.Namespace, prompts: list[str], pipeline: "Pipeline") -> None:
    """Generates images, writes each chunk when it is done, and prints the paths of all files."""
    import numpy as np

    from janus_jax.commands.gallery import Gallery

    chosen = pipeline.image_defaults.resolve(flags.guidance_weight, flags.temperature)
    settings = dict(**chosen._asdict(), top_k=flags.top_k, top_p=flags.top_p)
    dtype = np.dtype(pipeline.model.cfg.language_model.dtype).name
    metadata = {"model": pipeline.name, "settings": json.dumps(settings | {"dtype": dtype})}

    def fields(prompt: str, number: int) -> dict[str, str]:
        request = {"prompt": prompt, "seed": str(flags.seed), "image": str(number)}
        return {**request, **metadata, "software": "janus_jax"}

    gallery = Gallery(flags.output_dir, prompts, flags.num_images, flags.seed, fields)
    counts = dict(num_images=flags.num_images, max_batch=flags.max_batch)
    indices = []
    try:
        # warm_up=2: a program may be compiled before each of the first two reports
        with Progress("generating", " tokens", warm_up=2) as progress:
            chunks = pipeline.stream_images(
                prompts, seed=flags.seed, progress=progress, **counts, **settings
            )
            for chunk in chunks:
                gallery.add(chunk.pixels)
                indices.append(chunk.indices)
        gallery.save_sheets()
    finally:  # after an interrupt or an error, earlier images are kept and their paths printed
        for path in gallery.paths:
            print(path)
    if flags.save_indices:
        prompt_of_image = np.repeat(prompts, flags.num_images)
        columns = dict(prompt=prompt_of_image, seed=flags.seed, **metadata)
        with atomic_write(flags.save_indices) as file:
            np.savez(file, indices=np.concatenate(indices), **columns)
        print(flags.save_indices)


_LOADING_ADVICE = "while loading; use --dtype bfloat16, or a --mesh of more devices"
_IMAGE_ADVICE = "while generating images; use a smaller --max_batch"
_TEXT_ADVICE = "while answering; use fewer images or a smaller --max_new_tokens"


def run(argv: Sequence[str] | None, command: str = "python sample.py") -> None:
    """Runs the command; raises an exception on errors."""
    flags = parse_flags(argv, command)
    _check_paths(flags)
    prompts = [flags.prompt] if flags.prompt is not None else []
    if flags.prompts_file:
        prompts = read_prompts(flags.prompts_file)

    _check_values(flags)

    from janus_jax import sharding
    from janus_jax.generation.pipeline import load

    sharding.check_devices()
    mesh = None if flags.mesh is None else sharding.parse_mesh(flags.mesh)
    name = flags.model or "janus_tiny"
    settings = dict(dtype=flags.dtype, mesh=mesh, adapter=flags.adapter)
    with device_memory_errors(_LOADING_ADVICE), Progress(f"loading {name}", "B") as progress:
        pipeline = load(flags.model, progress=progress, **settings)
    with device_memory_errors(_IMAGE_ADVICE if prompts else _TEXT_ADVICE):
        if prompts:
            write_images(flags, prompts, pipeline)
        elif flags.chat:
            chat(flags, pipeline)
        else:
            print_answer(pipeline, flags.question, flags.image, flags)


def main(argv: Sequence[str] | None = None, command: str = "python sample.py") -> None:
    """Runs the command; errors that a user can cause print one line and exit with status 2.

    Args:
        argv: arguments after the command; None means those of the process.
        command: how the user calls this program, for --help and error messages.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # the encoding may lack characters of a path or answer
    with one_line_errors(program_name(command)):
        run(argv, command)
