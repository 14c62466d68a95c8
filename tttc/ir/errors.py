"""Errors of the compiler."""

from __future__ import annotations


class NotLowerable(Exception):
    """A scan can't be compiled; ``reason`` says why and ``where`` names the user's source line, if known."""

    def __init__(self, reason: str, where: str | None = None) -> None:
        super().__init__(reason if where is None else f"{reason} (at {where})")
        self.reason = reason
        self.where = where


class KernelTooLarge(NotLowerable):
    """A kernel takes more registers or shared memory than the device has."""


class CheckError(AssertionError):
    """A graph broke a rule of the IR, or a pass changed what it computes."""
