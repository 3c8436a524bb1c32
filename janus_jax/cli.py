"""The command behind sample.py: flags in; PNG files, or text on the screen, out."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from janus_jax import checks
from janus_jax.flags import OneLineParser, device_memory, one_line, one_line_errors, place
from janus_jax.paths import MAX_TEXT_BYTES, atomic_write, check_local
from janus_jax.progress import Progress

if TYPE_CHECKING:
    from janus_jax.generation.pipeline import Pipeline

_EXAMPLES = """examples:
  python sample.py --prompt "a red circle left of a blue square"
  python sample.py --model deepseek-ai/Janus-Pro-1B --prompt "a cat" --num_images 16 --seed 7
  python sample.py --image a.png --image b.png --question "What has changed?"
  python sample.py --chat --image a.png
"""

# Flags by the heading they have in --help.
_FLAGS = {
    "model": {
        "--model": dict(
            metavar="PATH",
            help="checkpoint folder or Hugging Face hub id (default: the small model that ships)",
        ),
        "--adapter": dict(
            metavar="PATH",
            help="LoRA adapter in PEFT's format to merge into the model: folder or Hugging Face "
            "hub id (default: none)",
        ),
        "--dtype": dict(
            metavar="TYPE",
            help="float32 or bfloat16 (default: float32 on CPU, bfloat16 elsewhere)",
        ),
        "--mesh": dict(
            metavar="AXES",
            help="devices to use, such as data=1,fsdp=1,tensor=4 (default: one device)",
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
            help="0 takes the likeliest token "
            "(default: for images the checkpoint's own, or 1; for text 0)",
        ),
        "--top_k": dict(
            type=int,
            metavar="N",
            help="sample among the N likeliest tokens only, at a temperature above 0",
        ),
        "--top_p": dict(
            type=float,
            metavar="X",
            help="sample among the fewest tokens that reach probability X, likewise",
        ),
    },
    "images to draw": {
        "--num_images": dict(type=int, metavar="N", help="images of each prompt (default: 4)"),
        "--guidance_weight": dict(
            type=float,
            metavar="X",
            help="how closely to follow the prompt; 1 is no guidance "
            "(default: the checkpoint's own, or 5)",
        ),
        "--output_dir": dict(
            type=place,
            metavar="DIR",
            help="where PNG files go; those made alike are replaced (default: samples)",
        ),
        "--max_batch": dict(
            type=int,
            metavar="N",
            help="images drawn at once "
            "(default: as many as have their keys and values in 4 GiB a device)",
        ),
        "--save_indices": dict(type=place, metavar="FILE.npz", help="keep the image tokens too"),
    },
    "questions": {
        "--image": dict(
            action="append", metavar="FILE", help="an image to ask about; may be repeated"
        ),
        "--allow_urls": dict(
            action="store_true",
            default=None,
            help="fetch an --image that is an http: or https: URL (at most 30 s and 64 MiB each)",
        ),
        "--max_new_tokens": dict(type=int, metavar="N", help="longest answer (default: 256)"),
    },
}

# What a flag is when it is not given; a flag of the other mode that IS given is an error.
_DRAW_DEFAULTS = {
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
    name = command.rpartition(" ")[2]
    parser = OneLineParser(
        name,
        prog=name,
        description="Draw images of a prompt, or ask about images, with a Janus model.",
        epilog=_EXAMPLES.replace("python sample.py", command),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    task = parser.add_argument_group("what to do (one of these)")
    add = task.add_mutually_exclusive_group(required=True).add_argument
    add("--prompt", metavar="TEXT", help="draw this")
    add("--prompts_file", type=place, metavar="FILE", help="draw each line of a text file")
    add("--question", metavar="TEXT", help="answer this, about the --image files if any")
    add("--chat", action="store_true", help="talk in several turns, about the --image files if any")
    for title, flags in _FLAGS.items():
        group = parser.add_argument_group(title)
        for name, settings in flags.items():
            group.add_argument(name, **settings)
    parser.set_defaults(program=name)
    return parser


def parse_flags(
    argv: Sequence[str] | None, command: str = "python sample.py"
) -> argparse.Namespace:
    """Flags with the defaults of their mode filled in.

    Raises:
        ValueError: a flag that means nothing beside the others.
    """
    parser = make_parser(command)
    _check_size_flags(parser, sys.argv[1:] if argv is None else argv)
    flags = parser.parse_args(argv)
    drawing = flags.prompt is not None or flags.prompts_file is not None
    mode = "--prompt and --prompts_file" if drawing else "--question and --chat"
    own, other = (_DRAW_DEFAULTS, _TEXT_DEFAULTS)[:: 1 if drawing else -1]
    for name in other.keys() - own.keys():
        if getattr(flags, name) is not None:
            raise ValueError(f"--{name} has no use with {mode}")
    for name, default in own.items():
        if getattr(flags, name) is None:
            setattr(flags, name, default)
    for name in ("top_k", "top_p"):
        if getattr(flags, name) is not None and flags.temperature == 0:
            raise ValueError(f"--{name} has no use with --temperature 0, which text has by default")
    return flags


# What other programs call the size of their images.
_SIZE_FLAGS = ("image_size", "img_size", "size", "width", "height", "resolution", "W", "H")


def _check_size_flags(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Ends the program if a flag asks for a size of the images."""
    for word in argv:
        flag = word.partition("=")[0]
        if word.startswith("-") and flag.lstrip("-").replace("-", "_") in _SIZE_FLAGS:
            parser.error(
                "a Janus model generates images of one size only, the released ones 384 x 384 "
                f"pixels; remove {flag}, and resize the images afterwards"
            )


