"""Measurements, side by side in one run. Each command prints its settings and ends with one JSON line."""
