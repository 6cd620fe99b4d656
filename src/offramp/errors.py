"""Errors meant for users: one clear sentence each, with the remedy. Knows nothing else."""

from __future__ import annotations


class OfframpError(Exception):
    """Something the user asked for cannot be done; the command line ends with status 1."""


class UsageError(OfframpError):
    """The request itself is wrong (a bad value, an impossible pair): status 2."""


class UnsupportedModelError(OfframpError):
    """The model cannot be run layer by layer; the message says why, in the user's words."""
