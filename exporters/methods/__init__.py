"""The adaptation methods, by name."""

from __future__ import annotations

from edgeadapt.exporters.methods.base import Hyper, Method, Outcome, Setting, Setup, Term, Terms, loss
from edgeadapt.exporters.methods.cotta import Cotta
from edgeadapt.exporters.methods.eata import Eata
from edgeadapt.exporters.methods.ecotta import EcoTTA
from edgeadapt.exporters.methods.exits import Exits
from edgeadapt.exporters.methods.lame import Lame
from edgeadapt.exporters.methods.lean import Lean
from edgeadapt.exporters.methods.rotta import Rotta
from edgeadapt.exporters.methods.sar import Sar
from edgeadapt.exporters.methods.side import Side
from edgeadapt.exporters.methods.source import Norm, Source
from edgeadapt.exporters.methods.surgeon import Surgeon
from edgeadapt.exporters.methods.t3a import T3A
from edgeadapt.exporters.methods.tent import Tent

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (Source, Norm, Tent, Eata, Sar, Rotta, Cotta, EcoTTA, Side, Surgeon, Exits, Lame, T3A, Lean)
}

__all__ = ["METHODS", "Hyper", "Method", "Outcome", "Setting", "Setup", "Term", "Terms", "loss"]
