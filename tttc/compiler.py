"""``tttc.compile``: the one place that knows every phase."""

from __future__ import annotations
