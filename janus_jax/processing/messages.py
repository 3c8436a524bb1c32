"""The text and the images of a message, in each of the forms that people have.

Inference and training read messages with this parser. A message holds its images in `images` or
`image`, one or a list, or among the parts of its content, which is a text or a list of

* {"type": "text", "text": text};
* {"type": "image"}, the place of an image that is given beside the messages; or with the image in
  one of `image`, `url`, `path` and `base64`, as transformers writes it;
* {"type": "image_url", "image_url": {"url": url}} or the URL itself, as OpenAI writes it.

Source: `apply_chat_template` of transformers, and the chat template of its Janus checkpoints.
"""

import numbers
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from janus_jax.checks import shorten
from janus_jax.processing.image_sources import decode_base64, is_base64_image
from janus_jax.processing.images import ImageSource, image_list

_SOURCES = ("image", "url", "path", "base64")
_MEDIA = ("image", "img", "image", "photo", "pixel", "video", "audio", "attachment")
_DESCRIBING = re.compile(
    r"(^|[\W_])(ids?|sizes?|width|height|resolutions?|shapes?|hash|md5|sha\d+|format|mode|license"
    r"|captions?|descriptions?|titles?|tags|categor(y|ies)|embeddings?|features?|scores?)$"
)
_CHANGING = frozenset(
    ("tools", "tool_calls", "tool_call_id", "function_call", "reasoning", "reasoning_content",
     "thinking")
)  # fmt: skip
_ORIGIN = re.compile(r"^(id|key|link|page|source|uri|urls?)$", re.IGNORECASE)
_MEDIA_FILE = re.compile(
    r"\S+\.(png|jpe?g|webp|gif|bmp|tiff?|avif|jp2|heic|mp4|webm|mov|avi|mkv|wav|mp3|flac|ogg)"
    r"|data:(image|video|audio)/.*",
    re.IGNORECASE | re.DOTALL,
)


def is_nonempty(value: Any) -> bool:
    """Whether a field holds anything; tables have None, "" or [] in the fields a row lacks."""
    return value is not None and not (
        isinstance(value, (str, bytes, Sequence, Mapping)) and not len(value)
    )


def may_be_media(name: str, value: Any) -> bool:
    """Whether a field may hold an image, a video or audio, by its name: not numbers, nor an id."""
    name = name.lower()
    named = any(stem in name for stem in _MEDIA) and not _DESCRIBING.search(name)
    return named and is_nonempty(value) and not _only_numbers(value)


def contains_media(value: Any, origin: re.Pattern = _ORIGIN, most_nested: int = 4) -> bool:
    """Whether a value is or holds a media file or its path.

    origin: names of fields, at any depth, that only say where something is from.
    """
    if isinstance(value, Mapping):  # as Hugging Face's data sets hold an image, among others
        parts = [part for name, part in value.items() if not origin.search(str(name))]
    elif isinstance(value, (list, tuple)):
        parts = value[:8]
    else:
        return is_media(value)
    return most_nested > 0 and any(contains_media(part, origin, most_nested - 1) for part in parts)


def is_media(value: Any) -> bool:
    """Whether a value is a media file, its path or its base64 text."""
    if isinstance(value, str):
        start = value[:4096]
        return _MEDIA_FILE.fullmatch(start) is not None or is_base64_image(start)
    return isinstance(value, bytes) and len(value) > 0


def _only_numbers(value: Any, most_nested: int = 4) -> bool:
    if isinstance(value, (list, tuple)):
        return most_nested > 0 and all(_only_numbers(part, most_nested - 1) for part in value)
    return isinstance(value, numbers.Number)


def check_fields(fields: Mapping[str, Any], known: Collection[str]) -> None:
    """Raises ValueError for a field of a message that is not known, and must not be dropped."""
    for name, value in fields.items():
        if name in known or not is_nonempty(value):
            continue
        if name in _CHANGING or may_be_media(str(name), value):
            rule = "a message must be a role, content and images"
            raise ValueError(f"{rule}; {shorten(name)} is not read, remove or rename it")


def check_media(fields: Mapping[str, Any], known: Collection[str]) -> None:
    """Raises ValueError for another field of a message that holds a media file or its path."""
    for name, value in fields.items():
        if name not in known and contains_media({name: value}):
            rule = "images of a message must be in its content, image or images"
            raise ValueError(f"{rule}; {shorten(name)} is not read, remove or rename it")


