"""Fields of a record that are not read, and would change what is learned: never dropped in silence.

The names are those that the usual trainers write: LLaVA, ms-swift, LLaMA-Factory, ShareGPT-4o-Image
and Janus-Pro-R1. A record may have any other field (`id`, `source`, `width`).
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from janus_jax.checks import shorten
from janus_jax.processing.messages import holds, may_hold_image

SYSTEM = ("system", "system_prompt")
_CHANGING = frozenset(
    ("answer", "chosen", "completion", "conversation", "dialog", "dialogue", "function_call",
     "functions", "history", "input", "input_prompt", "instruction", "kto_tag", "negative_messages",
     "objects", "output", "positive_messages", "prompt", "query", "question", "rejected",
     "rejected_messages", "rejected_response", "response", "tool_calls", "tools")
)  # fmt: skip
_OF_CONVERSATIONS = frozenset(("label",))  # whether an answer is liked; elsewhere a class
_OF_MESSAGES = frozenset(("loss", "loss_scale", "train", "weight"))  # what an answer counts
_ORIGIN = frozenset(("id", "key", "link", "page", "source", "uri", "url", "urls"))
_MEDIA_FILE = re.compile(
    r"\S+\.(png|jpe?g|webp|gif|bmp|tiff?|avif|jp2|heic|mp4|webm|mov|avi|mkv|wav|mp3|flac|ogg)"
    r"|data:(image|video|audio)/.*",
    re.IGNORECASE | re.DOTALL,
)


def is_kept(name: str) -> bool:
    """Whether its name says that a field must not be dropped, if it holds anything."""
    return name.lower() in {*SYSTEM, *_CHANGING, *_OF_CONVERSATIONS} or may_hold_image(name, name)


def unread_field(
    fields: Mapping[str, Any], known: Collection[str], is_conversation: bool
) -> str | None:
    """What is wrong with a field of a record that is not known and must not be dropped."""
    changing = _CHANGING | _OF_CONVERSATIONS if is_conversation else _CHANGING
    for name, value in fields.items():
        if name in known or not holds(value):
            continue
        if str(name).lower() in changing:
            return _unread(name, "changes what is to be learned")
        if may_hold_image(str(name), value):
            return _unread(name, "may hold an image, video or audio")
    return None


def unread_field_of_turn(fields: Mapping[str, Any]) -> str | None:
    """The same, where an answer counts for more or less than others."""
    for name in sorted(_OF_MESSAGES & set(fields)):
        if fields[name] not in (None, True, 1):
            return _unread(name, "changes what an answer counts")
    return None


def unread_media(fields: Mapping[str, Any], known: Collection[str]) -> str | None:
    """The same, where the value is a media file or its path, whatever the field's name.

    For records without an image: with one, such a value tells where the image comes from.
    """
    for name, value in fields.items():
        named = name in known or str(name).lower() in _ORIGIN
        values = value[:8] if isinstance(value, (list, tuple)) else [value]
        if not named and any(map(_is_media, values)):
            return _unread(name, "holds the file or the path of an image, video or audio")
    return None


def _unread(name: Any, why: str) -> str:
    return f"{shorten(name)} is not read and {why}; remove the field or rename it"


def _is_media(value: Any) -> bool:
    if isinstance(value, Mapping):  # as Hugging Face's data sets hold an image
        return _is_media(value.get("bytes")) or _is_media(value.get("path"))
    if isinstance(value, str):
        return _MEDIA_FILE.fullmatch(value[:4096]) is not None
    return isinstance(value, bytes) and len(value) > 0
