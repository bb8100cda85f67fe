"""The adaptation methods as plain PyTorch: modules, autograd and torch.optim, nothing of edgeadapt. What bundles are compared with."""

from __future__ import annotations

from tests.reference.base import Adaptation, Norm, Source, Tent
from tests.reference.ecotta import EcoTTA
from tests.reference.normalisation import LiveBatchNorm, follow_stream
from tests.reference.parts import Split, counts, split
from tests.reference.reliable import Eata, Sar
from tests.reference.side import Side
from tests.reference.teachers import Cotta, Rotta
from tests.reference.twin import fixed, scalars, twin

__all__ = [
    "Adaptation",
    "Cotta",
    "Eata",
    "EcoTTA",
    "LiveBatchNorm",
    "Norm",
    "Rotta",
    "Sar",
    "Side",
    "Source",
    "Split",
    "Tent",
    "counts",
    "fixed",
    "follow_stream",
    "scalars",
    "split",
    "twin",
]
