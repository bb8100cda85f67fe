"""ATen operators, forward and backward, as standard ONNX operators."""

from edgeadapt.exporters.lowering import arithmetic, convolution, elementwise, pruned, quantised, reductions, resample, shapes
from edgeadapt.exporters.lowering.lower import Missing, Unsupported, lower

__all__ = ["Missing", "Unsupported", "arithmetic", "convolution", "elementwise", "lower", "pruned", "quantised", "reductions", "resample", "shapes"]
