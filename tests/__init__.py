"""Tests mirror the rooms; tests/harness starts real swarms."""
