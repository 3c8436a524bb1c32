"""webdataset's tar shards as a source of records."""

import dataclasses
import os
import tarfile
from pathlib import Path
from typing import BinaryIO

import numpy as np

from janus_jax.checks import error_text
from janus_jax.data.reading import (
    IMAGE_SUFFIXES,
    INDICES_SUFFIX,
    UNREAD_SUFFIXES,
    Paths,
    Source,
    check_text_size,
    find_files,
    image_bytes,
    opened,
    parse_json,
    parse_npy,
)
from janus_jax.data.records import BadRecord, Record, parse_record
from janus_jax.paths import MAX_FILE_BYTES, os_errors_of
from janus_jax.processing.images import image_list

# What a member is, by the end of its name; of all but images a record has one at most.
_SINGLE = (".json", ".txt", INDICES_SUFFIX)
_KINDS = {suffix: kind for kind, suffix in enumerate(_SINGLE)}
_KINDS |= dict.fromkeys(IMAGE_SUFFIXES, len(_SINGLE))
_UNREAD = len(_SINGLE) + 1
_KINDS |= dict.fromkeys(UNREAD_SUFFIXES, _UNREAD)

_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
_BLOCK = 512
_HEADER_BYTES = 2**15  # names are shorter, and tarfile takes quadratic time for a header's fields


class TarSource(Source):
    """webdataset shards: a tar file, several, or the *.tar of a folder. None may be compressed.

    Members whose names are equal up to the first dot after the last slash are one record: those
    with one of IMAGE_SUFFIXES its images, in their order in the shard (000123.0.jpg,
    000123.1.jpg); `.txt` its caption, without white space around it; `.npy` its indices; `.json`
    all other fields, where `image` or `images` only tell how many images there must be. A record
    with one of UNREAD_SUFFIXES is bad; members with other names are not looked at.

    Place: "data/shard-0001.tar:000123".
    """

    def __init__(self, path: Paths):
        self._files = find_files(path, "*.tar")
        self._shards = [_index(file) for file in self._files]
        super().__init__(path, [len(shard.starts) - 1 for shard in self._shards])

    def _where(self, part: int, position: int) -> str:
        shard = self._shards[part]
        key = shard.keys[slice(*shard.key_starts[position : position + 2])]
        return f"{self._files[part]}:{os.fsdecode(key)}"

    def _read(self, part: int, position: int) -> Record:
        shard = self._shards[part]
        members = shard.members[slice(*shard.starts[position : position + 2])]
        if (members[:, 0] == _UNREAD).any():
            rule = f"images must be {', '.join(IMAGE_SUFFIXES)}"
            raise BadRecord("unread field", f"{rule}, got another format, a video or audio")
        _check_sizes(members[:, 2])
        held = [[] for _ in (*_SINGLE, "images")]
        with os_errors_of(self._files[part]), self._files[part].open("rb") as file:
            for kind, offset, size in members.tolist():
                file.seek(offset)
                held[kind].append(file.read(size))
        for suffix, raws in zip(_SINGLE, held[:-1], strict=True):
            if len(raws) > 1:
                raise BadRecord("malformed", f"a record has one {suffix} at most, got {len(raws)}")
        return _parse(*held)


def _check_sizes(sizes: np.ndarray) -> None:
    """Raises BadRecord for members that are no files, and for more than may be read."""
    if sizes.min() < 0:
        raise BadRecord("malformed", "a member must be a plain file, not a link or a sparse file")
    if sizes.sum() > MAX_FILE_BYTES:
        rule = f"the members of a record must have at most {MAX_FILE_BYTES} bytes"
        raise BadRecord("malformed", f"{rule}, got {sizes.sum()}")


def _parse(jsons: list[bytes], texts: list[bytes], arrays: list[bytes], images) -> Record:
    fields = parse_json(jsons[0]) if jsons else {}
    if texts:
        fields["caption"] = _decode(texts[0])
    if arrays:
        fields["indices"] = parse_npy(arrays[0])
    single, named = fields.pop("image", None), fields.pop("images", None)
    if single and named:
        raise BadRecord("malformed", "expected image or images, got both")
    if not named:
        named = image_list(single)
    if isinstance(named, list) and len(named) > len(images) and fields.get("indices") is None:
        raise BadRecord("missing file", f"{len(named)} images named, {len(images)} are there")
    return parse_record({**fields, "images": images}, image_bytes)


def _decode(raw: bytes) -> str:
    check_text_size(len(raw))
    try:
        return raw.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise BadRecord("malformed", f"a caption must be UTF-8 text: {error}") from None


@dataclasses.dataclass(frozen=True)
class _Shard:
    """Where the records of a tar file are.

    Attributes:
        keys: their names up to the first dot, joined: one of them may be thousands of bytes long.
        key_starts: int64[N + 1], the first byte of each.
        starts: int64[N + 1], the first member of each.
        members: int64[M, 3], kind (of _KINDS), offset and size, record by record; the size of what
            is no plain file is -1.
    """

    keys: bytes
    key_starts: np.ndarray
    starts: np.ndarray
    members: np.ndarray


def _index(path: Path) -> _Shard:
    """Reads the headers of a tar file. Raises ValueError for another or a damaged file."""
    records = {}
    for member in opened(path, "a plain tar", _members):
        folder, slash, name = member.name.rpartition("/")
        kind = _KINDS.get(Path(name).suffix.lower())
        if kind is not None and not member.isdir():
            key = folder + slash + name.partition(".")[0]
            size = member.size if member.isreg() and not member.issparse() else -1
            records.setdefault(key, []).append((kind, member.offset_data, size))
    keys = [os.fsencode(key) for key in records]
    return _Shard(
        keys=b"".join(keys),
        key_starts=np.cumsum([0, *map(len, keys)]),
        starts=np.cumsum([0, *map(len, records.values())]),
        members=np.array([place for held in records.values() for place in held], np.int64),
    )


def _members(path: Path) -> list[tarfile.TarInfo]:
    with os_errors_of(path), path.open("rb") as file:
        if file.read(8).startswith(_COMPRESSED):
            raise ValueError("it is compressed, and records could not be read in any order")
        file.seek(0)
        try:
            members, end = _headers(file)
        except OSError:
            raise
        except Exception as error:  # tarfile raises anything at all on broken headers
            raise ValueError(error_text(error)) from None
        # tarfile takes a damaged header for the end
        file.seek(end)
        if any(file.read(_BLOCK)):
            raise ValueError(f"the header at byte {end} is damaged")
    return members


def _headers(file: BinaryIO) -> tuple[list[tarfile.TarInfo], int]:
    """The members, and where the next header would be."""
    tar = tarfile.open(fileobj=_HeaderFile(file), mode="r:")
    while (member := tar.next()) is not None:
        # a size below 0 leads back to the same header, for ever
        if member.size < 0 or tar.offset <= member.offset:
            raise ValueError(f"the header at byte {member.offset} states a size below 0")
    return tar.members, tar.offset


class _HeaderFile:
    """A tar file of which tarfile can only read headers: others state their own, huge size."""

    def __init__(self, file: BinaryIO):
        self._file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        """Raises ValueError for more bytes than a header has."""
        if not 0 <= size <= _HEADER_BYTES:
            got = f"the one before byte {self.tell()} states {size}"
            raise ValueError(f"a header must have at most {_HEADER_BYTES} bytes, {got}")
        return self._file.read(size)
