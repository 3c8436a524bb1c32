"""PNG files written by hand: kinds that Pillow does not write, and headers that lie."""

import struct
import zlib

import numpy as np

_ADAM7 = [  # first row and column, and the steps between rows and columns, of each pass
    (0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)
]  # fmt: skip
GRAY, RGB, PALETTE, GRAY_ALPHA, RGBA = 0, 2, 3, 4, 6


def png_file(
    values: np.ndarray,
    bits: int,
    color: int,
    clear: tuple[int, ...] | None = None,
    size: tuple[int, int] | None = None,
    more: bytes = b"",
    interlaced: bool = False,
) -> bytes:
    """The bytes of a PNG file.

    Args:
        values: int[H, W] or int[H, W, C], the samples.
        bits: of a sample. color: the color type.
        clear: the transparent color (tRNS), a 16-bit number for each channel.
        size: (width, height) that the header states, by default those of the values.
        more: further chunks before the pixels.
    """
    height, width = values.shape[:2]
    parts = [values[y::dy, x::dx] for y, x, dy, dx in _ADAM7] if interlaced else [values]
    raw = b"".join(_rows(part, bits) for part in parts if part.size)
    header = struct.pack(">IIBBBBB", *(size or (width, height)), bits, color, 0, 0, interlaced)
    key = chunk(b"tRNS", struct.pack(f">{len(clear)}H", *clear)) if clear else b""
    pixels = chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more + key + pixels


def _rows(values: np.ndarray, bits: int) -> bytes:
    """Samples of so many bits, row by row, each after a filter type of 0."""
    samples = values.reshape(len(values), -1).astype(">u2")
    unpacked = np.unpackbits(samples.view(np.uint8).reshape(*samples.shape, 2), axis=-1)
    rows = np.packbits(unpacked[..., -bits:].reshape(len(values), -1), axis=-1)
    return b"".join(b"\0" + row.tobytes() for row in rows)


def chunk(kind: bytes, data: bytes) -> bytes:
    """One chunk of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
