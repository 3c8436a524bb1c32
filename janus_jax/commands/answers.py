"""Prints answers in the terminal: to one question, or to the messages of a chat."""

import argparse
import os
import sys
from typing import TYPE_CHECKING

from janus_jax import checks
from janus_jax.commands.terminal import error_line

if TYPE_CHECKING:
    from janus_jax.generation.pipeline import Pipeline


def print_answer(pipeline: "Pipeline", conversation, images, flags) -> str:
    """Prints the answer while it is generated, and returns it."""
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
    """Answers questions and runs commands from standard input until /quit or its end."""
    from janus_jax.processing.image_sources import open_image

    commands = (
        "'/image FILE' adds an image to your next message, '/new' starts a new conversation, "
        "'/quit' exits."
    )
    print(f"Type a message. Commands: {commands}", file=sys.stderr)
    messages, images = [], flags.image
    while (line := _next_line()) is not None:
        try:
            command, _, path = line.partition(" ")
            if command == "/image":
                images.append(open_image(os.path.expanduser(path.strip()), flags.allow_urls))
                continue
            if line == "/new":
                messages, images = [], []
                continue
            if command.startswith("/"):
                got = checks.shorten_text(command)
                raise ValueError(f"unknown command {got}; commands: {commands}")
            turn = {"role": "user", "content": line, "images": images}
            answer = print_answer(pipeline, [*messages, turn], None, flags)
        except (ValueError, OSError) as error:
            print(error_line(flags.program, str(error)), file=sys.stderr)
            continue
        except KeyboardInterrupt:  # stops this answer; at the input prompt it ends the program
            print("\nInterrupted; this turn was discarded.", file=sys.stderr)
            continue
        messages += [turn, {"role": "assistant", "content": answer}]
        images = []


def _next_line() -> str | None:
    """Returns the next line that is not blank, or None at /quit or the end of the input."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() == "/quit":
            return None
        if line.strip():
            return line.strip()
