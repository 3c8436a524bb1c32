"""webdataset's tar shards as a source of records."""

import dataclasses
import os
import tarfile
from pathlib import Path

import numpy as np

from janus_jax.data.reading import (
    INDICES_SUFFIX,
    PICTURE_SUFFIXES,
    Paths,
    Source,
    find_files,
    opened,
    parse_json,
    parse_npy,
    picture_bytes,
)
from janus_jax.data.records import BadRecord, Record, parse_record

# What a member is, by the end of its name; of all but pictures a record has one at most.
_SINGLE = (".json", ".txt", INDICES_SUFFIX)
_KINDS = {suffix: kind for kind, suffix in enumerate(_SINGLE)}
_KINDS |= dict.fromkeys(PICTURE_SUFFIXES, len(_SINGLE))

_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
_BLOCK = 512


class TarSource(Source):
    """webdataset shards: a tar file, several, or the *.tar of a folder. None may be compressed.

    Members whose names are equal up to the first dot after the last slash are one record: `.jpg`,
    `.jpeg`, `.png` and `.webp` its pictures, in their order in the shard (000123.0.jpg,
    000123.1.jpg); `.txt` its caption, without white space around it; `.npy` its indices; `.json`
    all other fields, where `image` or `images` only tell how many pictures there must be. Members
    with other names are not looked at.

    Place: "data/shard-0001.tar:000123".
    """

    def __init__(self, path: Paths):
        self._files = find_files(path, "*.tar")
        self._shards = [_index(file) for file in self._files]
        super().__init__(path, [len(shard.keys) for shard in self._shards])

    def _where(self, part: int, position: int) -> str:
        return f"{self._files[part]}:{os.fsdecode(self._shards[part].keys[position])}"

    def _read(self, part: int, position: int) -> Record:
        shard = self._shards[part]
        members = shard.members[slice(*shard.starts[position : position + 2])]
        held = [[] for _ in (*_SINGLE, "pictures")]
        with self._files[part].open("rb") as file:
            for kind, offset, size in members.tolist():
                file.seek(offset)
                held[kind].append(file.read(size))
        for suffix, raws in zip(_SINGLE, held[:-1], strict=True):
            if len(raws) > 1:
                raise BadRecord("malformed", f"a record has one {suffix} at most, got {len(raws)}")
        return _parse(*held)


def _parse(jsons: list[bytes], texts: list[bytes], arrays: list[bytes], pictures) -> Record:
    fields = parse_json(jsons[0]) if jsons else {}
    if texts:
        fields["caption"] = _decode(texts[0])
    if arrays:
        fields["indices"] = parse_npy(arrays[0])
    single, named = fields.pop("image", None), fields.pop("images", None)
    if named is None:
        named = [] if single is None else [single]
    if isinstance(named, list) and len(named) > len(pictures) and fields.get("indices") is None:
        raise BadRecord("missing file", f"{len(named)} pictures named, {len(pictures)} are there")
    return parse_record({**fields, "images": pictures}, picture_bytes)


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise BadRecord("malformed", f"a caption must be UTF-8 text: {error}") from None


@dataclasses.dataclass(frozen=True)
class _Shard:
    """Where the records of a tar file are.

    Attributes:
        keys: bytes[N], their names up to the first dot.
        starts: int64[N + 1], the first member of each.
        members: int64[M, 3], kind (of _KINDS), offset and size, record by record.
    """

    keys: np.ndarray
    starts: np.ndarray
    members: np.ndarray


def _index(path: Path) -> _Shard:
    """Reads the headers of a tar file. Raises ValueError for another or a damaged file."""
    records = {}
    for member in opened(path, "a plain tar", _members):
        folder, slash, name = member.name.rpartition("/")
        kind = _KINDS.get(Path(name).suffix.lower())
        if kind is not None and member.isreg():
            key = folder + slash + name.partition(".")[0]
            records.setdefault(key, []).append((kind, member.offset_data, member.size))
    return _Shard(
        keys=np.array([os.fsencode(key) for key in records]),
        starts=np.cumsum([0, *map(len, records.values())]),
        members=np.array([place for held in records.values() for place in held], np.int64),
    )


def _members(path: Path) -> list[tarfile.TarInfo]:
    with path.open("rb") as file:
        if file.read(8).startswith(_COMPRESSED):
            raise ValueError("it is compressed, and records could not be read in any order")
        file.seek(0)
        try:
            members = tarfile.open(fileobj=file, mode="r:").getmembers()
        except tarfile.TarError as error:
            raise ValueError(str(error)) from None
        # tarfile takes a damaged header for the end
        end = 0
        if members:
            end = members[-1].offset_data + -(-members[-1].size // _BLOCK) * _BLOCK
        file.seek(end)
        if any(file.read(_BLOCK)):
            raise ValueError(f"the header at byte {end} is damaged")
    return members
