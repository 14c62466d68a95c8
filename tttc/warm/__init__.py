"""Warm starts: what a compilation made is kept on disk, and a later process begins with it.

::

    first process                                     a later one
    TorchDynamo traces the model                      (the frame of the model is looked up by what it is)
    guards say when that holds                        the same guards, built on this process' objects
    AOTAutograd, fusion, kernels                      the source text of the fused graphs
    ------------------------------ on disk ------------------------------

TorchDynamo asks a callback for the code of a frame it has none for. Under :func:`tttc.compile` it asks
:class:`tttc.warm.frames.WarmFrames`, which answers from disk where it can and else passes the question on. What it answers with
is an entry of TorchDynamo's own cache: guards are checked by TorchDynamo, and a guard that fails compiles anew.
"""

import os


def asked() -> bool:
    """Whether programs are kept on disk and used: unless ``TTTC_WARM`` is 0."""
    return os.environ.get("TTTC_WARM", "1") != "0"
