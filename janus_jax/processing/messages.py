"""Parses the text and the images of messages in the formats of DeepSeek, transformers and OpenAI.

Inference and training share this parser. A message has its images, one or a list, in the field
`images` or `image`, or among the parts of its content. The content is a string or a list of these
parts:

* {"type": "text", "text": text};
* {"type": "image"} with the image in `image`, `url`, `path` or `base64` (format of transformers).
  Without these fields the part is a placeholder for an image that is passed separately;
* {"type": "image_url", "image_url": {"url": url}}, or the URL in place of the dict (format of
  OpenAI's API).

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
# Words in the names of fields that contain images, video or audio.
_MEDIA = ("image", "img", "picture", "photo", "pixel", "video", "audio", "attachment")
# Ends of the names of fields that describe an image, but do not contain it.
_DESCRIBING = re.compile(
    r"(^|[\W_])(ids?|sizes?|width|height|resolutions?|shapes?|hash|md5|sha\d+|format|mode|license"
    r"|captions?|descriptions?|titles?|tags|categor(y|ies)|embeddings?|features?|scores?)$"
)
# Fields that change the meaning of a message, and are not supported.
_UNSUPPORTED = frozenset(
    ("tools", "tool_calls", "tool_call_id", "function_call", "reasoning", "reasoning_content",
     "thinking")
)  # fmt: skip
# Names of fields that only say where a value comes from.
_ORIGIN = re.compile(r"^(id|key|link|page|source|uri|urls?)$", re.IGNORECASE)
# File names, and data: URLs, of images, video and audio.
_MEDIA_FILE = re.compile(
    r"\S+\.(png|jpe?g|webp|gif|bmp|tiff?|avif|jp2|heic|mp4|webm|mov|avi|mkv|wav|mp3|flac|ogg)"
    r"|data:(image|video|audio)/.*",
    re.IGNORECASE | re.DOTALL,
)


def is_nonempty(value: Any) -> bool:
    """Returns whether a field has a value; tables store a missing one as None, "" or []."""
    return value is not None and not (
        isinstance(value, (str, bytes, Sequence, Mapping)) and not len(value)
    )


def may_be_media(name: str, value: Any) -> bool:
    """Returns whether a field may contain an image, video or audio, judging by its name.

    Empty values and numbers, and fields that describe an image, such as "image_id", do not count.
    """
    name = name.lower()
    is_media_name = any(stem in name for stem in _MEDIA) and not _DESCRIBING.search(name)
    return is_media_name and is_nonempty(value) and not _only_numbers(value)


def contains_media(value: Any, origin: re.Pattern = _ORIGIN, max_depth: int = 4) -> bool:
    """Returns whether a value is, or contains, a media file or the path of one.

    Args:
        origin: fields with matching names are ignored at any depth, because they only say where a
            value comes from.
        max_depth: maximum number of nested mappings and lists that are searched.
    """
    if isinstance(value, Mapping):  # for example an image in a Hugging Face data set
        parts = [part for name, part in value.items() if not origin.search(str(name))]
    elif isinstance(value, (list, tuple)):
        parts = value[:8]
    else:
        return is_media(value)
    return max_depth > 0 and any(contains_media(part, origin, max_depth - 1) for part in parts)


def is_media(value: Any) -> bool:
    """Returns whether a value is a media file, as bytes or base64, or the path of one."""
    if isinstance(value, str):
        start = value[:4096]
        return _MEDIA_FILE.fullmatch(start) is not None or is_base64_image(start)
    return isinstance(value, bytes) and len(value) > 0


def _only_numbers(value: Any, max_depth: int = 4) -> bool:
    if isinstance(value, (list, tuple)):
        return max_depth > 0 and all(_only_numbers(part, max_depth - 1) for part in value)
    return isinstance(value, numbers.Number)


def check_fields(fields: Mapping[str, Any], known: Collection[str]) -> None:
    """Raises ValueError for an unknown field of a message that must not be ignored."""
    for name, value in fields.items():
        if name in known or not is_nonempty(value):
            continue
        if name in _UNSUPPORTED or may_be_media(str(name), value):
            raise ValueError(
                "a message must have only role, content and images, got the field "
                f"{shorten(name)}; remove or rename it"
            )


def check_media(fields: Mapping[str, Any], known: Collection[str]) -> None:
    """Raises ValueError for an unknown field that contains a media file or the path of one."""
    for name, value in fields.items():
        if name not in known and contains_media({name: value}):
            raise ValueError(
                "a message must have its images in content, image or images, got a media file in "
                f"{shorten(name)}; remove or rename the field"
            )


def get_either(fields: Mapping[str, Any], first: str, second: str) -> Any:
    """Returns the value of one of two equivalent fields; None if both are missing.

    Raises:
        ValueError: both fields have a value.
    """
    if is_nonempty(fields.get(first)) and is_nonempty(fields.get(second)):
        raise ValueError(f"expected {first} or {second}, got both")
    return fields.get(first) if fields.get(first) is not None else fields.get(second)


def read_content(message: Mapping[str, Any], content: Any, tag: str) -> tuple[str, list[Any]]:
    """Returns the text of a message, with a placeholder for each image, and the images.

    If the message has images but its text has no placeholders, these are put in front of the text,
    each followed by a line break, as in the original demo.

    Args:
        message: the fields of the message.
        content: the content of the message, a string or a list of parts.
        tag: the placeholder, a string that stands for one image.
    Returns:
        The text, and the images in the order of their placeholders. The list is empty if the
        images are passed separately. The numbers of placeholders and images may differ; the caller
        compares them.
    Raises:
        ValueError: the content or a part has another type, or there are images both in the content
            and in `images` or `image`.
    """
    text, images = content, []
    if isinstance(content, (list, tuple)):
        text, images = _read_parts(content, tag)
    elif not isinstance(content, str):
        got = type(content).__name__
        raise ValueError(f"a message's content must be a string or a list of parts, got {got}")
    separate = get_either(message, "images", "image")
    if not is_nonempty(separate):
        return text, images
    if images:
        raise ValueError("a message must have images either in content or in images, got both")
    images = image_list(separate)
    return (text if tag in text else f"{tag}\n" * len(images) + text), images


def _read_parts(parts: Sequence[Any], tag: str) -> tuple[str, list[ImageSource]]:
    """Joins parts like the chat template of transformers' Janus checkpoints.

    An image is separated from its neighbors by a line break, and a text from the next text by a
    space.
    """
    parsed = [_read_part(part) for part in parts]
    joined = ""
    for i, (text, _) in enumerate(parsed):
        if text is None:
            joined += "\n" * (i > 0) + tag + "\n" * (i < len(parsed) - 1)
        else:
            joined += " " * (i > 0 and parsed[i - 1][0] is not None) + text
    image_parts = [image for text, image in parsed if text is None]
    images = [image for image in image_parts if image is not None]
    if images and len(images) < len(image_parts):
        raise ValueError(
            "either all image parts of a message must contain an image, or none, "
            f"got {len(images)} of {len(image_parts)}"
        )
    return joined, images


def _read_part(part: Any) -> tuple[str | None, ImageSource | None]:
    """Returns (text, None) or (None, image). The image is None if the part is a placeholder."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    fields = {name for name, value in part.items() if is_nonempty(value)} if kind else set()
    if kind == "text" and isinstance(part.get("text"), str):
        _check_part(fields - {"type", "text"}, "a text part")
        return part["text"], None
    if kind == "image":
        sources = fields - {"type", "index"}
        _check_part(sources - set(_SOURCES), "an image part")
        if len(sources) > 1:
            raise ValueError(f"an image part must have one image, got {shorten(sorted(sources))}")
        name = next(iter(sources), None)
        if name == "base64":
            return None, decode_base64(part[name])
        return None, None if name is None else part[name]
    if kind == "image_url":
        _check_part(fields - {"type", "image_url"}, "an image_url part")
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, Mapping) else url
        if isinstance(url, str) and url:
            return None, url
    raise ValueError(
        "a part of a message must have a type (text, image or image_url) and a text or an image, "
        f"got {shorten(part)}"
    )


def _check_part(unsupported: Collection[str], what: str) -> None:
    if unsupported:
        names = shorten(sorted(map(str, unsupported)))
        raise ValueError(f"{what} has unsupported fields, remove them: {names}")


def check_indices(contents: Iterable[Any]) -> None:
    """Checks the `index` of image parts, a field of some Hugging Face data sets.

    Args:
        contents: contents of all messages of a conversation; read_content has accepted them.
    Raises:
        ValueError: an index is not the number of its image in the conversation.
    """
    parts = [part for parts in contents if isinstance(parts, (list, tuple)) for part in parts]
    images = [part for part in parts if part["type"] != "text"]
    for number, part in enumerate(images):
        if part.get("index") not in (None, number):
            raise ValueError(
                "image parts must be in the order of their index, "
                f"got index {shorten(part['index'])} for image {number}"
            )
