"""Verified implementations of what the lessons teach; each module is one subject."""

__version__ = "0.1.0"
