"""What a form raises if a model has nothing for it to change."""

from __future__ import annotations


class Unfit(Exception):
    """A model has nothing that a form could change; the text says what."""
