"""A source of records that reads webdataset's tar shards."""

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
    open_as,
    parse_json,
    parse_npy,
)
from janus_jax.data.records import BadRecord, Record, parse_record
from janus_jax.paths import MAX_FILE_BYTES, os_errors_of
from janus_jax.processing.images import image_list

# The kind of a member by the suffix of its name. Except for images, a record has at most one member
# of each kind.
_SINGLE = (".json", ".txt", INDICES_SUFFIX)
_KINDS = {suffix: kind for kind, suffix in enumerate(_SINGLE)}
_KINDS |= dict.fromkeys(IMAGE_SUFFIXES, len(_SINGLE))
_UNREAD = len(_SINGLE) + 1
_KINDS |= dict.fromkeys(UNREAD_SUFFIXES, _UNREAD)

_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
_BLOCK = 512
# Maximum size of an extended header. Real names are shorter, and tarfile takes quadratic time to
# parse the fields of a header.
_HEADER_BYTES = 2**15


class TarSource(Source):
    """Reads webdataset shards: a tar file, several, or the *.tar files of a folder.

    Shards must not be compressed. The members of a record have the same name up to the first dot
    after the last slash. Members with one of IMAGE_SUFFIXES are its images, in their order in the
    shard (000123.0.jpg, 000123.1.jpg). `.txt` is its caption; surrounding white space is removed.
    `.npy` contains its indices. `.json` contains all other fields; of `image` or `images` in it,
    only the number of images is used, to detect missing ones. A record with one of UNREAD_SUFFIXES
    is bad. Members with other suffixes are ignored.

    Location of a record: "data/shard-0001.tar:000123".
    """

    def __init__(self, path: Paths):
        self._files = find_files(path, "*.tar")
        self._shards = [_index_shard(file) for file in self._files]
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
        contents = [[] for _ in (*_SINGLE, "images")]
        with os_errors_of(self._files[part]), self._files[part].open("rb") as file:
            for kind, offset, size in members.tolist():
                file.seek(offset)
                contents[kind].append(file.read(size))
        for suffix, raws in zip(_SINGLE, contents[:-1], strict=True):
            if len(raws) > 1:
                rule = f"a record must have at most one {suffix} member"
                raise BadRecord("malformed", f"{rule}, got {len(raws)}")
        return _parse(*contents)


def _check_sizes(sizes: np.ndarray) -> None:
    """Raises BadRecord if a member is not a regular file, or if the members are too large."""
    if sizes.min() < 0:
        rule = "a member must be a regular file"
        raise BadRecord("malformed", f"{rule}, got a link, a sparse file or a device")
    if sizes.sum() > MAX_FILE_BYTES:
        rule = f"the members of a record must have at most {MAX_FILE_BYTES} bytes in total"
        raise BadRecord("malformed", f"{rule}, got {sizes.sum()}")


def _parse(jsons: list[bytes], texts: list[bytes], arrays: list[bytes], images) -> Record:
    fields = parse_json(jsons[0]) if jsons else {}
    if texts:
        fields["caption"] = _decode(texts[0])
    if arrays:
        fields["indices"] = parse_npy(arrays[0])
    image, image_names = fields.pop("image", None), fields.pop("images", None)
    if image and image_names:
        raise BadRecord("malformed", "expected image or images, got both")
    if not image_names:
        image_names = image_list(image)
    too_few = isinstance(image_names, list) and len(image_names) > len(images)
    if too_few and fields.get("indices") is None:
        expected = f"expected {len(image_names)} images, as named in .json"
        raise BadRecord("missing file", f"{expected}, got {len(images)} image members")
    return parse_record({**fields, "images": images}, image_bytes)


def _decode(raw: bytes) -> str:
    check_text_size(len(raw))
    try:
        return raw.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise BadRecord("malformed", f"a caption must be UTF-8 text: {error}") from None


@dataclasses.dataclass(frozen=True)
class _Shard:
    """The index of a tar file: where its N records and their M members are.

    Attributes:
        keys: the names of the records, concatenated. A name may have thousands of bytes, so an
            array of fixed-size strings could be huge.
        key_starts: int64[N + 1], offset of each record's name in `keys`.
        starts: int64[N + 1], index of each record's first member.
        members: int64[M, 3], the kind (see _KINDS), offset and size of each member, grouped by
            record. The size is -1 if the member is not a regular file.
    """

    keys: bytes
    key_starts: np.ndarray
    starts: np.ndarray
    members: np.ndarray


def _index_shard(path: Path) -> _Shard:
    """Reads the headers of a tar file. Raises ValueError if they are damaged or not of a tar."""
    records = {}
    for member in open_as("uncompressed tar", path, _members):
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
        members=np.array([member for group in records.values() for member in group], np.int64),
    )


def _members(path: Path) -> list[tarfile.TarInfo]:
    with os_errors_of(path), path.open("rb") as file:
        if file.read(8).startswith(_COMPRESSED):
            raise ValueError("it is compressed, which prevents random access; decompress it")
        file.seek(0)
        try:
            members, end = _headers(file)
        except OSError:
            raise
        except Exception as error:  # tarfile raises many kinds of errors for damaged headers
            raise ValueError(error_text(error)) from None
        # tarfile mistakes a damaged header for the end of the file.
        file.seek(end)
        if any(file.read(_BLOCK)):
            raise ValueError(f"the header at byte {end} is damaged")
    return members


def _headers(file: BinaryIO) -> tuple[list[tarfile.TarInfo], int]:
    """Returns the members, and the offset at which the next header would be."""
    tar = tarfile.open(fileobj=_HeaderFile(file), mode="r:")
    while (member := tar.next()) is not None:
        # A negative size leads back to the same header, in an endless loop.
        if member.size < 0 or tar.offset <= member.offset:
            raise ValueError(f"the header at byte {member.offset} states a negative size")
    return tar.members, tar.offset


class _HeaderFile:
    """Restricts tarfile to small reads, as a header may state a huge size for itself."""

    def __init__(self, file: BinaryIO):
        self._file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        """Reads a header. Raises ValueError if it would have more than _HEADER_BYTES bytes."""
        if not 0 <= size <= _HEADER_BYTES:
            got = f"got a size of {size} before byte {self.tell()}"
            raise ValueError(f"a header must have at most {_HEADER_BYTES} bytes, {got}")
        return self._file.read(size)
