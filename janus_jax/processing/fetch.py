"""Downloads images over HTTP and HTTPS, with limits on time and size."""

import http.client
import socket
import threading
import urllib.request
from urllib.error import URLError
from urllib.parse import quote, urlsplit, urlunsplit

from janus_jax.checks import shorten_text

MAX_SECONDS = 30.0  # per image, including redirects
MAX_BYTES = 64 * 2**20  # per image file
_CHUNK = 2**16  # bytes


def fetch(url: str) -> bytes:
    """Downloads the file at an http: or https: URL, within MAX_SECONDS and MAX_BYTES.

    Redirects are followed to HTTPS, and from HTTP to HTTP, but not to other schemes.

    Raises:
        ValueError: the download takes too long, is too large or incomplete, the HTTP status is not
            success, or a redirect is refused.
    """
    download = _Download(url)
    download.start()
    download.join(MAX_SECONDS)
    try:
        return download.result()
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = error.reason if type(error) is URLError else error
        reason = shorten_text(str(reason) or type(error).__name__)
        raise ValueError(f"cannot download the image {shorten_text(url)}: {reason}") from None


class _Download(threading.Thread):
    """A download that can be canceled while it waits for the server.

    The timeout of a socket limits each read only, and a server may send one byte at a time.
    """

    def __init__(self, url: str):
        super().__init__(daemon=True)
        self._url = url
        self._canceled = threading.Event()
        self._connections: list[http.client.HTTPConnection] = []
        self._data: bytes | None = None
        self._error: Exception | None = None

    def run(self) -> None:
        try:
            self._data = self._read()
        except Exception as error:  # re-raised by result
            self._error = error

    def result(self) -> bytes:
        """Returns the data; raises the error of the download, or ValueError if it still runs."""
        if self.is_alive():
            self._cancel()
            raise ValueError(f"the download takes longer than {MAX_SECONDS:g} s")
        if self._error is not None:
            raise self._error
        return self._data

    def _cancel(self) -> None:
        self._canceled.set()
        for sock in [connection.sock for connection in self._connections]:
            try:
                if sock is not None:
                    sock.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads from it
            except OSError:  # not connected, or already closed
                continue

    def _connect(self, kind: type[http.client.HTTPConnection]):
        def connect(*args, **settings) -> http.client.HTTPConnection:
            self._connections.append(kind(*args, **settings))
            return self._connections[-1]

        return connect

    def _read(self) -> bytes:
        request = urllib.request.Request(_quoted(self._url), headers={"User-Agent": "janus_jax"})
        opener = _opener(self._connect)
        with opener.open(request, timeout=MAX_SECONDS) as response:
            length = response.headers.get("Content-Length", "")
            size = int(length) if length.isdecimal() and len(length) < 20 else None
            _check_size(size or 0)
            data = bytearray()
            while not self._canceled.is_set() and (chunk := response.read1(_CHUNK)):
                data += chunk
                _check_size(len(data))
        if size is not None and len(data) < size:
            raise ValueError(f"the download ended after {len(data)} of {size} bytes")
        return bytes(data)


def _check_size(size: int) -> None:
    if size > MAX_BYTES:
        raise ValueError(f"the file is larger than {MAX_BYTES} bytes")


def _quoted(url: str) -> str:
    """Percent-encodes characters outside ASCII in the path and the query of a URL."""
    parts = urlsplit(url)
    path, query = (quote(text, safe="/%:@!$&'()*+,;=~?") for text in (parts.path, parts.query))
    return urlunsplit((parts.scheme, parts.netloc, path, query, ""))


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req, fp, code, msg, headers, newurl):
        """Follows a redirect if its scheme is allowed, as described in fetch."""
        scheme = urlsplit(newurl).scheme.lower()
        if scheme not in ("https", "http") or (scheme == "http" and req.type == "https"):
            raise URLError(f"refusing the redirect from {req.type}: to {scheme}:")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener(connect) -> urllib.request.OpenerDirector:
    """Returns an opener for HTTP and HTTPS only.

    connect: function from a connection class to a function that creates a connection.
    """

    class Http(urllib.request.HTTPHandler):
        def http_open(self, request):
            return self.do_open(connect(http.client.HTTPConnection), request)

    class Https(urllib.request.HTTPSHandler):
        def https_open(self, request):
            return self.do_open(connect(http.client.HTTPSConnection), request)

    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        _Redirects,
        Http,
        Https,
    ):
        opener.add_handler(handler())
    return opener
