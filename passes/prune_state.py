"""Prune: state leaves that nobody wants and that only they themselves need are not computed.

Before (the sums S are never read but by the returned state)::

    return W_new, S_new, z

After (``keep={0}``)::

    return W_new, z
"""

from __future__ import annotations

from collections.abc import Iterable

from tttc.ir.body import Body, role
from tttc.ir.build import ancestors


def live_states(body: Body, wanted: Iterable[int], outputs: Iterable[int]) -> set[int]:
    """The state leaves needed to compute the wanted states and outputs of every mini-batch."""
    live = set(wanted)
    results = body.results
    while True:
        reached = ancestors(
            [*(results[i] for i in live), *(results[body.states + i] for i in outputs)]
        )
        found = live | {
            role(n)[1]
            for n in reached
            if n.op == "placeholder" and role(n)[0] in ("anchor", "carry")
        }
        if found == live:
            return live
        live = found
