"""What a training record is, whichever container it lies in.

On disk a record is a JSON object (a line of a JSONL file, the .json of a tar shard, the columns of
a Parquet row, the msgpack map of an ArrayRecord entry) with these fields:

* understanding: `image` or `images` (none, one or more images) and `conversations`, LLaVA's list
  of {"from": "human" or "gpt", "value": text}; or `messages`, a list of {"role": "user" or
  "assistant", "content": text}, with DeepSeek's names of roles or these; a list of parts may stand
  for the text (see processing/messages.py). An image stands where a question says <image> or has
  an image part; where no question has a place, all stand before the first. A question may hold its
  images itself, in `images` or in its parts. There is no turn of the system.
* text only: `text`.
* generation: `caption` and `image`, or in place of the image its VQ `indices` (row-major).

A record with another field that may hold an image, or that changes what is to be learned, is bad
(see unread.py).

An image is a path (JSONL), the bytes of an image file (ArrayRecord), {"bytes": ...} (Parquet), or
a member of the tar shard; or a data: URL, and in JSONL a file: URL. What sources.py reads,
writers.py writes.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from janus_jax.checks import shorten, shorten_text
from janus_jax.data import unread
from janus_jax.processing import messages
from janus_jax.processing.chat import generic_role
from janus_jax.processing.image_sources import is_remote, resolve
from janus_jax.processing.images import image_list
from janus_jax.processing.tokenizer import IMAGE

KINDS = ("understanding", "text", "generation")
IMAGE_TAG = "<image>"
FIELDS = ("image", "images", "conversations", "messages", "text", "caption", "indices")
_CONVERSATIONS = ("conversations", "messages")
_SAYING = (*_CONVERSATIONS, "caption", "text")  # one of them says what kind of record it is
_OF_TURN = ("from", "role", "value", "content", "image", "images")
_LLAVA_ROLES = {"human": "user", "gpt": "assistant"}
_ONE_OF = "a record must have one of conversations, messages, caption and text"
_SYSTEM_IS_FIXED = "the prompt of the system is the same for all records"

ReadImage = Callable[[Any], bytes]


class BadRecord(Exception):
    """A record that cannot be trained on.

    Attributes:
        reason: one of a few fixed phrases, by which bad records are counted.
        detail: what exactly is wrong with this one.
        where: the record's file and place in it, filled in by the source.
    """

    def __init__(self, reason: str, detail: str, where: str = ""):
        super().__init__(reason, detail, where)  # all three, or it could not be unpickled
        self.reason, self.detail, self.where = reason, detail, where

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.where, self.reason, self.detail)))


@dataclasses.dataclass(frozen=True)
class Record:
    """One record, images still encoded.

    Attributes:
        kind: one of KINDS.
        turns: (question, answer) of an understanding record.
        text: of a text record; the caption of a generation record.
        images: the bytes of image files, to be looked at or to be drawn.
        indices: int32[N] of the image to be drawn, where they were computed before.
        where: the record's file and place in it, filled in by the source.
    """

    kind: str
    turns: tuple[tuple[str, str], ...] = ()
    text: str = ""
    images: tuple[bytes, ...] = ()
    indices: np.ndarray | None = None
    where: str = ""


def parse_record(fields: Mapping[str, Any], read_image: ReadImage) -> Record:
    """A record from its fields (module docstring).

    read_image: what `image` or an item of `images` holds -> the bytes of the image's file.
    Raises BadRecord.
    """
    check_object(fields)
    name = _saying(fields)
    is_conversation = name in _CONVERSATIONS
    _refuse(unread.unread_field(fields, FIELDS, is_conversation))
    if _holds(fields.get("image")) and _holds(fields.get("images")):
        raise BadRecord("malformed", "expected image or images, got both")
    if is_conversation:
        record = _understanding(fields, fields[name], read_image)
    elif name == "caption":
        record = _generation(fields, read_image)
    else:
        record = _text(fields)
    has_image = bool(record.images) or record.indices is not None
    for part in (fields, *(fields[name] if is_conversation else ())):
        _refuse(unread.unread_media(part, (*FIELDS, *_OF_TURN), has_image))
    for said in itertools.chain.from_iterable(record.turns):
        _refuse(unread.unread_media_in_text(said))
    return record


def _saying(fields: Mapping[str, Any]) -> str:
    """The field that says what kind of record it is."""
    given = [name for name in _SAYING if fields.get(name) is not None]
    held = [name for name in given if messages.is_nonempty(fields[name])]
    if not given:
        raise BadRecord("malformed", f"{_ONE_OF}, got the fields {shorten(list(fields))}")
    if len(held) > 1 and held[0] in _CONVERSATIONS:
        raise BadRecord("malformed", f"{_ONE_OF}, got {' and '.join(held)}")
    if any(messages.is_nonempty(fields.get(name)) for name in unread.SYSTEM):
        raise BadRecord("system turn", _SYSTEM_IS_FIXED)
    return (held or given)[0]


def _refuse(detail: str | None) -> None:
    """Raises BadRecord if there is anything to say of a field."""
    if detail is not None:
        raise BadRecord("unread field", detail)


def _text(fields: Mapping[str, Any]) -> Record:
    text = fields["text"]
    if not _is_text(text):
        raise BadRecord("malformed", f"text must be text, got {shorten(text)}")
    if not text.strip():
        raise BadRecord("empty text", "a text record must say something")
    beside = [name for name in ("image", "images", "indices") if _holds(fields.get(name))]
    if beside:  # most likely a caption: learned as plain text, nobody would know
        rule = "an image needs a caption or conversations"
        raise BadRecord("malformed", f"{rule}, got text and {beside[0]}")
    return Record("text", text=text)


def check_object(fields: Any) -> None:
    """Raises BadRecord for what has no fields."""
    if not isinstance(fields, Mapping):
        raise BadRecord("malformed", f"a record must be an object, got {type(fields).__name__}")


def _generation(fields: Mapping[str, Any], read_image: ReadImage) -> Record:
    caption, indices = fields["caption"], fields.get("indices")
    if not _is_text(caption):
        raise BadRecord("malformed", f"a caption must be text, got a {type(caption).__name__}")
    if not caption.strip():
        raise BadRecord("empty caption", f"a caption must say something, got {shorten(caption)}")
    if indices is not None:
        return Record("generation", text=caption, indices=_indices(indices))
    images = _images(fields, read_image)
    if len(images) != 1:
        raise BadRecord("malformed", f"a caption needs one image, got {len(images)}")
    return Record("generation", text=caption, images=images)


def _indices(values: Any) -> np.ndarray:
    try:
        indices = np.asarray(values)
    except ValueError:  # lists of several lengths
        raise BadRecord("malformed", "indices must be one list of integers") from None
    if indices.ndim != 1 or not indices.size or indices.dtype.kind not in "iu":
        got = f"{indices.dtype}{list(indices.shape)}"
        rule = "indices must be a list of integers, of one or more"
        raise BadRecord("malformed", f"{rule}, got {got}")
    if indices.min() < 0 or indices.max() > np.iinfo(np.int32).max:
        got = f"{indices.min()} to {indices.max()}"
        raise BadRecord("malformed", f"indices must be at least 0 and fit 32 bits, got {got}")
    return indices.astype(np.int32)


def _is_text(value: Any) -> bool:
    """A str that can be written as UTF-8: JSON can state half of a surrogate pair."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _holds(value: Any) -> bool:
    """Neither nothing nor an empty list or text, which rows hold in a field they do without."""
    return value is not None and not (isinstance(value, (list, tuple, str)) and not value)


