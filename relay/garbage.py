"""When Python looks for garbage in a relay's whole memory: rarely, since everyone waits meanwhile.

Nearly all that a relay holds belongs to connections that live on, and a full collection walks through all of
it: some 60 µs for each connection, 0.3 s for five thousand. Only connections that have ended leave cycles.
"""

from __future__ import annotations

import asyncio
import gc
import time

from relay.meeting import Meeting

LOOK_EVERY_S = 5.0
LEAST_ENDED = 1000
"""What so many connections leave behind is some 20 MB."""
LONGEST_S = 900.0
"""Should anything else make garbage, it goes at least this often."""
_NEVER = 1 << 30


async def collect_seldom(meeting: Meeting) -> None:
    """Collect when enough connections have ended, until cancelled; for a process that is a relay alone."""
    young, middle, old = gc.get_threshold()
    # What is young is collected as ever: that takes less than a millisecond.
    gc.set_threshold(young, middle, _NEVER)
    collected_at, ended_before = time.monotonic(), 0
    try:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            ended = meeting.counts.logins - len(meeting.participants)
            enough = max(LEAST_ENDED, len(meeting.participants) // 4)
            if ended - ended_before >= enough or time.monotonic() - collected_at > LONGEST_S:
                gc.collect()
                collected_at, ended_before = time.monotonic(), ended
    finally:
        gc.set_threshold(young, middle, old)
