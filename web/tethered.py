"""`python -m web.tethered ROOM …` runs a room's command that ends when its parent does, however that ended.

Standard input is the tether: nothing is ever written to it, and it closes when the parent is gone, even
when the parent was killed and could not say goodbye.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time

FAREWELL_S = 10.0


def main() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def _end_with_parent() -> None:
    # Not sys.stdin: a thread that waits in its buffer would hold up the end of the interpreter.
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(FAREWELL_S)
    os._exit(1)


if __name__ == "__main__":
    main()
