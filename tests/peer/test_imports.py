"""What a peer imports costs memory and seconds, so it imports what it needs."""

from __future__ import annotations

import subprocess

from tests.harness.commands import ROOT, python

OPTIONAL = ("bitsandbytes", "peft", "llama_cpp", "triton")


def test_a_peer_imports_no_optional_library_before_it_is_wanted() -> None:
    look = f"import sys, peer.lifecycle, peer.remote; print([n for n in {OPTIONAL!r} if n in sys.modules])"
    done = subprocess.run(
        [python("peer")[0], "-c", look], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"
