"""What can go wrong, by what follows from it."""

from __future__ import annotations


class BenchError(Exception):
    """The run cannot go on; the text is one line for the user."""


class MeasureFailedError(Exception):
    """One system did not manage one measure; the text says why, and the run goes on without that figure."""


class SystemFailedError(MeasureFailedError):
    """One system cannot be measured any further; the text says why, and the run goes on without it."""
