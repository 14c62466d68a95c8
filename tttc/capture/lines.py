"""Lines of the user's program."""

from __future__ import annotations

import sys
from typing import Any

from tttc.ir.body import is_users


def user_line() -> str | None:
    """The line of the user's program that is running."""
    frame: Any = sys._getframe(1)
    while frame is not None and not is_users(frame.f_code.co_filename):
        frame = frame.f_back
    return None if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"
