"""How long a first call takes: cold, warm from disk, tuned; one layer and many. Each in a process of its own.

    python benchmarks/compile_time.py benchmarks/results/OUT.json [--layers 24] [--runs 3] [--directions forward training]

Times are seconds from after `import torch` to the first result, `import tttc` among them, of that the first call alone, the
processor's time of the process from `import tttc` on, and a second call, which only computes; on a GPU in bf16 by kernels,
else in float32 by torch operations. "After an eager call": the model ran uncompiled on a few tokens, so that what
PyTorch loads for its own operators (cuBLAS, a module of kernels for each kind of operator) is there. Caches on disk are empty folders of their own. Of several runs the one with the
shortest first call counts: what else a machine does makes it longer.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

WIDTH, HEADS, BATCH, LENGTH = 768, 12, 4, 2048
CASES = {
    "one layer, cold": (1, False, "new", False),
    "one layer, warm from disk": (1, False, "kept", False),
    "one layer, warm from disk, after an eager call": (1, False, "kept", True),
    "one layer, tuned, cold": (1, True, "new", False),
    "one layer, tuned, warm from disk": (1, True, "kept", False),
    "{n} layers, cold": (0, False, "new", False),
    "{n} layers, warm from disk": (0, False, "kept", False),
}
DIRECTIONS = {"forward": False, "training": True}


def child(layers: int, tune: bool, backward: bool, eager: bool) -> None:
    """One measurement; prints it as JSON."""
    import time

    import torch

    start, used = time.perf_counter(), time.process_time()
    import tttc
    from tttc.models import TTTConfig, TTTLanguageModel

    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    length = LENGTH if gpu else 64
    sizes = {"hidden_size": WIDTH, "num_layers": layers, "num_heads": HEADS}
    model = TTTLanguageModel(TTTConfig(**sizes, vocab_size=256)).to(device, dtype)
    ids = torch.randint(256, (BATCH, length), device=device)
    compiled = tttc.compile(model, strict=True, tune=tune)

    def call(run: torch.nn.Module = compiled, ids: torch.Tensor = ids) -> float:
        """The time when it is done."""
        with torch.set_grad_enabled(backward):
            y = run(ids)
            if backward:
                y.float().square().mean().backward()
        if gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    if eager:
        call(model, ids[:1, :16])
    called = time.perf_counter()
    end = call()
    row = {"seconds": end - start, "first call": end - called}
    row["processor"] = time.process_time() - used
    again = time.perf_counter()
    row["second call"] = call() - again
    print(json.dumps(row | {"device": torch.cuda.get_device_name() if gpu else "cpu"}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--directions", nargs="+", default=list(DIRECTIONS), choices=DIRECTIONS)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        layers, *flags = map(int, options.child)
        child(layers, *map(bool, flags))
        return
    import torch

    rows: list[dict[str, Any]] = []
    load = [os.getloadavg()[0]]
    document = {
        "command": shlex.join(["python", *sys.argv]),
        "date": str(datetime.date.today()),
        "device": "",  # as processes say: this one does not wake it
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "runs": options.runs,
        "load": load,  # where it is more than the cores, seconds say little: see the processor's
        "versions": {"torch": torch.__version__},
        "rows": rows,
    }
    for direction in options.directions:
        backward, folder = DIRECTIONS[direction], None
        for name, (layers, tune, cache, eager) in CASES.items():
            arguments = [str(int(x)) for x in (layers or options.layers, tune, backward, eager)]
            row: dict[str, Any] = {
                "case": name.format(n=options.layers),
                "direction": "training step" if backward else "forward",
            }
            found: list[dict[str, Any]] = []
            for _ in range(options.runs):
                if cache == "new" or folder is None:
                    folder = tempfile.TemporaryDirectory()
                environment = {
                    **os.environ,
                    "TTTC_CACHE_DIR": f"{folder.name}/tttc",
                    "TRITON_CACHE_DIR": f"{folder.name}/triton",
                }
                run = subprocess.run(
                    [sys.executable, __file__, str(options.out), "--child", *arguments],
                    env=environment, capture_output=True, text=True, check=False,
                )  # fmt: skip
                load.append(os.getloadavg()[0])
                if run.returncode:
                    row["error"] = run.stderr[-500:]
                else:
                    found.append(json.loads(run.stdout.splitlines()[-1]))
                    document["device"] = found[-1].pop("device")
            if found:
                row |= min(found, key=lambda x: x["first call"])
            rows.append(row)
            print(row, flush=True)
            options.out.write_text(json.dumps(document, indent=1))  # a run may be stopped


if __name__ == "__main__":
    main()
