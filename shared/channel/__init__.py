"""Authenticated message pipes between participants: by a relay at once, directly as soon as that works."""

from shared.channel.addresses import Listen
from shared.channel.channel import Channel, Handler, PathReport
from shared.channel.dialer import Dialer
from shared.framing import Priority

__all__ = ["Channel", "Dialer", "Handler", "Listen", "PathReport", "Priority"]
