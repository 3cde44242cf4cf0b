"""What the router before us does to packets, learnt from a relay's two STUN ports, and what that rules out.

A direct link needs each router to let in what the other sends out. `look` asks what ours does; `hopeless`
says why two sides cannot meet, in words, so that neither tries for seconds or waits for the other.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import NamedTuple

from aioice.stun import Class, Message, Method, parse_message

from shared.protocol import Describe, NatKind

log = logging.getLogger(__name__)

# Pauses before asking again; after the last one, no answer is the answer.
PAUSES_S = (0.1, 0.2, 0.3, 0.4)
CHANGE_PORT = 0x02

Address = tuple[str, int]


class Question(NamedTuple):
    """Sent to one address of the relay, to be answered from there or from its other port."""

    to: Address
    answered_from: Address


# ---------------------------------------------------------------- asking


async def look(host: str, port: int, second_port: int) -> NatKind:
    """What stands between us and a relay: known after a round trip, or a second where silence tells it."""
    try:
        relay, own = await _addresses(host, port)
        first, second = (relay, port), (relay, second_port)
        # The second socket never writes to the second port: an answer from there was let in unasked.
        with (
            _asking(own, Question(first, first), Question(second, second)) as known,
            _asking(own, Question(first, second)) as stranger,
        ):
            for pause_s in PAUSES_S:
                known.ask()
                stranger.ask()
                with suppress(TimeoutError):
                    async with asyncio.timeout(pause_s):
                        await known.complete.wait()
                        if known.answers[0] == known.answers[1]:
                            await stranger.complete.wait()
                        break
    except OSError as error:
        log.info("nothing is known of our router: %s", error)
        return "unknown"
    return judge(own, *known.answers, heard_stranger=stranger.complete.is_set())


def judge(own: str, first: Address | None, second: Address | None, *, heard_stranger: bool) -> NatKind:
    """From how the two ports of a relay see one socket of ours, and whether a stranger's packet came in."""
    if first is None and second is None:
        return "blocked"
    if first is None or second is None:
        return "unknown"  # one of the relay's ports is closed, or much was lost
    if first != second:
        return "symmetric"
    if not heard_stranger:
        return "restricted"
    return "open" if first[0] == own else "cone"


async def _addresses(host: str, port: int) -> tuple[str, str]:
    """The relay's IPv4 address, and our own on the way there. Raises OSError when there is no such way."""
    found = await asyncio.get_running_loop().getaddrinfo(
        host, port, family=socket.AF_INET, type=socket.SOCK_DGRAM
    )
    relay = str(found[0][4][0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((relay, port))
        own: str = probe.getsockname()[0]
    return relay, own


class _Asker:
    """One socket that asks, and what was answered to it so far."""

    def __init__(self, asking: socket.socket, questions: tuple[Question, ...]) -> None:
        self.answers: list[Address | None] = [None] * len(questions)
        self.complete = asyncio.Event()
        self._socket = asking
        self._questions = questions
        self._requests = [Message(Method.BINDING, Class.REQUEST) for _ in questions]
        for request, question in zip(self._requests, questions, strict=True):
            if question.to != question.answered_from:
                request.attributes["CHANGE-REQUEST"] = CHANGE_PORT

    def ask(self) -> None:
        for request, question, answer in zip(self._requests, self._questions, self.answers, strict=True):
            if answer is None:
                with suppress(OSError):
                    self._socket.sendto(bytes(request), question.to)

    def read(self) -> None:
        with suppress(OSError, ValueError):
            data, sender = self._socket.recvfrom(2048)
            self._answered(parse_message(data), sender)

    def _answered(self, response: Message, sender: Address) -> None:
        for place, (request, question) in enumerate(zip(self._requests, self._questions, strict=True)):
            if (
                response.transaction_id == request.transaction_id
                and response.message_class is Class.RESPONSE
                and sender == question.answered_from
            ):
                self.answers[place] = response.attributes.get("XOR-MAPPED-ADDRESS")
        if None not in self.answers:
            self.complete.set()


@contextmanager
def _asking(own: str, *questions: Question) -> Iterator[_Asker]:
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.setblocking(False)
        asking.bind((own, 0))
        asker = _Asker(asking, questions)
        loop.add_reader(asking, asker.read)
        try:
            yield asker
        finally:
            loop.remove_reader(asking)


# ---------------------------------------------------------------- judging a pair

# Machines of a WireGuard mesh such as Tailscale's reach each other in here, whatever their routers do.
MESH = ip_network("100.64.0.0/10")


def hopeless(own: Describe, other: Describe) -> str:
    """Why no direct link can come about, as a sentence; empty when one might. Both sides find the same."""
    if _may_be_neighbours(own, other):
        return ""
    kinds = own.nat, other.nat
    if kinds == ("symmetric", "symmetric"):
        return "both routers use another public port for each address they send to (symmetric NAT)"
    if kinds == ("symmetric", "restricted"):
        return f"{_SYMMETRIC.format('this')}, {_RESTRICTED.format('the other')}"
    if kinds == ("restricted", "symmetric"):
        return f"{_SYMMETRIC.format('the other')}, {_RESTRICTED.format('this')}"
    # That the other one heard from the relay's STUN shows that it is not the relay's that is silent.
    if own.nat == "blocked" and other.nat not in ("blocked", "unknown"):
        return _BLOCKED.format("this")
    if other.nat == "blocked" and own.nat not in ("blocked", "unknown"):
        return _BLOCKED.format("the other")
    return ""


_SYMMETRIC = "{} side's router uses another public port for each address it sends to (symmetric NAT)"
_RESTRICTED = "{} side's lets in only those that were written to"
_BLOCKED = "{} side's network lets no UDP through"


def _may_be_neighbours(own: Describe, other: Describe) -> bool:
    """Whether the two may reach each other without passing both routers: at home, in a VPN, or by IPv6."""
    if not _ipv4(own.seen) or not _ipv4(other.seen) or own.seen == other.seen:
        return True
    return any(_near(one, two) for one, two in itertools.product(_hosts(own), _hosts(other)))


def _near(one: IPv4Address | IPv6Address, two: IPv4Address | IPv6Address) -> bool:
    # The same address on both sides is that of a bridge which each machine has for itself.
    if one == two or one.version != two.version:
        return False
    if one.version == 6:
        return True  # Nobody translates these.
    return two in ip_network(f"{one}/24", strict=False) or (one in MESH and two in MESH)


def _hosts(description: Describe) -> list[IPv4Address | IPv6Address]:
    """The addresses of the machine itself among its candidates (RFC 8839: the fifth word, "typ host")."""
    words = [candidate.split() for candidate in description.candidates]
    return [ip_address(word[4]) for word in words if "host" in word[7:8] and _is_address(word[4])]


def _ipv4(text: str) -> bool:
    with suppress(ValueError):
        return ip_address(text).version == 4
    return False


def _is_address(text: str) -> bool:
    with suppress(ValueError):
        return bool(ip_address(text))
    return False
