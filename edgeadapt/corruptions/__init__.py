"""Image corruptions of Hendrycks & Dietterich (2019), and the streams made of them, in numpy and Pillow alone.

Which are exact, which are random and which are approximate is said at each function; `PROCEDURAL` names those that cannot be the published ones.
"""

from __future__ import annotations

from edgeadapt.corruptions.catalogue import corrupt
from edgeadapt.corruptions.parameters import CORRUPTIONS, EXTRA, PROCEDURAL
from edgeadapt.corruptions.streams import Batch, continual, correlated, gradual, mixed, recurring

__all__ = [
    "CORRUPTIONS",
    "EXTRA",
    "PROCEDURAL",
    "Batch",
    "continual",
    "correlated",
    "corrupt",
    "gradual",
    "mixed",
    "recurring",
]
