"""Where images of a request come from: never from anywhere that the server was not told to trust."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from PIL import Image

from beholder.use.serving.pictures import Fetcher, PictureError, Pictures, allowed_hosts, is_public


def png(side: int = 4) -> bytes:
    held = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(held, "png")
    return held.getvalue()


class Victim(ThreadingHTTPServer):
    """Counts who asks, and answers by the path."""

    hits: int = 0

    @property
    def port(self) -> int:
        return int(self.server_address[1])


class _Answers(BaseHTTPRequestHandler):
    server: Victim

    def do_GET(self) -> None:
        self.server.hits += 1
        kind, _, rest = self.path.removeprefix("/").partition("/")
        if kind == "to":
            self.send_response(302)
            self.send_header("Location", f"http://{rest}")
            self.end_headers()
            return
        self.send_response(404 if kind == "none" else 200)
        self.end_headers()
        try:
            if kind == "endless":
                for _ in range(100_000):
                    self.wfile.write(b"x" * 65_536)
            elif kind == "trickle":
                for _ in range(100):
                    self.wfile.write(b"x")
                    time.sleep(0.1)
            else:
                self.wfile.write(png())
        except OSError:
            pass  # whom it answers hung up, as it should

    def log_message(self, format: str, *args: Any) -> None: ...


@contextmanager
def _victim() -> Iterator[Victim]:
    server = Victim(("127.0.0.1", 0), _Answers)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def victim() -> Iterator[Victim]:
    with _victim() as server:
        yield server


FORMS = (
    "http://127.0.0.1:{port}/a.png", "https://127.0.0.1:{port}/a.png", "HTTP://127.0.0.1:{port}/a.png",
    "http://localhost:{port}/a.png", "http://LOCALHOST:{port}/a.png", "http://localhost.:{port}/a.png",
    "http://2130706433:{port}/a.png", "http://0x7f000001:{port}/a.png", "http://0177.0.0.1:{port}/a.png",
    "http://127.1:{port}/a.png", "http://0:{port}/a.png", "http://0.0.0.0:{port}/a.png",
    "http://[::1]:{port}/a.png", "http://[::ffff:127.0.0.1]:{port}/a.png", "http://[::ffff:7f00:1]:{port}/a.png",
    "http://allowed.test@127.0.0.1:{port}/a.png", "http://allowed.test:x@127.0.0.1:{port}/a.png",
    "http://127.0.0.1:{port}\\@allowed.test/a.png", "http://allowed.test#@127.0.0.1:{port}/a.png",
    "http://allowed.test:{port}/a.png", "http://allowed.test:{port}/to/127.0.0.1:{port}/a.png",
    "http://①②⑦.⓪.⓪.①:{port}/a.png", "http://127.0.0.1:{port}/a b.png", "//127.0.0.1:{port}/a.png",
    "http:/127.0.0.1:{port}/a.png", "http:127.0.0.1:{port}/a.png", "ftp://127.0.0.1:{port}/a.png",
    "file:///etc/passwd", "/etc/passwd", "../../etc/passwd", "jar:http://127.0.0.1:{port}!/a.png",
    "\thttp://127.0.0.1:{port}/a.png", "http://127.0.0.1:{port}/a.png\r\nX: y", "data:text/html,<img src=x>", "",
)  # fmt: skip


@pytest.mark.parametrize("hosts", [[], ["allowed.test"], ["allowed.test:{port}"], ["127.0.0.1:{port}"]])
def test_no_form_of_url_reaches_this_machine(victim: Victim, hosts: list[str]) -> None:
    """V3. Whatever is allowed by name; allowed.test is a name that somebody points at this machine."""
    allowed = allowed_hosts(host.format(port=victim.port) for host in hosts)
    for schemes in (("https",), ("http", "https")):
        fetcher = Fetcher(allowed, timeout_s=2, resolve=lambda host, port: ["127.0.0.1"], schemes=schemes)
        pictures = Pictures(10_000, 1.0, fetcher)

        for form in FORMS:
            with pytest.raises(PictureError):
                pictures.read(form.replace("{port}", str(victim.port)))

    assert len(FORMS) >= 25
    assert victim.hits == 0


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "255.255.255.255", "240.0.0.1", "::1", "::", "fe80::1", "fc00::1", "ff02::1", "::ffff:10.0.0.1",
        "64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:7f00:1::", "localhost", "",
    ],
)  # fmt: skip
def test_an_address_that_is_not_of_the_open_internet_is_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8"])
def test_an_address_of_the_open_internet_is_public(address: str) -> None:
    assert is_public(address)


def _open(victim: Victim, **more: Any) -> Fetcher:
    """One that may go to the victim by the name images.test."""
    settings: dict[str, Any] = {
        "hosts": frozenset({f"images.test:{victim.port}"}), "resolve": lambda host, port: ["127.0.0.1"],
        "reachable": lambda address: address == "127.0.0.1", "schemes": ("http",), "timeout_s": 5.0,
    }  # fmt: skip
    return Fetcher(**(settings | more))


def test_an_allowed_host_is_fetched_from_the_address_that_was_checked(victim: Victim) -> None:
    asked: list[str] = []

    def resolve(host: str, port: int) -> list[str]:  # another address whenever it is asked again
        asked.append(host)
        return ["127.0.0.1"] if len(asked) == 1 else ["127.0.0.2"]

    data = _open(victim, resolve=resolve).get(f"http://images.test:{victim.port}/a.png")

    assert (data, asked, victim.hits) == (png(), ["images.test"], 1)


@pytest.mark.parametrize("found", [["127.0.0.2"], ["127.0.0.1", "127.0.0.2"], []])
def test_a_name_with_one_address_that_may_not_be_is_not_fetched(victim: Victim, found: list[str]) -> None:
    with pytest.raises(PictureError, match="address"):
        _open(victim, resolve=lambda host, port: found).get(f"http://images.test:{victim.port}/a.png")

    assert victim.hits == 0


def test_every_hop_of_a_redirect_is_looked_at_anew(victim: Victim) -> None:
    with _victim() as other:
        at, fetcher = f"images.test:{victim.port}", _open(victim)

        assert fetcher.get(f"http://{at}/to/{at}/a.png") == png()
        with pytest.raises(PictureError, match="not one that this server"):
            fetcher.get(f"http://{at}/to/127.0.0.1:{other.port}/a.png")
        with pytest.raises(PictureError, match="not one that this server"):
            fetcher.get(f"http://{at}/to/images.test:{other.port}/a.png")
        with pytest.raises(PictureError, match="more than 3 times"):
            fetcher.get(f"http://{at}" + f"/to/{at}" * 6)

        assert other.hits == 0


@pytest.mark.parametrize(("path", "match"), [("endless", "more than"), ("trickle", "within"), ("none", "status 404")])
def test_bytes_and_seconds_of_a_fetch_are_bounded(victim: Victim, path: str, match: str) -> None:
    begun = time.monotonic()

    with pytest.raises(PictureError, match=match):
        _open(victim, max_bytes=100_000, timeout_s=0.5).get(f"http://images.test:{victim.port}/{path}")

    assert time.monotonic() - begun < 3


@pytest.mark.parametrize("host", ["", "http://a.test", "a.test/x", "u@a.test", "a.test:x", "a.test:99999", "ä.test"])
def test_what_is_no_host_is_not_allowed(host: str) -> None:
    with pytest.raises(ValueError):
        allowed_hosts([host])