def _images(fields: Mapping[str, Any], read_image: ReadImage) -> tuple[bytes, ...]:
    """Those beside what is said."""
    images = fields.get("images")
    if not _holds(images):
        single = fields.get("image")
        images = image_list(single if _holds(single) else None)
    if not isinstance(images, (list, tuple)):
        raise BadRecord("malformed", f"images must be a list, got {type(images).__name__}")
    return _read_all(images, read_image)


def _read_all(values: Sequence[Any], read_image: ReadImage) -> tuple[bytes, ...]:
    return tuple(_read(value, read_image) for value in values)


def _read(value: Any, read_image: ReadImage) -> bytes:
    """The bytes of an image file, also from a data: or file: URL."""
    if is_remote(value):
        rule = "training does not fetch images; download it and give its path"
        raise BadRecord("remote image", f"{rule}, got {shorten_text(value)}")
    try:
        source = resolve(value)
    except ValueError as error:
        raise BadRecord("malformed", str(error)) from None
    is_read = isinstance(value, str) and isinstance(source, bytes)
    return source if is_read else read_image(source)


def _understanding(fields: Mapping[str, Any], said: Any, read_image: ReadImage) -> Record:
    """Questions and answers in pairs, and their images."""
    if not isinstance(said, (list, tuple)) or not all(isinstance(turn, Mapping) for turn in said):
        raise BadRecord("malformed", "a conversation must be a list of objects")
    if _holds(fields.get("indices")):
        raise BadRecord("malformed", "indices need a caption, got conversations and indices")
    try:
        turns, own = _turns(said)
    except ValueError as error:
        raise BadRecord("malformed", str(error)) from None
    beside = _images(fields, read_image)
    if own and beside:
        got = f"{len(own)} in the messages and {len(beside)} beside them"
        rule = "images must be in the messages or beside them, not both"
        raise BadRecord("malformed", f"{rule}, got {got}")
    images = beside or _read_all(own, read_image)
    if images and any(IMAGE_TAG in answer for _, answer in turns):
        raise BadRecord("malformed", f"an answer cannot hold an image, got {IMAGE_TAG} in it")
    return Record("understanding", turns, images=images)


