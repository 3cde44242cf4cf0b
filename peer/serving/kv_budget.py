"""How much memory sessions may take on this peer, and who holds it. Counts bytes; allocates nothing."""

from __future__ import annotations

from shared.errors import Busy

RETRY_S = 2.0


class KvBudget:
    """Reservations against a fixed number of bytes: a session has all it may ever need, or nothing."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self._reserved: dict[str, int] = {}

    @property
    def reserved_bytes(self) -> int:
        return sum(self._reserved.values())

    @property
    def free_bytes(self) -> int:
        return self.total_bytes - self.reserved_bytes

    def held_bytes(self, session: str) -> int:
        """What a session holds."""
        return self._reserved.get(session, 0)

    def reserve(self, session: str, size_bytes: int) -> None:
        """Hold bytes for a session, in place of what it held before. Raises Busy when too few are left."""
        held = self.held_bytes(session)
        if size_bytes > self.free_bytes + held:
            free = (self.free_bytes + held) / 1e6
            raise Busy(
                f"the session needs {size_bytes / 1e6:.1f} MB of KV memory and {free:.1f} MB are free",
                RETRY_S,
            )
        self._reserved[session] = size_bytes

    def release(self, session: str) -> None:
        """Give back what a session held; a session that holds nothing is no error."""
        self._reserved.pop(session, None)