def get_either(fields: Mapping[str, Any], first: str, second: str) -> Any:
    """The value of one of two fields that mean the same, None where neither is held.

    Raises:
        ValueError: both are.
    """
    if is_nonempty(fields.get(first)) and is_nonempty(fields.get(second)):
        raise ValueError(f"expected {first} or {second}, got both")
    return fields.get(first) if fields.get(first) is not None else fields.get(second)


def read_content(message: Mapping[str, Any], content: Any, tag: str) -> tuple[str, list[Any]]:
    """The text of a message, with a tag at the place of each image, and its own images.

    Where the message holds images but its text has no place for them, all come before the text,
    each followed by a line break, as the original demo does.

    Args:
        content: of the message, a text or a list of parts.
        tag: the text that stands for an image.
    Returns:
        The text and the images in the order of their places: no image if the message has only
        places. A text may have other places than those of the images; the caller compares them.
    Raises:
        ValueError: another type or part, or images both in the content and beside it.
    """
    text, images = content, []
    if isinstance(content, (list, tuple)):
        text, images = _read_parts(content, tag)
    elif not isinstance(content, str):
        got = type(content).__name__
        raise ValueError(f"a message's content must be a string or a list of parts, got {got}")
    own = get_either(message, "images", "image")
    if not is_nonempty(own):
        return text, images
    if images:
        raise ValueError("expected images in the content or beside it, got both")
    images = image_list(own)
    return (text if tag in text else f"{tag}\n" * len(images) + text), images


def _read_parts(parts: Sequence[Any], tag: str) -> tuple[str, list[ImageSource]]:
    """Joined as by the chat template of transformers' Janus checkpoints.

    A line break stands between an image and what is beside it, a space between two texts.
    """
    read = [_read_part(part) for part in parts]
    text = ""
    for i, (said, _) in enumerate(read):
        if said is None:
            text += "\n" * (i > 0) + tag + "\n" * (i < len(read) - 1)
        else:
            text += " " * (i > 0 and read[i - 1][0] is not None) + said
    places = [image for said, image in read if said is None]
    images = [image for image in places if image is not None]
    if images and len(images) < len(places):
        rule = "either all image parts of a message must hold their image, or none"
        raise ValueError(f"{rule}, got {len(images)} of {len(places)}")
    return text, images


def _read_part(part: Any) -> tuple[str | None, ImageSource | None]:
    """Its text and None; or None and its image, which is None for a place."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    held = {name for name, value in part.items() if is_nonempty(value)} if kind else set()
    if kind == "text" and isinstance(part.get("text"), str):
        _check_part(held - {"type", "text"}, "a text part")
        return part["text"], None
    if kind == "image":
        given = held - {"type", "index"}
        _check_part(given - set(_SOURCES), "an image part")
        if len(given) > 1:
            raise ValueError(f"an image part must hold one image, got {shorten(sorted(given))}")
        name = next(iter(given), None)
        if name == "base64":
            return None, decode_base64(part[name])
        return None, None if name is None else part[name]
    if kind == "image_url":
        _check_part(held - {"type", "image_url"}, "an image_url part")
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, Mapping) else url
        if isinstance(url, str) and url:
            return None, url
    rule = "a part must hold its type (text, image or image_url) and a text or image"
    raise ValueError(f"{rule}, got {shorten(part)}")


def _check_part(unread: Collection[str], what: str) -> None:
    if unread:
        names = shorten(sorted(map(str, unread)))
        raise ValueError(f"{what} has fields that are not read: {names}")


def check_indices(contents: Iterable[Any]) -> None:
    """The `index` of an image part, as data sets of Hugging Face have it, must be its number.

    Args:
        contents: of all messages of a conversation, read before.
    Raises:
        ValueError: it is another number.
    """
    parts = [part for parts in contents if isinstance(parts, (list, tuple)) for part in parts]
    images = [part for part in parts if part["type"] != "text"]
    for number, part in enumerate(images):
        if part.get("index") not in (None, number):
            rule = "image parts must be in the order of the images"
            raise ValueError(f"{rule}, got index {shorten(part['index'])} for image {number}")
