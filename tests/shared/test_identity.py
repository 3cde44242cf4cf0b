"""A key is made once, kept private, and signs for one purpose at a time."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import BadSignature, ProtocolError, SettingsError
from shared.identity import Identity, PeerId, id_bytes, id_from_bytes, short, verify

ANN = Identity.generate()


def test_a_key_is_made_once_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "identity.key"
    assert Identity.load(path).id == Identity.load(path).id


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other permissions")
def test_only_its_owner_can_read_a_key(tmp_path: Path) -> None:
    Identity.load(tmp_path / "identity.key")
    assert stat.S_IMODE((tmp_path / "identity.key").stat().st_mode) == 0o600


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 33, b"-----BEGIN PRIVATE KEY-----"])
def test_a_file_that_is_no_key_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "identity.key"
    path.write_bytes(content)
    with pytest.raises(SettingsError, match=r"identity\.key is not an identity key"):
        Identity.load(path)
    assert path.read_bytes() == content


def test_ids_and_bytes_are_the_same_thing() -> None:
    assert id_from_bytes(id_bytes(ANN.id)) == ANN.id
    assert id_from_bytes(memoryview(id_bytes(ANN.id))) == ANN.id
    assert short(ANN.id) == ANN.id[:8]


@pytest.mark.parametrize(
    "text", ["", "00", "0" * 63, "0" * 66, "G" * 64, "A" * 64, " " + "0" * 63, "0 " * 64, "é" * 64]
)
def test_a_text_that_is_no_id_is_refused(text: str) -> None:
    with pytest.raises(ProtocolError, match="not a participant id"):
        id_bytes(PeerId(text))


@settings(deadline=None)
@given(st.text())
def test_any_text_as_an_id(text: str) -> None:
    with pytest.raises(ProtocolError):
        id_bytes(PeerId(text))


@settings(deadline=None)
@given(payload=st.binary(max_size=100), signature=st.binary(max_size=70))
def test_signatures_made_up_are_refused(payload: bytes, signature: bytes) -> None:
    with pytest.raises(BadSignature):
        verify(ANN.id, "corolla-test", payload, signature)


@settings(deadline=None)
@given(payload=st.binary(max_size=100), place=st.integers(0, 63), change=st.integers(1, 255))
def test_a_signature_holds_for_one_payload_and_one_domain(payload: bytes, place: int, change: int) -> None:
    signature = ANN.sign("corolla-test", payload)
    verify(ANN.id, "corolla-test", payload, signature)

    changed = bytearray(signature)
    changed[place] ^= change
    for peer, domain, what, by in (
        (ANN.id, "corolla-test", payload, bytes(changed)),
        (ANN.id, "corolla-test", payload + b"x", signature),
        (ANN.id, "corolla-tes", b"t" + payload, signature),
        (ANN.id, "corolla-other", payload, signature),
        (Identity.generate().id, "corolla-test", payload, signature),
    ):
        with pytest.raises(BadSignature):
            verify(peer, domain, what, by)


@settings(deadline=None)
@given(st.binary(min_size=32, max_size=32))
def test_keys_that_are_no_point_of_the_curve_are_refused(raw: bytes) -> None:
    with pytest.raises(BadSignature):
        verify(id_from_bytes(raw), "corolla-test", b"", bytes(64))
