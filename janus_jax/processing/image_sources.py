"""Loads images from strings: paths, file:, data:, http: and https: URLs, and base64 data."""

import base64
import binascii
import re
import urllib.parse
import urllib.request

from PIL import Image

from janus_jax.checks import shorten, shorten_text
from janus_jax.processing.fetch import fetch
from janus_jax.processing.images import ImageSource, load_image

_REMOTE = re.compile(r"https?://", re.IGNORECASE)
# The base64 prefixes of PNG, JPEG, GIF, WebP, TIFF, BMP, AVIF and JPEG 2000 files. A path of that
# length contains a dot, which is not a base64 character.
_BASE64 = re.compile(
    r"(iVBOR|/9j/|R0lGOD|UklGR|SUkq|TU0A|Qk|AAAA)[A-Za-z0-9+/\s]{64,}+=*\s*"
)


def open_image(source: ImageSource, allow_urls: bool = False) -> Image.Image:
    """Loads an image as upright 8-bit RGB (see load_image).

    Args:
        source: see resolve.
        allow_urls: whether http: and https: URLs are downloaded.
    Raises:
        ValueError, FileNotFoundError: as resolve and load_image.
    """
    return load_image(resolve(source, allow_urls))


def resolve(source: ImageSource, allow_urls: bool = False) -> ImageSource:
    """Resolves a string to the bytes or the path of an image; returns other sources unchanged.

    Args:
        source: a path; a `file:`, `data:`, `http:` or `https:` URL; an image file in base64; or any
            other source that load_image accepts.
        allow_urls: whether http: and https: URLs are downloaded, with the limits on time and size
            of fetch.py.
    Raises:
        ValueError: a URL is not allowed or malformed, or an image cannot be downloaded.
    """
    if not isinstance(source, str):
        return source
    if is_remote(source):
        if not allow_urls:
            raise ValueError(
                f"refusing to download the image {shorten_text(source)}; pass allow_urls=True "
                "(--allow_urls in sample.py), or use a local file"
            )
        return fetch(source)
    scheme = source[:5].lower()
    if scheme == "data:":
        return _decode_data_url(source)
    if scheme == "file:":
        return _path_of_url(source)
    return decode_base64(source) if is_base64_image(source) else source


def is_remote(source: ImageSource) -> bool:
    """Returns whether a source is an http: or https: URL."""
    return isinstance(source, str) and _REMOTE.match(source) is not None


def is_base64_image(text: str) -> bool:
    """Returns whether a string is an image file in base64, and not a path."""
    return _BASE64.fullmatch(text) is not None


def decode_base64(text: str | bytes) -> bytes:
    """Decodes base64, ignoring white space. Raises ValueError for invalid data."""
    if not isinstance(text, (str, bytes)):
        raise ValueError(f"a base64 image must be a string, got {type(text).__name__}")
    try:
        compact = "".join(text.split()) if isinstance(text, str) else text
        return base64.b64decode(compact, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"invalid base64 data of an image, {shorten(text)}: {error}") from None


def _decode_data_url(url: str) -> bytes:
    header, comma, data = url.partition(",")
    if not comma:
        raise ValueError(f"a data: URL must have a comma before its data, got {shorten(url)}")
    raw = urllib.parse.unquote_to_bytes(data)
    return decode_base64(raw) if header.lower().endswith(";base64") else raw


def _path_of_url(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise ValueError(f"a file: URL must name a local file, got {shorten(url)}")
    return urllib.request.url2pathname(parts.path)
