"""Where a request's images come from: ``data:`` URIs, and URLs of hosts that the server was told to trust.

Nothing is fetched unless a host is allowed. Then each hop of a redirect is looked at anew, names are resolved once and
the connection goes to the very address that was checked, and bytes and seconds are bounded. No file is ever opened.
"""

from __future__ import annotations

import base64
import http.client
import ipaddress
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import SplitResult, urljoin, urlsplit

from PIL import Image

from beholder.data.images import ImageError, decode
from beholder.web.exchange import exchange

MAX_HOPS = 3
FETCH_TIMEOUT_S = 5.0
_REDIRECTS = (301, 302, 303, 307, 308)
_EMBEDDED = tuple(ipaddress.ip_network(n) for n in ("64:ff9b::/96", "64:ff9b:1::/48", "2001::/32", "2002::/16"))
"""IPv6 that carries an IPv4 address, which may be anything."""


class PictureError(ValueError):
    """An image of a request cannot be had. The message is for the one who asked."""


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet, and not of this machine, its network or a cloud's metadata."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif any(ip in network for network in _EMBEDDED):
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


def addresses(host: str, port: int) -> list[str]:
    """What a name resolves to."""
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


@dataclass(frozen=True)
class Fetcher:
    """Gets images of allowed hosts. ``hosts``: ``name`` (https alone, its own port) or ``name:port``, compared as a
    whole; ``resolve`` and ``reachable`` decide on addresses."""

    hosts: frozenset[str] = frozenset()
    max_bytes: int = 10_000_000
    timeout_s: float = FETCH_TIMEOUT_S
    resolve: Callable[[str, int], Sequence[str]] = addresses
    reachable: Callable[[str], bool] = is_public
    schemes: tuple[str, ...] = ("https",)

    def get(self, url: str) -> bytes:
        """The bytes behind ``url``. Raises `PictureError`."""
        until = time.monotonic() + self.timeout_s
        try:
            for _ in range(MAX_HOPS + 1):
                parts, host, port = self._check(url)
                status, location, data = self._one(parts, host, port, until)
                if status not in _REDIRECTS or location is None:
                    if status != 200:
                        raise PictureError(f"{host} answers with status {status}")
                    return data
                url = urljoin(url, location)
            raise PictureError(f"{urlsplit(url).hostname} redirects more than {MAX_HOPS} times")
        except TimeoutError:
            raise PictureError(f"the image did not come within {self.timeout_s:g} s") from None
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            raise PictureError(f"the image could not be fetched ({type(error).__name__})") from None

    def _check(self, url: str) -> tuple[SplitResult, str, int]:
        if not self.hosts:
            raise PictureError(
                "this server fetches no URLs; send the image itself, as data:image/png;base64,… (or have the server "
                "started with --allow-image-host)"
            )
        try:
            if not (url.isascii() and url.isprintable()) or " " in url or "\\" in url:
                raise ValueError
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port
            if parts.scheme not in self.schemes or not host or "@" in parts.netloc:
                raise ValueError
        except ValueError:
            raise PictureError(
                f"expected a URL like {self.schemes[0]}://host/path, without a user and with everything that is no "
                "ASCII escaped"
            ) from None
        if (host if port is None else f"{host}:{port}") not in self.hosts:
            raise PictureError(f"the host {host[:80]!r} is not one that this server may fetch images from")
        return parts, host, port or (443 if parts.scheme == "https" else 80)

    def _one(self, parts: SplitResult, host: str, port: int, until: float) -> tuple[int, str | None, bytes]:
        """(status, Location, body) of one hop, over a connection to the address that was checked."""
        found = list(self.resolve(host, port))
        if not found or not all(self.reachable(address) for address in found):
            raise PictureError(f"{host} is at an address that this server does not connect to")
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        status, headers, data = exchange(
            host, port, "GET", target, address=found[0], until=until, max_bytes=self.max_bytes,
            tls=parts.scheme == "https", headers={"Accept": "image/*"}, reads=lambda status: status == 200,
        )  # fmt: skip
        if len(data) > self.max_bytes:
            raise PictureError(f"the image has more than {self.max_bytes:,} bytes")
        return status, headers.get("Location"), data


@dataclass(frozen=True)
class Pictures:
    """How images are had and opened, and how large they may be."""

    max_bytes: int
    max_megapixels: float
    fetcher: Fetcher

    def decode(self, data: bytes) -> Image.Image:
        """The picture that ``data`` is. Raises `PictureError`."""
        try:
            return decode(data, "the image", self.max_megapixels)
        except ImageError as error:
            if error.reason == "too_many_pixels":
                raise PictureError(f"the image has more than {self.max_megapixels:g} megapixels; shrink it") from None
            raise PictureError(f"the image cannot be used ({error.reason}): {error.detail}") from None

    def read(self, url: str) -> bytes:
        """The bytes of an ``image_url``. Raises `PictureError`."""
        head, comma, text = url[:200].partition(",")
        scheme = head.partition(":")[0].lower()
        if scheme in ("http", "https"):
            return self.fetcher.get(url)
        if scheme != "data":
            raise PictureError("expected a data: URI, as in data:image/png;base64,…")
        if not comma or not head[5:].lower().startswith("image/") or not head.lower().endswith(";base64"):
            raise PictureError(f"expected data:image/…;base64,… but it begins with {head[:60]!r}")
        text = url[len(head) + 1 :]
        if len(text) > (self.max_bytes + 2) // 3 * 4:
            raise PictureError(f"the image has more than {self.max_bytes:,} bytes")
        try:
            return base64.b64decode(text.encode("ascii"), validate=True)
        except ValueError as error:
            raise PictureError(f"its base64 is broken: {error}") from None


def allowed_hosts(hosts: Iterable[str]) -> frozenset[str]:
    """``--allow-image-host`` as `Fetcher` compares them. Raises ValueError for what is no host."""
    found: set[str] = set()
    for host in hosts:
        parts = urlsplit(f"//{host}")
        if not parts.hostname or parts.netloc != host or "@" in host or not host.isascii():
            raise ValueError(host)
        parts.port  # noqa: B018  (raises ValueError for what is no number)
        found.add(host.lower())
    return frozenset(found)
