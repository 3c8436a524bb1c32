"""Training records: their fields, and how they are checked, in every container format.

On disk a record is a JSON object: a line of a JSONL file, the .json member of a tar shard, the
columns of a Parquet row, or the msgpack map of an ArrayRecord entry. Its fields are:

* understanding: `image` or `images` (zero or more) and a conversation. The conversation is
  either `conversations`, LLaVA's list of {"from": "human" or "gpt", "value": text}, or
  `messages`, a list of {"role": "user" or "assistant", "content": text}. Both also accept
  DeepSeek's names of roles, and a list of parts as the text (see processing/messages.py). An image
  is placed where a question contains <image> or an image part. If no question does, all images come
  before the first one. A question may also contain its images itself, in `images` or in its parts.
  Turns with the role "system" are not allowed.
* text only: `text`.
* generation: `caption`, and either `image` or the VQ `indices` of the image (row-major).

A record is bad if it has another field that may contain an image or that would change what the
model learns (see unread.py).

An image is a path (JSONL), the bytes of an image file (ArrayRecord), {"bytes": ...} (Parquet), or
a member of the tar shard. It may also be a data: URL, and in JSONL a file: URL. sources.py reads
these formats, and writers.py writes them.
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
_KIND_FIELDS = (*_CONVERSATIONS, "caption", "text")  # a record has exactly one of these
_TURN_FIELDS = ("from", "role", "value", "content", "image", "images")
_LLAVA_ROLES = {"human": "user", "gpt": "assistant"}
_KIND_NAMES = "conversations, messages, caption and text"
_NO_SYSTEM = "a record must not have a system prompt, as all records use the processor's"

ReadImage = Callable[[Any], bytes]
Example = dict[str, np.ndarray]  # the arrays made from a record, see examples.py


class BadRecord(Exception):
    """A record that cannot be used for training.

    Attributes:
        reason: one of a few fixed phrases, by which bad records are counted.
        detail: what is wrong with this record.
        where: location of the record (file and place in it), set by the source.
    """

    def __init__(self, reason: str, detail: str, where: str = ""):
        super().__init__(reason, detail, where)  # unpickling needs all arguments
        self.reason, self.detail, self.where = reason, detail, where

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.where, self.reason, self.detail)))


@dataclasses.dataclass(frozen=True)
class Record:
    """A training record with its images still encoded.

    Attributes:
        kind: one of KINDS.
        turns: pairs (question, answer) of an understanding record.
        text: the text of a text record, or the caption of a generation record.
        images: contents of image files; images to understand, or the image to generate.
        indices: int32[N], the tokens of the image to generate, if they are precomputed.
        where: location of the record (file and place in it), set by the source.
    """

    kind: str
    turns: tuple[tuple[str, str], ...] = ()
    text: str = ""
    images: tuple[bytes, ...] = ()
    indices: np.ndarray | None = None
    where: str = ""


def parse_record(fields: Mapping[str, Any], read_image: ReadImage) -> Record:
    """Makes a Record from its fields (see the module's docstring).

    Args:
        fields: the fields of the record.
        read_image: returns the contents of an image file, given the value of `image` or an item of
            `images`.
    Raises:
        BadRecord: the record cannot be used.
    """
    check_object(fields)
    name = _kind_field(fields)
    is_conversation = name in _CONVERSATIONS
    _check_unread(unread.unread_field(fields, FIELDS, is_conversation))
    if _is_present(fields.get("image")) and _is_present(fields.get("images")):
        raise BadRecord("malformed", "expected image or images, got both")
    if is_conversation:
        record = _understanding(fields, fields[name], read_image)
    elif name == "caption":
        record = _generation(fields, read_image)
    else:
        record = _text(fields)
    has_image = bool(record.images) or record.indices is not None
    for part in (fields, *(fields[name] if is_conversation else ())):
        _check_unread(unread.unread_media(part, (*FIELDS, *_TURN_FIELDS), has_image))
    for text in itertools.chain.from_iterable(record.turns):
        _check_unread(unread.unread_media_in_text(text))
    return record


def _kind_field(fields: Mapping[str, Any]) -> str:
    """Returns the name of the field that determines the kind of the record."""
    not_null = [name for name in _KIND_FIELDS if fields.get(name) is not None]
    not_empty = [name for name in not_null if messages.is_nonempty(fields[name])]
    if not not_null:
        rule = f"a record must have one of {_KIND_NAMES}"
        raise BadRecord("malformed", f"{rule}, got the fields {shorten(list(fields))}")
    if len(not_empty) > 1 and not_empty[0] in _CONVERSATIONS:
        rule = f"a record must have only one of {_KIND_NAMES}"
        raise BadRecord("malformed", f"{rule}, got {' and '.join(not_empty)}")
    if any(messages.is_nonempty(fields.get(name)) for name in unread.SYSTEM):
        raise BadRecord("system turn", _NO_SYSTEM)
    return (not_empty or not_null)[0]


def _check_unread(detail: str | None) -> None:
    """Raises BadRecord if a check of unread.py returned an error message."""
    if detail is not None:
        raise BadRecord("unread field", detail)


def _text(fields: Mapping[str, Any]) -> Record:
    text = fields["text"]
    if not _is_text(text):
        raise BadRecord("malformed", f"text must be a string, got {shorten(text)}")
    if not text.strip():
        raise BadRecord("empty text", f"text must not be empty, got {shorten(text)}")
    others = [name for name in ("image", "images", "indices") if _is_present(fields.get(name))]
    if others:  # the text is most likely a caption, and must not be learned as plain text
        rule = "an image needs a caption or conversations"
        raise BadRecord("malformed", f"{rule}, got text and {others[0]}")
    return Record("text", text=text)


def check_object(fields: Any) -> None:
    """Raises BadRecord unless the value is a mapping."""
    if not isinstance(fields, Mapping):
        raise BadRecord("malformed", f"a record must be an object, got {type(fields).__name__}")


def _generation(fields: Mapping[str, Any], read_image: ReadImage) -> Record:
    caption, indices = fields["caption"], fields.get("indices")
    if not _is_text(caption):
        raise BadRecord("malformed", f"a caption must be a string, got {shorten(caption)}")
    if not caption.strip():
        raise BadRecord("empty caption", f"a caption must not be empty, got {shorten(caption)}")
    if indices is not None:
        return Record("generation", text=caption, indices=_indices(indices))
    images = _images(fields, read_image)
    if len(images) != 1:
        raise BadRecord("malformed", f"a caption needs exactly one image, got {len(images)}")
    return Record("generation", text=caption, images=images)


def _indices(values: Any) -> np.ndarray:
    try:
        indices = np.asarray(values)
    except ValueError:  # nested lists of different lengths
        raise BadRecord("malformed", "indices must be a flat list of integers") from None
    if indices.ndim != 1 or not indices.size or indices.dtype.kind not in "iu":
        got = f"{indices.dtype}{list(indices.shape)}"
        raise BadRecord("malformed", f"indices must be a non-empty list of integers, got {got}")
    if indices.min() < 0 or indices.max() > np.iinfo(np.int32).max:
        got = f"{indices.min()} to {indices.max()}"
        raise BadRecord("malformed", f"indices must be in [0, 2**31), got {got}")
    return indices.astype(np.int32)


def _is_text(value: Any) -> bool:
    """Returns whether a value is a str that UTF-8 can encode; JSON allows lone surrogates."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _is_present(value: Any) -> bool:
    """Returns whether a field has a value: None, [] and "" mean that a row does not have it."""
    return value is not None and not (isinstance(value, (list, tuple, str)) and not value)


def _images(fields: Mapping[str, Any], read_image: ReadImage) -> tuple[bytes, ...]:
    """Reads the images in the record's own fields, not those in its messages."""
    images = fields.get("images")
    if not _is_present(images):
        image = fields.get("image")
        images = image_list(image if _is_present(image) else None)
    if not isinstance(images, (list, tuple)):
        raise BadRecord("malformed", f"images must be a list, got {type(images).__name__}")
    return _read_all(images, read_image)


def _read_all(values: Sequence[Any], read_image: ReadImage) -> tuple[bytes, ...]:
    return tuple(_read(value, read_image) for value in values)


def _read(value: Any, read_image: ReadImage) -> bytes:
    """Returns the contents of an image file, which may also be given by a data: or file: URL."""
    if is_remote(value):
        rule = "training does not fetch images; download the image and give its path"
        raise BadRecord("remote image", f"{rule}, got {shorten_text(value)}")
    try:
        source = resolve(value)
    except ValueError as error:
        raise BadRecord("malformed", str(error)) from None
    is_decoded = isinstance(value, str) and isinstance(source, bytes)
    return source if is_decoded else read_image(source)


def _understanding(fields: Mapping[str, Any], conversation: Any, read_image: ReadImage) -> Record:
    is_list = isinstance(conversation, (list, tuple))
    if not is_list or not all(isinstance(turn, Mapping) for turn in conversation):
        raise BadRecord("malformed", "a conversation must be a list of objects")
    if _is_present(fields.get("indices")):
        raise BadRecord("malformed", "indices need a caption, got a conversation and indices")
    try:
        turns, turn_images = _turns(conversation)
    except ValueError as error:
        raise BadRecord("malformed", str(error)) from None
    record_images = _images(fields, read_image)
    if turn_images and record_images:
        rule = "images must be either in the messages or in the record's own fields"
        got = f"{len(turn_images)} in the messages and {len(record_images)} in the record"
        raise BadRecord("malformed", f"{rule}, got {got}")
    images = record_images or _read_all(turn_images, read_image)
    if images and any(IMAGE_TAG in answer for _, answer in turns):
        raise BadRecord("malformed", f"an answer must not contain an image, got {IMAGE_TAG}")
    return Record("understanding", turns, images=images)


def _turns(
    conversation: Sequence[Mapping[str, Any]],
) -> tuple[tuple[tuple[str, str], ...], list[Any]]:
    """Returns the pairs (question, answer), and the images that the questions contain.

    Raises BadRecord or ValueError.
    """
    roles = [messages.get_either(turn, "from", "role") for turn in conversation]
    names = [_role(role) for role in roles]
    if "system" in names:
        raise BadRecord("system turn", _NO_SYSTEM)
    if None in names:
        rule = "a role must be one of user, human, assistant and gpt"
        raise BadRecord("malformed", f"{rule}, got {shorten(roles[names.index(None)])}")
    if not conversation or names != ["user", "assistant"] * (len(conversation) // 2):
        rule = "a conversation must alternate questions and answers, and end with an answer"
        raise BadRecord("malformed", f"{rule}, got {shorten(roles)}")
    contents = [_turn(turn, name == "user") for turn, name in zip(conversation, names, strict=True)]
    messages.check_indices(messages.get_either(turn, "value", "content") for turn in conversation)
    texts = [text for text, _ in contents]
    turn_images = [image for _, images in contents for image in images]
    for text, images in contents[::2] if turn_images else ():
        if text.count(IMAGE_TAG) != len(images):
            rule = f"a question needs one {IMAGE_TAG} for each of its images"
            got = f"{len(images)} images and {text.count(IMAGE_TAG)} {IMAGE_TAG}"
            raise BadRecord("malformed", f"{rule}, got {got}")
    if not all(map(_is_text, texts)):
        raise BadRecord("malformed", "the text of a turn must be a string that UTF-8 can encode")
    if not all(text.strip() for text in texts[1::2]):
        raise BadRecord("empty answer", "an answer must not be empty")
    return tuple(zip(texts[::2], texts[1::2], strict=True)), turn_images


def _role(role: Any) -> str | None:
    return _LLAVA_ROLES.get(role) if role in ("human", "gpt") else generic_role(role)


def _turn(turn: Mapping[str, Any], is_question: bool) -> tuple[str, list[Any]]:
    """Returns the text of a turn, with an IMAGE_TAG for each image, and the turn's images."""
    messages.check_fields(turn, _TURN_FIELDS)
    _check_unread(unread.unread_field_of_turn(turn))
    content = messages.get_either(turn, "value", "content")
    if is_question and isinstance(content, str):
        content = content.replace(IMAGE, IMAGE_TAG)  # DeepSeek's placeholder
    text, images = messages.read_content(turn, content, IMAGE_TAG)
    has_image_part = isinstance(content, (list, tuple)) and IMAGE_TAG in text
    if not is_question and (images or has_image_part):
        raise BadRecord("malformed", "only a question may contain an image, got one in an answer")
    return text, images


def record_fields(record: Record, put_image: Callable[[bytes], Any]) -> dict[str, Any]:
    """Returns the fields of a record (see the module's docstring); the inverse of parse_record.

    Args:
        record: a record.
        put_image: returns the value of `image` or an item of `images`, given the contents of an
            image file.
    """
    if record.kind == "text":
        return {"text": record.text}
    if record.kind == "generation":
        if record.indices is not None:
            return {"caption": record.text, "indices": record.indices.tolist()}
        return {"caption": record.text, "image": put_image(record.images[0])}
    turns = [pair for turn in record.turns for pair in zip(("human", "gpt"), turn, strict=True)]
    fields = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    if record.images:
        fields["images"] = list(map(put_image, record.images))
    return fields
