"""Detects fields of a record that are not read but would change what the model learns.

A record with such a field is bad; the field is never ignored silently. The names are those used by
common trainers and data sets: LLaVA, ms-swift, LLaMA-Factory, ShareGPT-4o-Image and Janus-Pro-R1. A
record may have any other field (`id`, `source`, `width`).
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from janus_jax.checks import shorten, shorten_text
from janus_jax.processing.messages import contains_media, is_media, is_nonempty, may_be_media

SYSTEM = ("system", "system_prompt", "system_message")
_CHANGES_TARGETS = frozenset(
    ("answer", "chosen", "completion", "conversation", "dialog", "dialogue", "function_call",
     "functions", "history", "input", "input_prompt", "instruction", "kto_tag", "negative_messages",
     "objects", "output", "positive_messages", "prompt", "query", "question", "rejected",
     "rejected_messages", "rejected_response", "response", "tool_calls", "tools")
)  # fmt: skip
# With a conversation, whether its answer is preferred; in other records the name of a class.
_PREFERENCE_FIELDS = frozenset(("label",))
_WEIGHT_FIELDS = frozenset(("loss", "loss_scale", "train", "weight"))  # loss weight of an answer
_IMAGE_ORIGIN = re.compile(r"file|path|name|ur[il]|source|src|origin|link|page|key|id$", re.I)
_MEDIA_TAG = re.compile(r"<(img|image|video|audio)>([^<]{1,4096})</\1>")


def must_not_ignore(name: str) -> bool:
    """Returns whether a field of this name must not be ignored if it has a value."""
    names = {*SYSTEM, *_CHANGES_TARGETS, *_PREFERENCE_FIELDS}
    return name.lower() in names or may_be_media(name, name)


def unread_field(
    fields: Mapping[str, Any], known: Collection[str], is_conversation: bool
) -> str | None:
    """Returns an error message if a field has a name that must not be ignored, else None.

    Args:
        fields: the fields of a record.
        known: names of fields that are read.
        is_conversation: whether the record is a conversation.
    """
    changing = _CHANGES_TARGETS | _PREFERENCE_FIELDS if is_conversation else _CHANGES_TARGETS
    for name, value in fields.items():
        if name in known or not is_nonempty(value):
            continue
        if str(name).lower() in changing:
            return _message(name, "changes what the model learns")
        if may_be_media(str(name), value):
            return _message(name, "may hold an image, video or audio")
    return None


def unread_field_of_turn(fields: Mapping[str, Any]) -> str | None:
    """Returns an error message if a turn sets the loss weight of an answer, else None."""
    for name in sorted(_WEIGHT_FIELDS & set(fields)):
        if fields[name] not in (None, True, 1):
            return _message(name, "changes the loss weight of an answer")
    return None


def unread_media(
    fields: Mapping[str, Any], known: Collection[str], has_image: bool = False
) -> str | None:
    """Returns an error message if a field of any name contains a media file or its path, else None.

    Args:
        fields: the fields of a record or a turn.
        known: names of fields that are read.
        has_image: whether the record contains an image. If so, a field named like a file name or
            a path is assumed to describe the origin of that image, and is allowed.
    """
    origin = {"origin": _IMAGE_ORIGIN} if has_image else {}
    for name, value in fields.items():
        if name not in known and contains_media({name: value}, **origin):
            return _message(name, "contains an image, video or audio, or its path")
    return None


def unread_media_in_text(text: str) -> str | None:
    """Returns an error message if a text contains <img>a.png</img> or a similar tag, else None.

    ms-swift and Qwen-VL write images in this way.
    """
    for match in _MEDIA_TAG.finditer(text):
        if is_media(match[2].strip()):
            hint = "put its path into images and <image> in its place"
            return f"{shorten_text(match[0])} is not read as an image, video or audio; {hint}"
    return None


def _message(name: Any, why: str) -> str:
    return f"{shorten(name)} is not read and {why}; remove or rename the field"
