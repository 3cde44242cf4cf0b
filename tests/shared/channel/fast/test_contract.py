"""What we use of aiortc below its public names is there, and when it is not, links work all the same."""

from __future__ import annotations

import aioice
import aiortc
import pytest
from aiortc import RTCSctpTransport
from OpenSSL import SSL

from shared.channel.fast import contract
from shared.channel.webrtc import PLAIN, TRANSPORTS_VARIABLE, best_transports
from tests.harness.direct_links import linked


def test_everything_we_lean_on_is_installed() -> None:
    assert contract.missing() == []
    assert best_transports() != PLAIN


def test_a_method_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(RTCSctpTransport, "_abort")
    monkeypatch.delattr(SSL.Connection, "bio_write")

    assert contract.missing() == [
        "aiortc.RTCSctpTransport._abort",
        "OpenSSL.SSL.Connection.bio_write",
    ]


def test_an_attribute_that_is_no_longer_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(self: object) -> None: ...

    monkeypatch.setattr(aioice.Connection, "__init__", changed)

    assert contract.missing() == [
        "aioice.ice.Connection.__init__._check_list",
        "aioice.ice.Connection.__init__._nominated",
        "aioice.ice.Connection.__init__._protocols",
    ]


def test_another_minor_version_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aiortc, "__version__", "1.17.0")

    assert contract.missing() == ["aiortc 1.16.* (this is 1.17.0)"]


async def test_a_link_opens_without_what_we_lean_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(contract, "missing", lambda: ["aiortc.RTCSctpTransport._abort"])
    transports = best_transports()

    assert transports == PLAIN
    assert "direct links will be slow" in caplog.text
    async with linked(transports, transports) as (ann, bob):
        await ann.send(b"hello")
        assert await bob.got(1) == [b"hello"]


def test_the_plain_transports_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRANSPORTS_VARIABLE, "plain")

    assert best_transports() == PLAIN


async def test_fast_and_plain_speak_with_each_other() -> None:
    for transports in ((best_transports(), PLAIN), (PLAIN, best_transports())):
        async with linked(*transports) as (ann, bob):
            await ann.send(b"there")
            await bob.send(b"back")
            assert (await bob.got(1), await ann.got(1)) == ([b"there"], [b"back"])
