"""The zip container of a PyTorch `.bin` file: where each member lies, from two sources that agree.

torch writes its members one after another, stored (not compressed): a local header with padding in
its extra field, the data, and a data descriptor where flag bit 3 is set. The directory at the end
repeats what the headers say. A member is accepted only if header, descriptor and directory agree
and the members fill the file up to the directory, so one damaged field cannot move the data.
Format: APPNOTE.TXT of PKWARE, 4.3; torch's writer: caffe2/serialize/inline_container.cc.
"""

import io
import struct
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

from janus_jax.checks import shorten

LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # without name and extra field
DESCRIPTORS = (struct.Struct("<4s3I"), struct.Struct("<4sI2Q"))
MAX_DIRECTORY = 2**24  # bytes; torch needs about 100 per tensor
STREAMED, UTF8 = 1 << 3, 1 << 11  # the only flags that torch and zipfile set
UNSET = 0xFFFFFFFF  # stands for a size that is in the extra field


class Member(NamedTuple):
    """Where the data of a member lies."""

    offset: int
    size: int
    crc: int


class _Reader(io.FileIO):
    """A file of which only small pieces are read: the directory of a damaged file has any size."""

    def read(self, size: int = -1) -> bytes:
        if size > MAX_DIRECTORY:
            raise ValueError(f"its zip directory has {size} bytes, more than {MAX_DIRECTORY}")
        return super().read(size)


def locate_members(path: Path) -> dict[str, Member]:
    """Members of a zip file by name; reads the directory, the headers and the descriptors.

    Raises:
      ValueError: compressed or encrypted members, or header and directory disagree.
      zipfile.BadZipFile, and other exceptions of zipfile: the directory is damaged.
    """
    with _Reader(path) as file, zipfile.ZipFile(file) as archive:
        infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
        members, end = {}, 0
        for info in infos:
            if info.header_offset != end:
                raise ValueError(
                    f"{shorten(info.filename)} must begin at byte {end}, where the member before "
                    f"it ends, got {info.header_offset}"
                )
            _check_stored(info)
            start = _data_start(file, info)
            end = start + info.file_size
            end += _descriptor_size(file, info, end)
            members[info.filename] = Member(start, info.file_size, info.CRC)
        if end != archive.start_dir or len(members) != len(infos):
            raise ValueError(
                f"its {len(infos)} zip members must have different names and fill the file up to "
                f"its directory at byte {archive.start_dir}, got {len(members)} up to byte {end}"
            )
    return members


def _check_stored(info: zipfile.ZipInfo) -> None:
    name = shorten(info.filename)
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed; PyTorch stores members uncompressed")
    if info.flag_bits & ~(STREAMED | UTF8):
        raise ValueError(f"{name} has zip flags {info.flag_bits:#x}, which PyTorch never sets")
    if info.compress_size != info.file_size:
        raise ValueError(f"{name} has sizes {info.compress_size} and {info.file_size}")


def _data_start(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Offset after the local header, which must say what the directory says."""
    file.seek(info.header_offset)
    raw = file.read(LOCAL_HEADER.size)
    if len(raw) < LOCAL_HEADER.size:
        raise ValueError(f"it is truncated in the zip header of {shorten(info.filename)}")
    mark, _, flags, method, _, _, *numbers, name_size, extra_size = LOCAL_HEADER.unpack(raw)
    name, extra = file.read(name_size), file.read(extra_size)
    unset = {0, UNSET} if flags & STREAMED else {UNSET}
    wanted = ({info.CRC} | unset, {info.compress_size} | unset, {info.file_size} | unset)
    agree = (
        mark == b"PK\x03\x04"
        and (flags, method) == (info.flag_bits, info.compress_type)
        and name == info.orig_filename.encode("utf-8" if flags & UTF8 else "cp437")
        and all(number in want for number, want in zip(numbers, wanted, strict=True))
    )
    if not agree or len(extra) < extra_size or not _is_extra_field(extra):
        raise ValueError(f"the zip header of {shorten(info.filename)} disagrees with the directory")
    return file.tell()


def _is_extra_field(extra: bytes) -> bool:
    """Whether these are records of two-byte id, two-byte length, and as many bytes."""
    at = 0
    while at + 4 <= len(extra):
        at += 4 + int.from_bytes(extra[at + 2 : at + 4], "little")
    return at == len(extra)


def _descriptor_size(file: BinaryIO, info: zipfile.ZipInfo, at: int) -> int:
    """Length of the data descriptor at a position, 0 for a member that has none."""
    if not info.flag_bits & STREAMED:
        return 0
    file.seek(at)
    raw = file.read(DESCRIPTORS[-1].size)
    size = info.file_size
    for form in DESCRIPTORS:
        fits = form is DESCRIPTORS[-1] or size < UNSET
        if fits and raw.startswith(form.pack(b"PK\x07\x08", info.CRC, size, size)):
            return form.size
    raise ValueError(f"the zip descriptor of {shorten(info.filename)} disagrees with the directory")


def read_member(path: Path, name: str, member: Member, limit: int) -> bytes:
    """The bytes of a member, which must have the checksum that the directory states.

    0 means that the file has none (`torch.serialization.set_crc32_options(False)`).
    """
    if member.size > limit:
        raise ValueError(f"{shorten(name)} has {member.size} bytes, more than {limit}")
    with path.open("rb") as file:
        file.seek(member.offset)
        data = file.read(member.size)
    if member.crc and zlib.crc32(data) != member.crc:
        raise ValueError(f"{shorten(name)} is damaged: its bytes do not have the checksum stated")
    return data