def _turns(said: Sequence[Mapping[str, Any]]) -> tuple[tuple[tuple[str, str], ...], list[Any]]:
    """Questions and answers in pairs, and the images that the questions hold.

    Raises BadRecord or ValueError.
    """
    roles = [messages.get_either(turn, "from", "role") for turn in said]
    names = [_role(role) for role in roles]
    if "system" in names:
        raise BadRecord("system turn", _SYSTEM_IS_FIXED)
    if None in names:
        rule = "a role must be user or human, assistant or gpt"
        raise BadRecord("malformed", f"{rule}, got {shorten(roles[names.index(None)])}")
    if not said or names != ["user", "assistant"] * (len(said) // 2):
        got = shorten(roles)
        raise BadRecord("malformed", f"questions and answers must alternate, got {got}")
    read = [_turn(turn, name == "user") for turn, name in zip(said, names, strict=True)]
    messages.check_indices(messages.get_either(turn, "value", "content") for turn in said)
    texts, own = [text for text, _ in read], [image for _, images in read for image in images]
    for text, images in read[::2] if own else ():
        if text.count(IMAGE_TAG) != len(images):
            got = f"{len(images)} images for {text.count(IMAGE_TAG)} places"
            rule = "a question needs one place for each of its images"
            raise BadRecord("malformed", f"{rule}, got {got}")
    if not all(map(_is_text, texts)):
        raise BadRecord("malformed", "what is said must be text")
    if not all(text.strip() for text in texts[1::2]):
        raise BadRecord("empty answer", "every answer must say something")
    return tuple(zip(texts[::2], texts[1::2], strict=True)), own


def _role(role: Any) -> str | None:
    return _LLAVA_ROLES.get(role) if role in ("human", "gpt") else generic_role(role)


def _turn(turn: Mapping[str, Any], asks: bool) -> tuple[str, list[Any]]:
    """The text of a turn, with IMAGE_TAG at the place of each image, and its own images."""
    messages.check_fields(turn, _OF_TURN)
    _refuse(unread.unread_field_of_turn(turn))
    content = messages.get_either(turn, "value", "content")
    if asks and isinstance(content, str):
        content = content.replace(IMAGE, IMAGE_TAG)  # as DeepSeek writes it
    text, images = messages.read_content(turn, content, IMAGE_TAG)
    in_parts = isinstance(content, (list, tuple)) and IMAGE_TAG in text
    if not asks and (images or in_parts):
        raise BadRecord("malformed", "only a question can hold an image, got one in an answer")
    return text, images


def record_fields(record: Record, put_image: Callable[[bytes], Any]) -> dict[str, Any]:
    """The fields of a record (module docstring), the inverse of parse_record.

    put_image: the bytes of an image's file -> what `image` or an item of `images` holds.
    """
    if record.kind == "text":
        return {"text": record.text}
    if record.kind == "generation":
        if record.indices is not None:
            return {"caption": record.text, "indices": record.indices.tolist()}
        return {"caption": record.text, "image": put_image(record.images[0])}
    said = [pair for turn in record.turns for pair in zip(("human", "gpt"), turn, strict=True)]
    fields = {"conversations": [{"from": role, "value": text} for role, text in said]}
    if record.images:
        fields["images"] = list(map(put_image, record.images))
    return fields
