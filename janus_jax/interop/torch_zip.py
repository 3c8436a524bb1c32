"""The zip container of a PyTorch `.bin` file: locates each member and validates the container.

torch writes the members one after another, uncompressed: a local header with padding in its extra
field, the data, and a data descriptor if flag bit 3 is set. The directory at the end of the file
repeats the contents of the headers. A member is accepted only if its header, descriptor and
directory entry agree, and the members must fill the file up to the directory without gaps. A single
damaged field therefore cannot shift the data unnoticed.
Format: APPNOTE.TXT of PKWARE, 4.3; torch's writer: caffe2/serialize/inline_container.cc.
"""

import io
import struct
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

from janus_jax.checks import shorten

LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # without the name and the extra field
DESCRIPTORS = (struct.Struct("<4s3I"), struct.Struct("<4sI2Q"))
MAX_DIRECTORY = 2**24  # bytes; torch needs about 100 per tensor
STREAMED, UTF8 = 1 << 3, 1 << 11  # the only flags that torch and zipfile set
UNSET = 0xFFFFFFFF  # means that the value is in the extra field


class Member(NamedTuple):
    """The offset, size and CRC-32 of a member's data."""

    offset: int
    size: int
    crc: int


class _Reader(io.FileIO):
    """A file that refuses large reads: a damaged file may state a directory of any size."""

    def read(self, size: int = -1) -> bytes:
        if size > MAX_DIRECTORY:
            raise ValueError(
                f"its zip directory has {size} bytes, expected at most {MAX_DIRECTORY}"
            )
        return super().read(size)


def locate_members(path: Path) -> dict[str, Member]:
    """Locates the members of a zip file; reads its directory, headers and descriptors.

    Returns:
      Members by name.

    Raises:
      ValueError: a member is compressed or encrypted, or the headers and the directory disagree.
      zipfile.BadZipFile, and other exceptions of zipfile: the directory is damaged.
    """
    with _Reader(path) as file, zipfile.ZipFile(file) as archive:
        infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
        members, end = {}, 0
        for info in infos:
            if info.header_offset != end:
                raise ValueError(
                    f"{shorten(info.filename)} must begin at byte {end}, directly after the "
                    f"previous member, got {info.header_offset}"
                )
            _check_stored(info)
            start = _data_start(file, info)
            end = start + info.file_size
            end += _descriptor_size(file, info, end)
            members[info.filename] = Member(start, info.file_size, info.CRC)
        if end != archive.start_dir or len(members) != len(infos):
            raise ValueError(
                f"its {len(infos)} zip members must have different names and end at the directory "
                f"at byte {archive.start_dir}, got {len(members)} names and the end {end}"
            )
    return members


def _check_stored(info: zipfile.ZipInfo) -> None:
    name = shorten(info.filename)
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed; PyTorch stores members uncompressed")
    if info.flag_bits & ~(STREAMED | UTF8):
        raise ValueError(f"{name} has zip flags {info.flag_bits:#x}, which PyTorch never sets")
    if info.compress_size != info.file_size:
        raise ValueError(
            f"{name} is uncompressed but has two sizes: {info.compress_size} and {info.file_size}"
        )


def _data_start(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Returns the offset after the local header, which must agree with the directory."""
    file.seek(info.header_offset)
    raw = file.read(LOCAL_HEADER.size)
    if len(raw) < LOCAL_HEADER.size:
        raise ValueError(f"it is truncated within the zip header of {shorten(info.filename)}")
    signature, _, flags, method, _, _, *numbers, name_size, extra_size = LOCAL_HEADER.unpack(raw)
    name, extra = file.read(name_size), file.read(extra_size)
    unset = {0, UNSET} if flags & STREAMED else {UNSET}
    allowed = ({info.CRC} | unset, {info.compress_size} | unset, {info.file_size} | unset)
    agrees = (
        signature == b"PK\x03\x04"
        and (flags, method) == (info.flag_bits, info.compress_type)
        and name == info.orig_filename.encode("utf-8" if flags & UTF8 else "cp437")
        and all(number in values for number, values in zip(numbers, allowed, strict=True))
    )
    if not agrees or len(extra) < extra_size or not _is_extra_field(extra):
        raise ValueError(f"the zip header of {shorten(info.filename)} disagrees with the directory")
    return file.tell()


def _is_extra_field(extra: bytes) -> bool:
    """Returns whether `extra` is a sequence of records: two-byte id, two-byte length, data."""
    position = 0
    while position + 4 <= len(extra):
        position += 4 + int.from_bytes(extra[position + 2 : position + 4], "little")
    return position == len(extra)


def _descriptor_size(file: BinaryIO, info: zipfile.ZipInfo, offset: int) -> int:
    """Returns the size of the data descriptor at an offset; 0 if the member has none."""
    if not info.flag_bits & STREAMED:
        return 0
    file.seek(offset)
    raw = file.read(DESCRIPTORS[-1].size)
    size = info.file_size
    for form in DESCRIPTORS:
        fits = form is DESCRIPTORS[-1] or size < UNSET
        if fits and raw.startswith(form.pack(b"PK\x07\x08", info.CRC, size, size)):
            return form.size
    raise ValueError(f"the zip descriptor of {shorten(info.filename)} disagrees with the directory")


def read_member(path: Path, name: str, member: Member, limit: int) -> bytes:
    """Reads a member and verifies its CRC-32.

    A CRC-32 of 0 means that the file has none (`torch.serialization.set_crc32_options(False)`).
    """
    if member.size > limit:
        raise ValueError(f"{shorten(name)} has {member.size} bytes, expected at most {limit}")
    with path.open("rb") as file:
        file.seek(member.offset)
        data = file.read(member.size)
    if member.crc and zlib.crc32(data) != member.crc:
        raise ValueError(f"{shorten(name)} is damaged: its data does not match its checksum")
    return data
