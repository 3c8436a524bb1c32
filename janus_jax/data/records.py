"""What a training record is, whichever container it lies in.

On disk a record is a JSON object (a line of a JSONL file, the .json of a tar shard, the columns of
a Parquet row, the msgpack map of an ArrayRecord entry) with these fields:

* understanding: `image` or `images` (none, one or more pictures) and `conversations`, LLaVA's list
  of {"from": "human" or "gpt", "value": text}; or `messages`, a list of {"role": "user" or
  "assistant", "content": text}, where a list of parts may stand for the text, {"type": "text",
  "text": text} or {"type": "image"}. A picture stands where a question says <image> or has an image
  part; where no question has a place, all stand before the first. There is no turn of the system.
* text only: `text`.
* generation: `caption` and `image`, or in place of the picture its VQ `indices` (row-major).

A picture is a path (JSONL), the bytes of a picture file (ArrayRecord), {"bytes": ...} (Parquet), or
a member of the tar shard. What sources.py reads, writers.py writes.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

KINDS = ("understanding", "text", "generation")
PICTURE_TAG = "<image>"
_ASKING = {"human": True, "user": True, "gpt": False, "assistant": False}

ReadPicture = Callable[[Any], bytes]


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
    """One record, pictures still encoded.

    Attributes:
        kind: one of KINDS.
        turns: (question, answer) of an understanding record.
        text: of a text record; the caption of a generation record.
        pictures: the bytes of picture files, to be looked at or to be drawn.
        indices: int32[N] of the picture to be drawn, where they were computed before.
        where: the record's file and place in it, filled in by the source.
    """

    kind: str
    turns: tuple[tuple[str, str], ...] = ()
    text: str = ""
    pictures: tuple[bytes, ...] = ()
    indices: np.ndarray | None = None
    where: str = ""


def parse_record(fields: Mapping[str, Any], read_picture: ReadPicture) -> Record:
    """A record from its fields (module docstring).

    read_picture: what `image` or an item of `images` holds -> the bytes of the picture's file.
    Raises BadRecord.
    """
    check_object(fields)
    if fields.get("conversations") is not None or fields.get("messages") is not None:
        return Record("understanding", _turns(fields), pictures=_pictures(fields, read_picture))
    if fields.get("caption") is not None:
        return _generation(fields, read_picture)
    text = fields.get("text")
    if not _is_text(text):
        raise BadRecord("malformed", f"no conversations, caption or text in {list(fields)}")
    if not text.strip():
        raise BadRecord("empty text", "a text record must say something")
    beside = [name for name in ("image", "images", "indices") if _holds(fields.get(name))]
    if beside:  # most likely a caption: learned as plain text, nobody would know
        rule = "a picture needs a caption or conversations"
        raise BadRecord("malformed", f"{rule}, got text and {beside[0]}")
    return Record("text", text=text)


def check_object(fields: Any) -> None:
    """Raises BadRecord for what has no fields."""
    if not isinstance(fields, Mapping):
        raise BadRecord("malformed", f"a record must be an object, got {type(fields).__name__}")


def _generation(fields: Mapping[str, Any], read_picture: ReadPicture) -> Record:
    caption, indices = fields["caption"], fields.get("indices")
    if not _is_text(caption):
        raise BadRecord("malformed", f"a caption must be text, got a {type(caption).__name__}")
    if not caption.strip():
        raise BadRecord("empty caption", f"a caption must say something, got {caption!r}")
    if indices is not None:
        return Record("generation", text=caption, indices=_indices(indices))
    pictures = _pictures(fields, read_picture)
    if len(pictures) != 1:
        raise BadRecord("malformed", f"a caption needs one picture, got {len(pictures)}")
    return Record("generation", text=caption, pictures=pictures)


def _indices(values: Any) -> np.ndarray:
    try:
        indices = np.asarray(values)
    except ValueError:  # lists of several lengths
        raise BadRecord("malformed", "indices must be one list of whole numbers") from None
    if indices.ndim != 1 or not indices.size or indices.dtype.kind not in "iu":
        got = f"{indices.dtype}{list(indices.shape)}"
        rule = "indices must be a list of whole numbers, of one or more"
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
    """Neither nothing nor an empty list, which tables hold in a column that a row does without."""
    return value is not None and not (isinstance(value, (list, tuple)) and not value)


def _pictures(fields: Mapping[str, Any], read_picture: ReadPicture) -> tuple[bytes, ...]:
    images = fields.get("images")
    if not _holds(images):
        images = [] if fields.get("image") is None else [fields["image"]]
    if not isinstance(images, (list, tuple)):
        raise BadRecord("malformed", f"images must be a list, got {type(images).__name__}")
    return tuple(map(read_picture, images))


def _turns(fields: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Questions and answers in pairs."""
    said = fields.get("conversations")
    said = fields.get("messages") if said is None else said
    if not isinstance(said, (list, tuple)) or not all(isinstance(turn, Mapping) for turn in said):
        raise BadRecord("malformed", "a conversation must be a list of objects")
    roles = [turn.get("from", turn.get("role")) for turn in said]
    if "system" in roles:
        raise BadRecord("system turn", "the prompt of the system is the same for all records")
    asking = [_ASKING.get(role) if isinstance(role, str) else None for role in roles]
    if not said or asking != [True, False] * (len(said) // 2):
        raise BadRecord("malformed", f"questions and answers must alternate, got {roles}")
    numbers = itertools.count()
    texts = [
        _joined(turn.get("value", turn.get("content")), asks, numbers)
        for turn, asks in zip(said, asking, strict=True)
    ]
    if not all(map(_is_text, texts)):
        raise BadRecord("malformed", "what is said must be text")
    if not all(text.strip() for text in texts[1::2]):
        raise BadRecord("empty answer", "every answer must say something")
    return tuple(zip(texts[::2], texts[1::2], strict=True))


def _joined(content: Any, asks: bool, numbers: Iterator[int]) -> Any:
    """The text of a list of parts; other contents as they are."""
    if not isinstance(content, (list, tuple)):
        return content
    return "".join(_part(part, asks, numbers) for part in content)


def _part(part: Any, asks: bool, numbers: Iterator[int]) -> str:
    """The text of a part, or the place of a picture; numbers: of the pictures, in their order."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and _is_text(part.get("text")):
        return part["text"]
    if kind != "image" or not asks:
        rule = "parts must be text, or in a question the places of pictures"
        raise BadRecord("malformed", f"{rule}, got {part!r:.100}")
    held = [name for name, value in part.items() if value is not None and value != ""]
    if set(held) - {"type", "index"}:
        rule = "an image part must leave its picture to the field images"
        raise BadRecord("malformed", f"{rule}, got {held}")
    number = next(numbers)
    if part.get("index", number) not in (number, None):
        rule = "image parts must be in the order of the pictures"
        raise BadRecord("malformed", f"{rule}, got {part['index']!r} for {number}")
    return f"{PICTURE_TAG}\n"  # as chat templates write it


def record_fields(record: Record, put_picture: Callable[[bytes], Any]) -> dict[str, Any]:
    """The fields of a record (module docstring), the inverse of parse_record.

    put_picture: the bytes of a picture's file -> what `image` or an item of `images` holds.
    """
    if record.kind == "text":
        return {"text": record.text}
    if record.kind == "generation":
        if record.indices is not None:
            return {"caption": record.text, "indices": record.indices.tolist()}
        return {"caption": record.text, "image": put_picture(record.pictures[0])}
    said = [pair for turn in record.turns for pair in zip(("human", "gpt"), turn, strict=True)]
    fields = {"conversations": [{"from": role, "value": text} for role, text in said]}
    if record.pictures:
        fields["images"] = list(map(put_picture, record.pictures))
    return fields
