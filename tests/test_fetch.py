"""Tests of downloads of images: allowed and refused URLs, and limits on time and size."""

import http.server
import io
import re
import threading
import time

import numpy as np
import pytest
from PIL import Image

from janus_jax.commands import answers
from janus_jax.commands import sample as cli
from janus_jax.processing import fetch, image_sources
from janus_jax.processing.processor import Processor


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "white").save(file, "PNG")
    return file.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers a request with the method that its path names."""

    def do_GET(self):
        path, _, target = self.path.partition("?")
        getattr(self, "answer_" + path.strip("/").replace(".", "_"), self.answer_missing)(target)

    def log_message(self, *args):
        """Logs nothing."""

    def send(self, data: bytes, size=None, status=200, **headers):
        self.send_response(status)
        if size is not None:
            self.send_header("Content-Length", str(size))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def answer_a_png(self, target):
        self.send(png(), len(png()))

    def answer_no_size(self, target):
        self.send(png())

    def answer_hidden_path(self, target):
        self.send(png(), len(png()))

    def answer_missing(self, target):
        self.send_error(404, "Nothing here")

    def answer_redirect(self, target):
        self.send(b"", 0, 302, Location=target)

    def answer_stated_large(self, target):
        self.send(b"", 10**9)

    def answer_large(self, target):
        self.send(b"x" * 100_000)

    def answer_cut(self, target):
        self.send(png()[:50], len(png()))

    def answer_slow_body(self, target):
        self.send(b"", 100)
        self.drip(b"x")

    def answer_slow_header(self, target):
        self.wfile.write(b"HTTP/1.1 200 OK\r\nSlow: ")
        self.drip(b"x")

    def answer_silent(self, target):
        self.server.over.wait(10)

    def drip(self, data: bytes):
        try:
            while not self.server.over.wait(0.05):
                self.wfile.write(data)
                self.wfile.flush()
        except OSError:
            self.server.dropped.set()


@pytest.fixture
def server(monkeypatch):
    """An HTTP server at 127.0.0.1; `url` is the URL of its root."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.over, server.dropped = threading.Event(), threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}/"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("path", ["a.png", "no_size", "redirect?/a.png", "a.png?q=é ä"])
def test_images_are_fetched(server, path):
    image = image_sources.open_image(server.url + path, allow_urls=True)
    np.testing.assert_array_equal(np.asarray(image), np.full((8, 8, 3), 255))


def test_nothing_is_fetched_unless_allowed(server, monkeypatch):
    monkeypatch.setattr(image_sources, "fetch", lambda url: pytest.fail("fetched"))
    for url in (server.url + "a.png", "HTTPS://example.org/a.png"):
        with pytest.raises(ValueError, match=f"{url}.*allow_urls=True.*--allow_urls"):
            image_sources.open_image(url)


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("missing", "HTTP Error 404: Nothing here"),
        ("redirect?file:///etc/passwd", "'file:///etc/passwd'"),
        ("redirect?ftp://127.0.0.1/a.png", "redirect from http: to ftp:"),
        ("redirect?data:text/plain,a", "'data:text/plain,a'"),
        ("redirect?/redirect?/redirect", "redirect"),
        ("stated_large", r"\b5000 bytes"),
        ("large", r"\b5000 bytes"),
        ("cut", r"\b50 of \d+ bytes"),
    ],
)
def test_what_cannot_be_fetched_is_named(server, path, error, monkeypatch):
    monkeypatch.setattr(fetch, "MAX_BYTES", 5000)
    with pytest.raises(ValueError, match=error) as refused:
        fetch.fetch(server.url + path)
    assert server.url in str(refused.value)
    assert len(str(refused.value)) < 220 and "\n" not in str(refused.value)


def test_a_redirect_from_https_leads_to_https_only():
    request = fetch.urllib.request.Request("https://example.org/a.png")
    redirect = fetch._Redirects().redirect_request
    with pytest.raises(fetch.URLError, match="redirect from https: to http:"):
        redirect(request, None, 302, "", {}, "http://example.org/a.png")
    again = redirect(request, None, 302, "", {}, "https://example.org/b.png")
    assert again.full_url == "https://example.org/b.png"


@pytest.mark.parametrize("path", ["slow_body", "slow_header", "silent"])
def test_the_whole_time_is_bounded(server, path, monkeypatch):
    monkeypatch.setattr(fetch, "MAX_SECONDS", 0.3)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"0\.3 s|timed out"):
        fetch.fetch(server.url + path)
    assert time.perf_counter() - start < 2
    if path != "silent":  # the connection is closed
        assert server.dropped.wait(5)


@pytest.mark.parametrize("url", ["http://", "http://127.0.0.1:x/", "http://127.0.0.1:1/a.png"])
def test_urls_that_lead_nowhere(url):
    with pytest.raises(ValueError, match=f"image {url}: .+"):
        fetch.fetch(url)


def test_sample_fetches_only_with_the_flag(server, small, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr("janus_jax.generation.pipeline.load", lambda *_, **__: small)
    monkeypatch.setattr(cli, "print_answer", lambda *args: calls.append(args))
    flags = ["--question", "What?", "--image", server.url + "a.png"]
    with pytest.raises(SystemExit) as stopped:
        cli.main(flags)
    assert stopped.value.code == 2 and "--allow_urls" in capsys.readouterr().err
    cli.main([*flags, "--allow_urls"])
    ((_, question, (image,), _),) = calls
    assert question == "What?" and np.asarray(image).min() == 255
    with pytest.raises(SystemExit):
        cli.main(["--prompt", "a", "--allow_urls"])
    assert re.search("--allow_urls.*--prompt", capsys.readouterr().err)


def test_a_chat_fetches_only_with_the_flag(server, small, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr("janus_jax.generation.pipeline.load", lambda *_, **__: small)
    monkeypatch.setattr(
        answers, "print_answer", lambda _, turns, *rest: calls.append(turns) or "red"
    )
    for flags in ([], ["--allow_urls"]):
        monkeypatch.setattr("sys.stdin", io.StringIO(f"/image {server.url}a.png\nWhat?\n"))
        cli.main(["--chat", *flags])
    refused, answered = calls
    assert refused[0]["images"] == [] and np.asarray(answered[0]["images"][0]).min() == 255
    assert capsys.readouterr().err.count("allow_urls=True") == 1


@pytest.mark.parametrize("name", ["answer", "stream"])
def test_answers_fetch_only_where_it_is_allowed(server, small, monkeypatch, name):
    parts = [{"type": "image", "url": server.url + "a.png"}, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": parts}]
    with pytest.raises(ValueError, match="allow_urls=True"):
        getattr(small, name)(messages)

    def batch(self, examples, **settings):
        raise InterruptedError(examples)  # stops here; the rest is tested elsewhere

    monkeypatch.setattr(Processor, "batch", batch)
    with pytest.raises(InterruptedError) as read:
        getattr(small, name)(messages, allow_urls=True)
    ((tokens, pixels),) = read.value.args[0]
    assert tokens == small.processor.conversation("What?", [Image.new("RGB", (8, 8))])[0]
    assert (pixels == 1).all()
