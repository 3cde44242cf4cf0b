"""What a hop sent to the next one, kept so that a replacement can be brought to the same state."""

from __future__ import annotations


class InputLog:
    """Rows of hidden states in wire format, one per position, in host memory."""

    def __init__(self, row_bytes: int) -> None:
        self._row_bytes = row_bytes
        self._rows = bytearray()

    def __len__(self) -> int:
        """Positions held."""
        return len(self._rows) // self._row_bytes

    @property
    def held_bytes(self) -> int:
        """Memory held."""
        return len(self._rows)

    def write(self, position: int, rows: bytes) -> None:
        """Forget everything from `position` on, then append the rows."""
        self.truncate(position)
        self._rows += rows

    def truncate(self, position: int) -> None:
        """Forget everything from `position` on."""
        del self._rows[position * self._row_bytes :]

    def copy(self, length: int) -> InputLog:
        """Another log with the first `length` positions."""
        copied = InputLog(self._row_bytes)
        copied._rows += self._rows[: length * self._row_bytes]
        return copied

    def read(self, start: int, end: int) -> bytes:
        """The rows of positions [start, end)."""
        return bytes(self._rows[start * self._row_bytes : end * self._row_bytes])
