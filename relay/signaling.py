"""Pass signed greetings to the participants they are for. Reads only the receiver's id."""

from __future__ import annotations

from relay.participants import Participant, Participants
from shared.protocol import Gone, Signal, peer_id


def pass_on(participants: Participants, sender: Participant, signal: Signal) -> None:
    """Deliver a signal as it is, or tell its sender that the receiver is not here."""
    receiver = participants.get(peer_id(signal.receiver))
    if receiver is None:
        sender.send(Gone(signal.receiver))
        return
    participants.meet(sender, receiver)
    receiver.send(signal)
