"""Two links in a network namespace whose one network takes only short packets from some time on.

Prints how long packets were before and after, and whether all that was sent arrived.
"""

from __future__ import annotations

import asyncio
import subprocess

from shared.channel.webrtc import best_transports
from tests.harness.direct_links import frames_in, linked, random_frames
from tests.shared.channel.fast.test_path_mtu import lengthened, packet_bytes

FAST = best_transports()
SENT_BYTES = 4 << 20


async def main() -> None:
    async with linked(FAST, FAST) as (ann, bob):
        print(await lengthened(ann))
        sending = asyncio.create_task(ann.send_all(random_frames(SENT_BYTES, seed=1)))
        await bob.got(frames_in(SENT_BYTES, seed=1) // 4)
        await asyncio.to_thread(subprocess.run, ["ip", "link", "set", "lo", "mtu", "1400"], check=True)
        await bob.got(frames_in(SENT_BYTES, seed=1))
        print(packet_bytes(ann))
        print("equal" if bob.digest == await sending else "different")


if __name__ == "__main__":
    asyncio.run(main())
