"""ATen operators, forward and backward, as standard ONNX operators."""

from edgeadapt.exporters.lowering import convolution, elementwise, reductions, resample, shapes
from edgeadapt.exporters.lowering.lower import Unsupported, lower

__all__ = ["Unsupported", "convolution", "elementwise", "lower", "reductions", "resample", "shapes"]
