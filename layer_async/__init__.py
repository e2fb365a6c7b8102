"""Async client SDK for The Layer's web API: two tokens in, a typed answer out."""

__version__ = "0.1.0"
