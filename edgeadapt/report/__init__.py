"""Reports: what was measured, as one HTML page that needs nothing else. Functions from data to text; no plotting library, no scripts."""

from __future__ import annotations

from edgeadapt.report.charts import Band, Curve, Group, Level, bars, lines
from edgeadapt.report.page import Page, Section, Table, render, write
from edgeadapt.report.record import Quantiles, Trace

__all__ = ["Band", "Curve", "Group", "Level", "Page", "Quantiles", "Section", "Table", "Trace", "bars", "lines", "render", "write"]
