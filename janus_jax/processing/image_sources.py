"""What a text names in place of an image: a path, a file: or data: URL, base64, or a remote URL."""

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
# How the base64 of PNG, JPEG, GIF, WebP, TIFF, BMP, AVIF and JPEG 2000 files begins. A path of that
# length has a dot, which base64 has not.
_BASE64 = re.compile(
    r"(iVBOR|/9j/|R0lGOD|UklGR|SUkq|TU0A|Qk|AAAA)[A-Za-z0-9+/\s]{64,}+=*\s*"
)


def open_image(source: ImageSource, allow_urls: bool = False) -> Image.Image:
    """The image as load_image gives it.

    Args:
        source: see resolve.
        allow_urls: whether remote images are fetched.
    Raises:
        ValueError, FileNotFoundError: as resolve and load_image.
    """
    return load_image(resolve(source, allow_urls))


def resolve(source: ImageSource, allow_urls: bool = False) -> ImageSource:
    """The bytes or the path of the image that a text names; anything else as it is.

    Args:
        source: a path; a `file:`, `data:` or, where allowed, `http:` or `https:` URL; the base64
            text of an image; or what load_image takes.
        allow_urls: whether remote images are fetched (time and size are bounded, see fetch.py).
    Raises:
        ValueError: a URL that is not allowed or damaged, or an image that cannot be fetched.
    """
    if not isinstance(source, str):
        return source
    if is_remote(source):
        if not allow_urls:
            raise ValueError(
                f"refusing to fetch the image {shorten_text(source)}: pass allow_urls=True "
                "(--allow_urls in sample.py), or download it"
            )
        return fetch(source)
    scheme = source[:5].lower()
    if scheme == "data:":
        return _decode_data_url(source)
    if scheme == "file:":
        return _path_of_url(source)
    return decode_base64(source) if is_base64_image(source) else source


def is_remote(source: ImageSource) -> bool:
    """Whether it is an http: or https: URL."""
    return isinstance(source, str) and _REMOTE.match(source) is not None


def is_base64_image(text: str) -> bool:
    """Whether it is the base64 text of an image file, and no path."""
    return _BASE64.fullmatch(text) is not None


def decode_base64(text: str | bytes) -> bytes:
    """The bytes of a base64 text, in which white space does not count. Raises ValueError."""
    if not isinstance(text, (str, bytes)):
        raise ValueError(f"a base64 image must be a text, got {type(text).__name__}")
    try:
        compact = "".join(text.split()) if isinstance(text, str) else text
        return base64.b64decode(compact, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"damaged base64 image {shorten(text)}: {error}") from None


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
