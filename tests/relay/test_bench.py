"""The measurement of a relay under load runs, and a restart under load loses nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_restart_under_load_loses_nothing() -> None:
    command = [sys.executable, "-m", "bench.relay", "--peers", "200", "--handshakes", "50", "--seconds", "3"]
    result = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=150
    )
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout.splitlines()[-1])
    assert set(figures) == {"kib_per_peer", "lookup_p99_ms", "lost"}
    assert figures["lost"] == 0
