"""Which host names and web origins a relay answers to. Pure decisions over headers.

Two attacks end here. A page whose own DNS name was pointed at a relay on someone's machine sends that name as
Host (DNS rebinding). And a login is signed for the host that was dialled: a relay that passes somebody's
login on to this one would have to dial it under its own name.
"""

from __future__ import annotations

import ipaddress

from yarl import URL

from relay.settings import RelaySettings

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_WILDCARD = ("", "0.0.0.0", "::")


def own_names(settings: RelaySettings) -> frozenset[str] | None:
    """The host names that a relay goes by; None when it cannot know them and believes any.

    A relay that listens everywhere and was given no name is in that position: behind a home router or in a
    container it does not see the address that others dial.
    """
    if settings.names:
        return frozenset(name.lower() for name in (*settings.names, *_LOOPBACK))
    if settings.host in _WILDCARD:
        return None
    return frozenset((settings.host.lower(), *(_LOOPBACK if _is_loopback(settings.host) else ())))


def host_is_ours(host: str, names: frozenset[str] | None) -> bool:
    """Whether a request's Host header (a name, perhaps with a port) names this relay."""
    if names is None:
        return True
    try:
        return (URL(f"http://{host}").host or "") in names
    except ValueError:
        return False


def origin_is_welcome(origin: str | None, host: str, allowed: tuple[str, ...]) -> bool:
    """Whether a page of this origin may open a WebSocket. Only browsers send an origin."""
    if origin is None or origin in allowed:
        return True
    try:
        authority = URL(origin).host_port_subcomponent
    except ValueError:
        return False
    return authority is not None and origin != "null" and authority == host.lower()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
