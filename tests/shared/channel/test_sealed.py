"""The handshake and the seal: who signed, for whom, when; nothing altered, repeated or overtaken opens."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.channel.sealed import (
    FRESH_S,
    MAX_REMEMBERED,
    Keys,
    SeenChannels,
    agree,
    make_answer,
    make_offer,
    read_greeting,
)
from shared.errors import BadSignature, ProtocolError, StaleRecord
from shared.identity import Identity
from shared.protocol import Greeting, SignedRecord, encode

ANN, BOB, EVE = (Identity.generate() for _ in range(3))
NOW = 1_800_000_000.0


def handshake() -> tuple[Keys, Keys]:
    offer = make_offer(ANN, BOB.id, NOW)
    answer = make_answer(BOB, offer.greeting, offer.record, NOW)
    return (
        agree(offer, offer.record, answer.record, answer.greeting.key),
        agree(answer, offer.record, answer.record, offer.greeting.key),
    )


def test_both_ends_arrive_at_the_same_keys() -> None:
    ann, bob = handshake()

    for sender, receiver in ((ann, bob), (bob, ann)):
        for text in (b"one", b"two"):
            assert receiver.opener(b"".join(sender.seal(text))) == text


def test_no_two_channels_and_no_two_directions_share_a_key() -> None:
    (ann, bob), (other, _) = handshake(), handshake()
    sealed = b"".join(ann.seal(b"secret"))

    assert bob.opener(sealed) == b"secret"
    assert ann.opener(sealed) is None
    assert other.opener(sealed) is None


def test_a_change_of_either_greeting_leads_to_other_keys() -> None:
    offer = make_offer(ANN, BOB.id, NOW)
    answer = make_answer(BOB, offer.greeting, offer.record, NOW)
    swapped = SignedRecord(offer.record.body.replace("offer", "offer "), offer.record.signature)
    ann = agree(offer, offer.record, answer.record, answer.greeting.key)
    bob = agree(answer, swapped, answer.record, offer.greeting.key)

    assert bob.opener(b"".join(ann.seal(b"secret"))) is None


def test_a_greeting_is_believed_from_its_signer_for_its_receiver_while_fresh() -> None:
    offer = make_offer(ANN, BOB.id, NOW)

    assert read_greeting(offer.record, BOB.id, NOW + FRESH_S - 1) == offer.greeting
    with pytest.raises(ProtocolError, match="came to"):
        read_greeting(offer.record, EVE.id, NOW)
    for late in (FRESH_S + 1, -FRESH_S - 1):
        with pytest.raises(StaleRecord, match="old"):
            read_greeting(offer.record, BOB.id, NOW + late)


def test_nobody_greets_in_another_s_name() -> None:
    offer = make_offer(ANN, BOB.id, NOW)
    forged = make_offer(EVE, BOB.id, NOW)
    body = encode(msgspec.structs.replace(forged.greeting, sender=ANN.id)).decode()

    with pytest.raises(BadSignature):
        read_greeting(SignedRecord(body, forged.record.signature), BOB.id, NOW)
    with pytest.raises(BadSignature):
        read_greeting(SignedRecord(offer.record.body, forged.record.signature), BOB.id, NOW)
    # A signature for another purpose is worth nothing here.
    other = ANN.sign("corolla-login-1", offer.record.body.encode()).hex()
    with pytest.raises(BadSignature):
        read_greeting(SignedRecord(offer.record.body, other), BOB.id, NOW)


@given(st.text(max_size=300))
def test_any_text_in_place_of_a_greeting_is_a_protocol_error(body: str) -> None:
    with pytest.raises(ProtocolError):
        read_greeting(SignedRecord(body, "00" * 64), BOB.id, NOW)


def test_an_offer_counts_once_while_it_is_fresh() -> None:
    seen = SeenChannels()
    offer = make_offer(ANN, BOB.id, NOW).greeting
    seen.check(offer, NOW)

    with pytest.raises(StaleRecord, match="second time"):
        seen.check(offer, NOW + 2 * FRESH_S - 1)
    seen.check(make_offer(ANN, BOB.id, NOW).greeting, NOW)


def test_what_offers_came_is_remembered_within_bounds() -> None:
    seen = SeenChannels()
    base = make_offer(ANN, BOB.id, NOW).greeting
    for number in range(MAX_REMEMBERED + 10):
        seen.check(msgspec.structs.replace(base, channel=f"{number:032x}"), NOW)

    assert len(seen._until) == MAX_REMEMBERED


def test_a_key_that_agrees_with_everyone_is_refused() -> None:
    offer = make_offer(ANN, BOB.id, NOW)
    weak: Greeting = msgspec.structs.replace(offer.greeting, key="00" * 32)
    answer = make_answer(BOB, weak, offer.record, NOW)

    with pytest.raises(ProtocolError, match="agrees with nobody"):
        agree(answer, offer.record, answer.record, weak.key)


@given(st.data())
def test_altered_frames_do_not_open_and_do_not_harm_those_after(data: st.DataObject) -> None:
    ann, bob = handshake()
    sealed = bytearray(b"".join(ann.seal(b"a frame")))
    position = data.draw(st.integers(0, len(sealed) - 1))
    sealed[position] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.integers(0, len(sealed)))

    assert bob.opener(bytes(sealed)) is None
    assert bob.opener(bytes(sealed[:cut])) is None
    assert bob.opener(b"".join(ann.seal(b"the next"))) == b"the next"


def test_repeated_and_overtaken_frames_do_not_open() -> None:
    ann, bob = handshake()
    one, two, three = (b"".join(ann.seal(text)) for text in (b"1", b"2", b"3"))

    assert bob.opener(one) == b"1"
    assert bob.opener(one) is None
    assert bob.opener(three) == b"3"
    assert bob.opener(two) is None
    assert bob.opener.refused == 2
