"""Records of other rules: times beside their peers, and errors."""

from __future__ import annotations

from page_tables.markdown import number, table
from page_tables.records import Record


def beside_peers(record: Record) -> str:
    """Times of other rules beside their peers, and errors of all."""
    data = record.data
    parts = []
    rows = []
    for name, directions in data.get("times", {}).items():
        for direction, contenders in directions.items():
            if not isinstance(contenders, dict) or "us" not in contenders.get("tttc", {}):
                continue
            others = [
                f"{n} {number(r['us'])}"
                + (f" (by {r['length']} tokens)" if r.get("length") else "")
                for n, r in contenders.items()
                if n != "tttc" and "us" in r
            ]
            ours = number(contenders["tttc"]["us"])
            rows.append([name.replace("_", " "), direction, ours, ", ".join(others)])
    if rows:
        parts.append(table(["rule", "direction", "tttc", "peers"], rows))
    rows = [
        [name.replace("_", " "), str(found["form"]), f"{found['output']:.1e}", worst]
        for name, found in data.get("errors", {}).items()
        if "output" in found
        for gradients in [[x for k, x in found.items() if k.startswith("gradient")]]
        for worst in [f"{max(gradients):.1e}" if gradients else "not measured"]
    ]
    if rows:
        head = ["rule", "form", "error of outputs", "largest error of a gradient"]
        parts.append(table(head, rows))
    return "\n".join(parts)
