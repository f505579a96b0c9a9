"""Keeps browsers out that act for another site: by a cross-site request, or by DNS rebinding."""

import ipaddress
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from hsmsign.asgi import Request, current_request
from hsmsign.problems import CrossSite, ForeignHost
from hsmsign.settings import ServerSettings


def guard(settings: ServerSettings) -> Callable[[], Awaitable[None]]:
    """What to do before each request: raises ForeignHost or CrossSite."""
    hosts = frozenset(_plain(host) for host in ("localhost", settings.address, *settings.hosts))

    async def check() -> None:
        request = current_request()
        host = request.headers.get("Host", "")
        if not _is_ours(host, hosts):
            raise ForeignHost(
                "The Host header is none of this server's names.",
                "Use its address, or add the name to server.hosts in the server's settings.",
            )
        if _is_cross_site(request, host):
            raise CrossSite("A page of another site sent this request.", "Use a client that is no browser.")

    return check


def _is_ours(authority: str, hosts: frozenset[str]) -> bool:
    # a page that rebinds its own name to our address still sends that name: an address is safe
    try:
        host = urlsplit(f"//{authority}").hostname or ""
        return _plain(host) in hosts or bool(ipaddress.ip_address(host))
    except ValueError:
        return False


def _plain(host: str) -> str:
    return host.lower().rstrip(".")


def _is_cross_site(request: Request, host: str) -> bool:
    origin = request.headers.get("Origin")
    if origin is not None and origin.lower() not in (f"http://{host}".lower(), f"https://{host}".lower()):
        return True
    # Fetch Metadata (W3C): "same-site" is another port or name of this machine
    return request.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none")
