"""What the graphs of a bundle are for, and the ways to run them."""

from __future__ import annotations

from typing import NamedTuple

STEPS = ("adapt", "learn")
SUMS, UPDATE = "-sums", "-update"
ROLES = ("source", "predict", *STEPS)
"""Those that are run alone."""

PIECES = tuple(f"{step}{kind}" for step in STEPS for kind in (SUMS, UPDATE))
"""Those of steps in pieces: the graph that takes some of the frames, and the one that ends the step."""

GUARD = "update"
"""The metric of a step whose state holds whole numbers: not finite where what they were made of was not, and the step is dropped."""

VARIANTS = ("", "lean", "least")
GRAPH = r"(source|predict|(adapt|learn)(-sums)?)\.b[1-9][0-9]{0,8}(\.lean|\.least)?|(adapt|learn)-update"
"""What a graph is called, as a regular expression."""


class Form(NamedTuple):
    """A way to run a role at a batch.

    Attributes:
        role, batch: what is run.
        graphs: the one graph; or that which adds to the sums, run on `micro` frames after `micro` frames, and that which ends the step.
        micro: the frames of a piece; 0: the batch is run at once.
    """

    role: str
    batch: int
    graphs: tuple[str, ...]
    micro: int = 0
