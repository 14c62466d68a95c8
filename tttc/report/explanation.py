"""What :func:`tttc.explain` returns: the stages, the records of a report, and its renderings."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from tttc.report.records import ModelReport, RegionReport, ScanReport

if TYPE_CHECKING:
    from tttc.codegen.kernel import Kernel


class Explanation:
    """What :func:`explain` found.

    Attributes:
        stages: ordered ``{name: torch.fx.GraphModule}``, each of which runs: ``ex.stages[n](*ex.example_inputs(n))``.
            ``model.captured`` is the graph TorchDynamo captured, its scans the naive loop; ``model.aten`` the
            same in ATen operators, its scans compiled; ``model.fused`` after fusion. Then come the stages of each
            distinct scan: ``dualise``, or ``scan1.dualise`` where there are several.
        scans: one :class:`ScanReport` for each distinct scan.
        models: one :class:`ModelReport` for each captured graph.
        layers: ``{name of a layer: name of its scan}``; equal layers share one. The model itself is ``""``.
        name: what the model is called: its class, or the function's name.
        versions: of tttc, torch, triton and Python.
        kernels: the emitted kernels, each with ``name``, ``source``, ``path``, ``config``, ``resources`` and ``cost``
            (the bytes of the tensors of one launch). Those of a scan are also in its report, those of its backward
            in ``report.backward``.
        regions: what shares each kernel of the model around the scans, by the kernel's path.
    """

    def __init__(self) -> None:
        self.stages: dict[str, fx.GraphModule] = {}
        self.scans: list[ScanReport] = []
        self.models: list[ModelReport] = []
        self.layers: dict[str, str] = {}
        self.kernels: list[Kernel] = []
        self.regions: dict[str, RegionReport] = {}
        self.name = ""
        self.versions = versions()
        self._parameters: dict[int, str] = {}  # names by data pointer
        self._inputs: dict[str, tuple[Any, ...]] = {}

    def example_inputs(self, stage: str) -> tuple[Any, ...]:
        """Arguments for a stage, taken from the model's own input.

        A stage of the model gets what it was called with; a stage of a scan one mini-batch of the first head of
        the first sequence, or one token of it.

        Raises:
            KeyError: there is no such stage.
            ValueError: the stage was never called.
        """
        if stage not in self.stages:
            raise KeyError(f"stage: expected one of {', '.join(self.stages)}, got {stage!r}")
        if stage not in self._inputs:
            raise ValueError(f"stage: {stage} was never called with the input given")
        return self._inputs[stage]

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """The report as one HTML file that loads nothing and runs nothing, also written to ``path`` if given.

        For each distinct scan: the step as written, each stage drawn, what its pass changed, contraction orders,
        the recurrence, kernels and why they are scheduled so, errors, a roofline. Equal layers are shown once.
        """
        from tttc.report.html import page

        return _written(page(self), path)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """All of the report as JSON, also written to ``path`` if given.

        Its schema is ``tttc/report/schema.json`` (JSON Schema 2020-12), which says what each field means.
        """
        return _written(json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n", path)

    def to_dict(self) -> dict[str, Any]:
        """What :meth:`to_json` writes: dictionaries, lists, strings, numbers and None."""
        from tttc.report.document import document

        return document(self)

    def to_svg(self, what: str, path: str | os.PathLike[str] | None = None) -> str:
        """A picture for a paper as SVG with its own (light) colours, also written to ``path`` if given.

        Args:
            what: a stage, by its name in :attr:`stages`; or ``"recurrence"``, ``"errors"``, ``"roofline"``, after
                the scan's name where there are several (``"scan1.recurrence"``).
            path: where to write it.

        Raises:
            KeyError: there is no such picture.

        Example:
            >>> import torch, tttc
            >>> layer = tttc.nn.TTTLinear(16, num_heads=2, mini_batch_size=4)
            >>> ex = tttc.explain(layer, torch.randn(1, 8, 16), backend="torch", target="")
            >>> ex.to_svg("dualise")[:4]
            '<svg'
        """
        from tttc.report.pictures import picture

        return _written(picture(self, what), path)

    def _repr_html_(self) -> str:
        from tttc.report.html import frame

        return frame(self)

    def __str__(self) -> str:
        from tttc.report.render import explanation
        from tttc.report.text import plain

        return plain(*explanation(self))

    def __rich__(self) -> Any:
        from rich.console import Group

        from tttc.report.render import explanation

        return Group(*explanation(self))

    def __repr__(self) -> str:
        return (
            f"<Explanation: {len(self.stages)} stages, {len(self.scans)} distinct scans in "
            f"{len(self.layers)} layers, {len(self.kernels)} kernels>"
        )


def _written(text: str, path: str | os.PathLike[str] | None) -> str:
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text


def versions() -> dict[str, str]:
    """Of what a report depends on."""
    import triton

    return {
        "tttc": importlib.metadata.version("tttc"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }
