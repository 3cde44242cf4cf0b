"""A real relay on loopback for the tests that attack one."""

from __future__ import annotations

from tests.relay.conftest import relay

__all__ = ["relay"]
