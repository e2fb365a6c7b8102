"""Races and timings of this client and its peers: `python -m benchmarks.race`, `python -m benchmarks.startup`.

Run from the repository's root, on Linux or macOS.
"""
