"""Images and tar files with random damage: read or refused in one line, soon, in bounded memory.

    python -m pytest -m slow tests/test_mutated_files.py

MUTATION_SECONDS (default 60) is the time for each kind, MUTATION_SEED (default 0) the seed.
"""

import io
import os
import random
import re
import struct
import tarfile
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from limits import bounded
from PIL import Image
from png_files import GRAY, GRAY_ALPHA, RGB, png_file
from source_files import CONVERSATION

from janus_jax.data.records import BadRecord, Record
from janus_jax.data.tar import TarSource
from janus_jax.processing.images import ImageConfig, crop_square, load_image, resize_and_pad

pytestmark = pytest.mark.slow
SECONDS = float(os.environ.get("MUTATION_SECONDS", "60"))
SEED = int(os.environ.get("MUTATION_SEED", "0"))
MEMORY = 4 * 2**30  # bytes that one file may take
TIME = 60  # seconds that one file may take, on a busy machine
EXTREMES = (0, 1, 2, 255, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def mutated(raw: bytes, other: bytes, rng: random.Random) -> bytes:
    """The bytes with one to four kinds of damage; other: what parts are taken from."""
    data = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        # mostly in the header
        most = min(200, len(data)) if rng.random() < 0.6 else len(data)
        at, size, kind = rng.randrange(most), rng.randint(1, 64), rng.randrange(7)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif kind == 2:
            width, order = rng.choice((2, 4)), rng.choice(("big", "little"))
            value = rng.choice(EXTREMES) % 256**width
            data[at : at + width] = value.to_bytes(width, order)
        elif kind == 3:
            del data[at : at + size]
        elif kind == 4:
            data[at:at] = data[at : at + size]
        elif kind == 5:
            start = rng.randrange(len(other))
            data[at : at + size] = other[start : start + size]
        else:
            del data[rng.randrange(1, len(data) + 1) :]
        if not data:
            data = bytearray(raw[:1])
    return bytes(data)


def with_checksums(raw: bytes) -> bytes:
    """A PNG file whose chunks have the checksums of what they hold."""
    data, at = bytearray(raw), 8
    while at + 12 <= len(data):
        (size,) = struct.unpack_from(">I", data, at)
        end = at + 8 + size
        if end + 4 > len(data):
            break
        struct.pack_into(">I", data, end, zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return bytes(data)


def images() -> list[bytes]:
    """Image files of all formats and modes."""
    rng = np.random.default_rng(SEED)
    colors = Image.fromarray(rng.integers(0, 256, (24, 20, 3), np.uint8))
    colors = colors.resize((40, 32), Image.Resampling.BICUBIC)
    more = [colors.rotate(90), colors.rotate(180)]
    deep, exif = rng.integers(0, 65536, (9, 11, 3)), Image.Exif()
    exif[0x0112] = 6
    found = [
        png_file(deep, 16, RGB, (1, 2, 3)),
        png_file(deep, 16, RGB, (1, 2, 3), interlaced=True),
        png_file(deep[..., :2], 16, GRAY_ALPHA),
        png_file(deep[..., 0] % 4, 2, GRAY, (2,)),
        png_file(deep[..., 0], 16, GRAY, (2,)),
    ]
    transparent = colors.copy()
    transparent.putalpha(colors.convert("L"))
    gray = Image.fromarray(deep[..., 0].astype(np.uint16))
    several = dict(save_all=True, append_images=more)
    for image, format, settings in [
        (colors, "PNG", dict(exif=exif)), (transparent, "PNG", {}), (colors, "PNG", several),
        (colors.quantize(16), "PNG", dict(transparency=3)), (colors, "JPEG", dict(exif=exif)),
        (colors, "JPEG", dict(progressive=True)), (colors.convert("CMYK"), "JPEG", {}),
        (colors, "MPO", several), (transparent, "WEBP", {}), (colors, "WEBP", several),
        (transparent, "WEBP", dict(lossless=True)), (colors, "GIF", several),
        (colors.quantize(16), "GIF", dict(transparency=3)), (colors, "BMP", {}),
        (colors.quantize(16), "BMP", {}), (colors, "AVIF", {}), (colors, "AVIF", several),
        (transparent, "JPEG2000", {}), (colors, "PPM", {}), (gray, "PPM", {}), (gray, "TIFF", {}),
        (colors.convert("F"), "TIFF", {}),
        (colors.convert("1"), "TIFF", dict(compression="group4")),
        *((colors, "TIFF", dict(compression=c)) for c in ("tiff_lzw", "jpeg", "packbits", None)),
        (transparent, "TIFF", dict(compression="tiff_adobe_deflate", exif=exif)),
    ]:  # fmt: skip
        file = io.BytesIO()
        image.save(file, format, **settings)
        found.append(file.getvalue())
    return found


def tars() -> list[bytes]:
    """Tar files of all formats, with members of several kinds."""
    found = []
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=format) as tar:
            for name, data in {
                "0.json": b'{"text": "a"}',
                "1.jpg": images()[1],
                "1.json": str({"conversations": CONVERSATION}).replace("'", '"').encode(),
                f"{'n' * 90}.json": b'{"text": "b"}',
                f"{'m' * 99}/{'n' * 90}.txt": b"words",
            }.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                info.pax_headers = {"comment": "c" * 40, "size": str(len(data))}
                tar.addfile(info, io.BytesIO(data))
            link = tarfile.TarInfo("2.jpg")
            link.type, link.linkname = tarfile.LNKTYPE, "1.jpg"
            tar.addfile(link)
        found.append(file.getvalue())
    return found


def with_tar_checksums(raw: bytes) -> bytes:
    """A tar file whose blocks that look like headers have the checksums of what they hold."""
    data = bytearray(raw)
    for at in range(0, len(data) - 511, 512):
        block = data[at : at + 512]
        if block[257:262] == b"ustar":
            total = sum(block[:148]) + 8 * 32 + sum(block[156:])
            data[at + 148 : at + 156] = b"%06o\0 " % total
    return bytes(data)


def sweep(
    files: list[bytes],
    repaired: Callable[[bytes], bytes],
    check: Callable[[bytes], str],
    folder,
) -> Counter:
    """Damages files until the time is over; what `check` says of them, counted."""
    rng, found, end = random.Random(SEED), Counter(), time.monotonic() + SECONDS
    while time.monotonic() < end:
        raw = mutated(rng.choice(files), rng.choice(files), rng)
        raw = repaired(raw) if rng.random() < 0.7 else raw
        try:
            with bounded(TIME, MEMORY):
                found[check(raw)] += 1
        except BaseException:
            (folder / "failed").write_bytes(raw)
            print(f"number {sum(found.values())} of seed {SEED} fails: {folder / 'failed'}")
            raise
    print(dict(found))
    return found


def check_image(raw: bytes) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = load_image(raw)
    except ValueError as error:
        assert re.search(f"<{len(raw)} bytes>: .+", str(error))
        assert "\n" not in str(error) and len(str(error)) < 500, str(error)
        assert "memory" not in str(error), str(error)
        return "refused"
    assert image.mode == "RGB"
    assert resize_and_pad(image, ImageConfig(image_size=16)).shape == (16, 16, 3)
    assert crop_square(image, 16).shape == (16, 16, 3)
    return "read"


def test_images(tmp_path):
    found = sweep(images(), with_checksums, check_image, tmp_path)
    assert found["read"] > 10 and found["refused"] > 10


def test_tars(tmp_path):
    path = tmp_path / "a.tar"

    def check(raw: bytes) -> str:
        path.write_bytes(raw)
        try:
            source = TarSource(path)
        except ValueError as error:
            rule = f"{path} .*tar file|.*at least one record"
            assert re.match(rule, str(error))
            assert "\n" not in str(error) and len(str(error)) < 500, str(error)
            return "refused"
        records = list(source)
        assert all(isinstance(record, (Record, BadRecord)) for record in records)
        bad = any(isinstance(record, BadRecord) for record in records[:-1])
        return "with bad records" if bad else "read"

    found = sweep(tars(), with_tar_checksums, check, tmp_path)
    assert found["read"] and found["refused"] > 10 and found["with bad records"] > 10
