"""Fields of a record that are not read, and would change what is learned: never dropped in silence.

The names are those that the usual trainers write: LLaVA, ms-swift, LLaMA-Factory, ShareGPT-4o-Image
and Janus-Pro-R1. A record may have any other field (`id`, `source`, `width`).
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from janus_jax.checks import shorten, shorten_text
from janus_jax.processing.messages import contains_media, is_media, is_nonempty, may_be_media

SYSTEM = ("system", "system_prompt", "system_message")
_CHANGING = frozenset(
    ("answer", "chosen", "completion", "conversation", "dialog", "dialogue", "function_call",
     "functions", "history", "input", "input_prompt", "instruction", "kto_tag", "negative_messages",
     "objects", "output", "positive_messages", "prompt", "query", "question", "rejected",
     "rejected_messages", "rejected_response", "response", "tool_calls", "tools")
)  # fmt: skip
_OF_CONVERSATIONS = frozenset(("label",))  # whether an answer is liked; elsewhere a class
_OF_MESSAGES = frozenset(("loss", "loss_scale", "train", "weight"))  # what an answer counts
_OF_OWN_IMAGE = re.compile(r"file|path|name|ur[il]|source|src|origin|link|page|key|id$", re.I)
_IN_TAGS = re.compile(r"<(img|image|video|audio)>([^<]{1,4096})</\1>")


def is_kept(name: str) -> bool:
    """Whether its name says that a field must not be dropped, if it holds anything."""
    return name.lower() in {*SYSTEM, *_CHANGING, *_OF_CONVERSATIONS} or may_be_media(name, name)


def unread_field(
    fields: Mapping[str, Any], known: Collection[str], is_conversation: bool
) -> str | None:
    """What is wrong with a field of a record that is not known and must not be dropped."""
    changing = _CHANGING | _OF_CONVERSATIONS if is_conversation else _CHANGING
    for name, value in fields.items():
        if name in known or not is_nonempty(value):
            continue
        if str(name).lower() in changing:
            return _unread(name, "changes what is to be learned")
        if may_be_media(str(name), value):
            return _unread(name, "may hold an image, video or audio")
    return None


def unread_field_of_turn(fields: Mapping[str, Any]) -> str | None:
    """The same, where an answer counts for more or less than others."""
    for name in sorted(_OF_MESSAGES & set(fields)):
        if fields[name] not in (None, True, 1):
            return _unread(name, "changes what an answer counts")
    return None


def unread_media(
    fields: Mapping[str, Any], known: Collection[str], has_image: bool = False
) -> str | None:
    """The same, where the value is or holds a media file or its path, whatever the field's name.

    has_image: whether the record has an image of its own; a file name or a path then tells where
        that image comes from.
    """
    origin = {"origin": _OF_OWN_IMAGE} if has_image else {}
    for name, value in fields.items():
        if name not in known and contains_media({name: value}, **origin):
            return _unread(name, "holds the file or the path of an image, video or audio")
    return None


def unread_media_in_text(text: str) -> str | None:
    """The same for `<img>a.png</img>` and the like, as ms-swift and Qwen-VL write an image."""
    for found in _IN_TAGS.finditer(text):
        if is_media(found[2].strip()):
            where = "put its path into images and <image> in its place"
            return f"{shorten_text(found[0])} is not read as an image, video or audio; {where}"
    return None


def _unread(name: Any, why: str) -> str:
    return f"{shorten(name)} is not read and {why}; remove the field or rename it"
