"""The toy bundle on bytes: frozen convolutions of 8 bits, a live normalisation in floats between them, and a step that goes back through them.

    x → bytes → convolutions (with a residual sum) → floats → statistics, scale and shift → bytes → convolution → floats → mean → head → logits

The step goes back through the last convolution with its weights made floats again, and through quantisers as if they were not there.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from edgeadapt.bundle import PLACEHOLDER, WEIGHTS_OFFSET, Bundle, WeightsFile
from edgeadapt.memory import Plan, read, smallest
from tests import toybundle
from tests.shapedtoy import shaped
from tests.toybundle import SIDE, Toy

STEP = 0.05
"""A quantum of every tensor of bytes."""


class Int8Toy(Toy):
    """As `Toy`.

    Args:
        width: channels.
        depth: convolutions after the first.
        residual: of those, whether each adds to what it was given.
        grouped: whether they are depthwise.
        moved: what of the convolutions is not constant: "zero" (the zero point of what they read), "scale" or "bias".
        channels: whether what is added has a scale for each channel, as exports have it.
    """

    def __init__(
        self,
        width: int = 16,
        depth: int = 1,
        batches: tuple[int, ...] = (1, 4),
        residual: bool = True,
        grouped: bool = False,
        moved: str = "",
        channels: bool = False,
    ) -> None:
        self.residual, self.grouped, self.moved, self.channels = residual, grouped, moved, channels
        super().__init__(width, depth, batches)
        self.graphs = {name: shaped(data) for name, data in self.graphs.items()}
        for name, spec in self.specs.items():
            plan = Plan(read(self.graphs[name]))
            self.specs[name] = replace(spec, peak_bytes=plan.peak, region_bytes=smallest(plan))

    def _graph(self, role: str, batch: int) -> None:
        if not hasattr(self, "scales"):
            self._quantise()
        super()._graph(role, batch)

    def _quantise(self) -> None:
        """Weights of 8 bits by channel instead of the floats, and one more convolution."""
        generator = np.random.default_rng(8)
        self.frozen["after"] = generator.standard_normal((self.width, self.width, 3, 3), np.float32) / np.float32(3 * self.width**0.5)
        self.scales: dict[str, Any] = {}
        self.weights = WeightsFile()
        for name, array in self.frozen.items():
            if name == "head":
                continue
            if self.grouped and name.startswith("conv"):
                array = 2 * array[:, :1]
            self.scales[name] = np.abs(array).max((1, 2, 3)) / np.float32(127)
            self.frozen[name] = np.round(array / self.scales[name][:, None, None, None]).astype(np.int8)
        self.places = {name: self.weights.add(array) for name, array in self.frozen.items()}

    def builder(self, *arguments: Any) -> _Build:
        return _Build(self, *arguments)

    def bundle(self, path: Path) -> Bundle:
        """Written and opened."""
        return Bundle.open(self.write(path))


class _Build(toybundle._Build):
    """One graph."""

    toy: Int8Toy

    def weight(self, name: str) -> str:
        array = self.toy.frozen[name]
        offset, nbytes = self.toy.places[name]
        if all(tensor.name != name for tensor in self.external):
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            tensor = TensorProto(name=name, data_type=kind, dims=array.shape, data_location=TensorProto.EXTERNAL)
            for key, value in (("location", PLACEHOLDER), ("offset", str(WEIGHTS_OFFSET + offset)), ("length", str(nbytes))):
                tensor.external_data.add(key=key, value=value)
            self.external.append(tensor)
        return name

    def pair(self, zero: int) -> tuple[str, str]:
        """A scale and a zero point, or what of them is not constant."""
        scale, point = self.const(STEP), self.const(zero, np.uint8)
        if self.toy.moved == "zero":
            point = self.turned(self.const(zero, np.int64), TensorProto.UINT8)
        if self.toy.moved == "scale":
            scale = self("Abs", scale)
        return scale, point

    def turned(self, value: str, kind: int) -> str:
        """A constant that onnxruntime does not know to be one."""
        out = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node("Cast", [value], [out], to=kind))
        return out

    def convolution(self, h: str, name: str, given: tuple[str, str], made: tuple[str, str]) -> str:
        scale, weights = self.toy.scales[name], self.toy.frozen[name]
        bias = self.const(np.arange(len(scale)) % 7 * 40, np.int64 if self.toy.moved == "bias" else np.int32)
        bias = self.turned(bias, TensorProto.INT32) if self.toy.moved == "bias" else bias
        inputs = [h, *given, self.weight(name), self.const(scale), self.const(np.zeros(len(scale)), np.int8), *made, bias]
        group = self.toy.width if weights.shape[1] == 1 < self.toy.width else 1
        return self("QLinearConv", *inputs, pads=[1] * 4, kernel_shape=[3, 3], group=group)

    def features(self) -> str:
        given, made = self.pair(128), self.pair(0)  # of what is made nothing is below zero: the activation costs nothing
        h = self.convolution(self("QuantizeLinear", "x", *given), "stem", given, made)
        for level in range(self.toy.depth):
            before, h = h, self.convolution(h, f"conv{level}", made, made)
            if self.toy.residual:
                total = self("Add", self("DequantizeLinear", before, *made), self.values(h, made))
                h = self("QuantizeLinear", total, *made)
        return self("DequantizeLinear", h, *made)

    def values(self, h: str, made: tuple[str, str]) -> str:
        """Of the codes of a branch."""
        if not self.toy.channels:
            return self("DequantizeLinear", h, *made)
        scale = self.const(np.float32(STEP) * (1 + np.arange(self.toy.width) % 3 / np.float32(4)))
        return self("DequantizeLinear", h, scale, self.const(np.zeros(self.toy.width), np.uint8), axis=1)

    def normalised(self, h: str) -> str:
        z = super().normalised(h)
        shape = self.const([1, self.toy.width, 1, 1], np.int64)
        if "norm.gamma" in self.reads:
            scaled = self("Mul", z, self("Reshape", "state.norm.gamma", shape))
            self.plain, z = z, self("Add", scaled, self("Reshape", "state.norm.beta", shape))
        given, made = self.pair(128), self.pair(128)
        return self("DequantizeLinear", self.convolution(self("QuantizeLinear", z, *given), "after", given, made), *made)

    def affine(self, pooled: str) -> str:
        return pooled  # they were before the last convolution

    def gradients(self, back: str, flat: str) -> tuple[str, str]:
        """Of scale and shift: back through the mean and the last convolution."""
        spread = self("Reshape", self("Mul", back, self.const(1 / SIDE**2)), self.const([self.batch, self.toy.width, 1, 1], np.int64))
        wide = self("Expand", spread, self.const([self.batch, self.toy.width, SIDE, SIDE], np.int64))
        weights = self("DequantizeLinear", self.weight("after"), self.const(self.toy.scales["after"]), axis=0)
        gradient = self("ConvTranspose", wide, weights, pads=[1] * 4, kernel_shape=[3, 3])
        scale = self("ReduceSum", self("Mul", gradient, self.plain), self.axes(0, 2, 3), keepdims=0)
        return scale, self("ReduceSum", gradient, self.axes(0, 2, 3), keepdims=0)
