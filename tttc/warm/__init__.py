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

import torch


def asked() -> bool:
    """Whether programs are kept on disk and used: as ``TTTC_WARM`` says, 0 or 1.

    Without it where there is no GPU: none of this has run on one yet.
    """
    said = os.environ.get("TTTC_WARM")
    return not torch.cuda.is_available() if said is None else said != "0"
