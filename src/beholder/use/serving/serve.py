"""A run behind its routes, from the first word of the command to the last answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from beholder.types import UserError
from beholder.use.serving.app import Service, build_app
from beholder.use.serving.conversation import Limits
from beholder.use.serving.pictures import Fetcher, Pictures, allowed_hosts
from beholder.use.vlm import load
from beholder.web.server import listen, server_for, url_of


def serve(
    run: str, *, host: str = "127.0.0.1", port: int = 8000, key: str | None = None, name: str | None = None,
    limits: Limits | None = None, image_hosts: Sequence[str] = (), device: str = "auto",
    overrides: Sequence[str] = (), ready: Callable[[str, str], None] = lambda url, name: None,
) -> None:  # fmt: skip
    """Serve ``run`` until SIGTERM or Ctrl-C. ``ready`` is told the address and the model's name.

    Raises `UserError` before the model is loaded for what cannot be.
    """
    limits = limits or Limits()
    try:
        hosts = allowed_hosts(image_hosts)
    except ValueError as error:
        raise UserError(f"--allow-image-host {error}: expected a host such as images.example.org") from None
    with listen(host, port, key) as listening:
        vlm = load(run, device=device, overrides=overrides)
        pictures = Pictures(
            limits.max_image_bytes, min(limits.max_megapixels, vlm.cfg.data.max_megapixels),
            Fetcher(hosts, limits.max_image_bytes),
        )  # fmt: skip
        service = Service(vlm, name or vlm.cfg.run_name, limits, pictures)
        ready(f"{url_of(listening)}/v1", service.name)
        server_for(build_app(service, key), patience_s=limits.body_timeout_s, grace_s=limits.grace_s).run(
            sockets=[listening]
        )
