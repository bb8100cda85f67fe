"""The adaptation methods as plain PyTorch: modules, autograd and torch.optim, nothing of edgeadapt. What bundles are compared with."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from tests.reference.base import Adaptation, Norm, Source, Tent
from tests.reference.ecotta import EcoTTA
from tests.reference.normalisation import LiveBatchNorm, follow_stream
from tests.reference.parts import Split, counts, split
from tests.reference.side import Side

__all__ = ["Adaptation", "EcoTTA", "LiveBatchNorm", "Norm", "Side", "Source", "Split", "Tent", "counts", "follow_stream", "reference", "split"]


def reference(model: nn.Module, method: str, ends: Sequence[str] = (), statistics: str | None = None, **options: object) -> Adaptation:
    """An adaptation method by its name.

    Args:
        model: a CIFAR ResNet or WideResNet of the zoo; it is copied.
        method: source, norm, tent, ecotta or side.
        ends: for ecotta the name of each part's last module.
        statistics: "live" or "source"; the method's usual one by default.
        options: see the classes.
    """
    live = None if statistics is None else statistics == "live"
    if method == "ecotta":
        return EcoTTA(model, counts(model, ends), live=live, **options)  # type: ignore[arg-type]
    return {"source": Source, "norm": Norm, "tent": Tent, "side": Side}[method](model, live=live, **options)  # type: ignore[arg-type]
