"""TENT: entropy minimisation over the affine parameters of normalisation (Wang et al., arXiv 2006.10726)."""

from __future__ import annotations

from edgeadapt.exporters.methods.affine import AffineMethod


class Tent(AffineMethod):
    """Scale and shift of every normalisation are trained on the mean entropy of the predictions (equation 1)."""

    name, summary = "tent", "scale and shift of the normalisation layers follow the entropy of the predictions"
    optimiser, rate = "adam", 3e-4
