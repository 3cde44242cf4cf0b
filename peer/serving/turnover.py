"""When running sessions will have made room. Knows how far each is and how fast it goes; sees no clock."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

SOONEST_S = 0.5
LATEST_S = 30.0
"""Nobody is sent away for longer: most answers end before their limit, and by how much nobody can know."""


class Tenant(msgspec.Struct, frozen=True, kw_only=True):
    """A session that runs here."""

    held_bytes: int
    drawn: int
    """Positions behind its prompt so far."""
    left: int
    """Positions that it may still fill."""
    age_s: float


def room_after_s(tenants: Sequence[Tenant], missing_bytes: int) -> float:
    """When the sessions that end first, by their limits and at their pace, will have given back so much."""
    freed = 0
    for tenant in sorted(tenants, key=_ends_after_s):
        freed += tenant.held_bytes
        if freed >= missing_bytes:
            return max(SOONEST_S, _ends_after_s(tenant))
    return LATEST_S


def _ends_after_s(tenant: Tenant) -> float:
    """One that has drawn nothing yet has shown no pace."""
    return min(LATEST_S, tenant.left * tenant.age_s / tenant.drawn) if tenant.drawn else LATEST_S