def _shown(path: Path) -> str:
    """A path in a message."""
    return checks.shorten_text(str(path))


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not blank.

    Raises:
        ValueError: it is no UTF-8 text or too long, or there is no such line. FileNotFoundError: no
            such file. Pipes are read, as the shell makes them of <(COMMAND).
    """
    shown = _shown(path)
    if not os.path.exists(path) or os.path.isdir(path):  # Path.exists raises for long names
        raise FileNotFoundError(f"--prompts_file {shown} is not a file")
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(MAX_TEXT_BYTES + 1)  # a device may have no end
    except UnicodeDecodeError:
        raise ValueError(f"--prompts_file {shown} is not UTF-8 text") from None
    if len(text) > MAX_TEXT_BYTES:
        raise ValueError(f"--prompts_file {shown} must have at most {MAX_TEXT_BYTES} characters")
    lines = text.split("\n")  # not splitlines, which also splits at form feeds
    if not any(line.strip() for line in lines):
        raise ValueError(f"--prompts_file {shown} holds no prompt: every line is blank")
    return [line.strip() for line in lines if line.strip()]


def _check_paths(flags: argparse.Namespace) -> None:
    """Before the model is loaded and hours go by: can the results be kept, are the inputs there."""
    if flags.output_dir:
        check_local("--output_dir", flags.output_dir)
        parents = (flags.output_dir, *flags.output_dir.absolute().parents)
        there = next(folder for folder in parents if os.path.lexists(folder))
        if not there.is_dir():
            raise ValueError(f"--output_dir {_shown(flags.output_dir)}: {there} is not a folder")
        if not os.access(there, os.W_OK):
            shown = _shown(flags.output_dir)
            raise ValueError(f"--output_dir {shown}: {there} cannot be written to")
    if flags.save_indices:
        if flags.save_indices.suffix != ".npz":
            shown = _shown(flags.save_indices)
            raise ValueError(f"--save_indices must name a .npz file, got {shown}")
        folder = flags.save_indices.absolute().parent
        if os.path.isdir(flags.save_indices):
            shown = _shown(flags.save_indices)
            raise ValueError(f"--save_indices must name a file, {shown} is a folder")
        if folder == flags.output_dir.absolute():
            return  # which is made where it is not there
        if not os.path.isdir(folder):
            raise ValueError(f"--save_indices: no folder {_shown(folder)}")
        if not os.access(folder, os.W_OK):
            raise ValueError(f"--save_indices: {folder} cannot be written to")


def _check_values(flags: argparse.Namespace) -> None:
    """Before the model is loaded: what needs no model to be refused; reads the --image files."""
    from janus_jax.generation import samplers
    from janus_jax.processing.image_sources import open_image

    for name in ("prompt", "question"):
        if getattr(flags, name) is not None and not getattr(flags, name).strip():
            got = checks.shorten(getattr(flags, name))
            raise ValueError(f"--{name} must say something, got {got}")
    temperature = 1.0 if flags.temperature is None else flags.temperature
    samplers.check_sampling(temperature, flags.top_k, flags.top_p)
    checks.check_seed(flags.seed)
    if flags.guidance_weight is not None:
        checks.check_number("guidance_weight", flags.guidance_weight)
    for name in ("num_images", "max_batch", "max_new_tokens"):
        if getattr(flags, name) is not None:
            checks.check_count(name, getattr(flags, name))
    flags.image = [open_image(image, flags.allow_urls) for image in flags.image or []]


def draw(flags: argparse.Namespace, prompts: list[str], pipeline: "Pipeline") -> None:
    """Draws, writes the files as they come, and prints the paths of all that are there."""
    import numpy as np

    from janus_jax.gallery import Gallery

    names = ("guidance_weight", "temperature", "top_k", "top_p")
    asked = {name: getattr(flags, name) for name in names}
    settings = asked | {
        name: own for name, own in pipeline.drawing._asdict().items() if asked[name] is None
    }
    dtype = np.dtype(pipeline.model.cfg.language_model.dtype).name
    made = {"model": pipeline.name, "settings": json.dumps(settings | {"dtype": dtype})}

    def fields(prompt: str, number: int) -> dict[str, str]:
        which = {"prompt": prompt, "seed": str(flags.seed), "image": str(number)}
        return {**which, **made, "software": "janus_jax"}

    shown = Gallery(flags.output_dir, prompts, flags.num_images, flags.seed, fields)
    number = dict(num_images=flags.num_images, max_batch=flags.max_batch)
    indices = []
    try:
        # a program may be compiled before the first two reports
        with Progress("generating", " tokens", warm_up=2) as progress:
            drawn = pipeline.stream_images(
                prompts, seed=flags.seed, progress=progress, **number, **settings
            )
            for part in drawn:
                shown.add(part.pixels)
                indices.append(part.indices)
        shown.save_sheets()
    finally:  # an interrupt or a full device does not cost what was drawn before
        for path in shown.paths:
            print(path)
    if flags.save_indices:
        told = dict(prompt=np.repeat(prompts, flags.num_images), seed=flags.seed, **made)
        with atomic_write(flags.save_indices) as file:
            np.savez(file, indices=np.concatenate(indices), **told)
        print(flags.save_indices)


def _print_answer(pipeline: "Pipeline", conversation, images, flags) -> str:
    """Prints the pieces of the answer as they come, and returns it."""
    pieces = []
    settings = {
        name: getattr(flags, name)
        for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
    }
    for piece in pipeline.stream(conversation, images, **settings):
        print(piece, end="", flush=True)
        pieces.append(piece)
    print()
    return "".join(pieces)


def chat(flags: argparse.Namespace, pipeline: "Pipeline") -> None:
    """Reads turns from standard input until it ends."""
    from janus_jax.processing.image_sources import open_image

    commands = "'/image FILE' shows an image, '/new' forgets all that was said, '/quit' ends."
    print(f"Ask away. {commands}", file=sys.stderr)
    messages, shown = [], flags.image
    while (line := _next_line()) is not None:
        try:
            command, _, path = line.partition(" ")
            if command == "/image":
                shown.append(open_image(os.path.expanduser(path.strip()), flags.allow_urls))
                continue
            if line == "/new":
                messages, shown = [], []
                continue
            if command.startswith("/"):
                raise ValueError(f"no command {checks.shorten_text(command)}; {commands}")
            turn = {"role": "user", "content": line, "images": shown}
            answer = _print_answer(pipeline, [*messages, turn], None, flags)
        except (ValueError, OSError) as error:
            print(one_line(flags.program, str(error)), file=sys.stderr)
            continue
        except KeyboardInterrupt:  # of this answer; at the prompt it ends the program
            print("\ninterrupted: neither question nor answer is remembered", file=sys.stderr)
            continue
        messages += [turn, {"role": "assistant", "content": answer}]
        shown = []


def _next_line() -> str | None:
    """The next line that says something; None at the end."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() == "/quit":
            return None
        if line.strip():
            return line.strip()


_LOADING_NEEDS = "while loading; --dtype bfloat16, or --mesh with more devices, needs less of each"
_DRAWING_NEEDS = "while drawing; a smaller --max_batch needs less"
_WRITING_NEEDS = "while answering; fewer images or a smaller --max_new_tokens needs less"


def run(argv: Sequence[str] | None, command: str = "python sample.py") -> None:
    """The whole command; errors are raised."""
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
    with device_memory(_LOADING_NEEDS), Progress(f"loading {name}", "B") as progress:
        pipeline = load(flags.model, progress=progress, **settings)
    with device_memory(_DRAWING_NEEDS if prompts else _WRITING_NEEDS):
        if prompts:
            draw(flags, prompts, pipeline)
        elif flags.chat:
            chat(flags, pipeline)
        else:
            _print_answer(pipeline, flags.question, flags.image, flags)


def main(argv: Sequence[str] | None = None, command: str = "python sample.py") -> None:
    """Runs the command; an error that the user can fix ends it with one line and status 2.

    Args:
        argv: arguments after the command; None means those of the process.
        command: how the user calls this program, for --help and error messages.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # what a terminal cannot show is no reason to stop
    with one_line_errors(command.rpartition(" ")[2]):
        run(argv, command)
