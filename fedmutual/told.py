"""Exceptions whose text is for this machine, with another one for those elsewhere."""

from __future__ import annotations

from typing import Self


class Told(Exception):
    """An exception whose text may name what only this machine's owner should see: folders, files, values.

    Parameters
    ----------
    text : str
        For the owner's own log: names the folder or setting and the remedy.
    told : str or None
        The same without anything of the owner's, for an error reply. None: only what kind of error it is.
    """

    def __init__(self, text: str = "", told: str | None = None) -> None:
        super().__init__(text)
        self.told = told

    @classmethod
    def to_everyone(cls, text: str) -> Self:
        """Return one whose whole text may leave the site."""
        return cls(text, text)
