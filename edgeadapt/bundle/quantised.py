"""What a bundle says of its frozen model in 8 bits: which layers, what each gets wrong, what all cost."""

from __future__ import annotations

from dataclasses import dataclass

from edgeadapt.bundle.reading import Node


@dataclass(frozen=True)
class QuantisedLayer:
    """A convolution or a large linear layer of the frozen model.

    Attributes:
        layer: the path of the user's module.
        weights: their number.
        decibels: signal over error of its output in 8 bits, alone; 0 where it was not tried.
        choice: "int8" or "float".
        why: it stays in float32; "" for 8 bits.
    """

    layer: str
    weights: int
    decibels: float
    choice: str
    why: str


@dataclass(frozen=True)
class Quantised:
    """The frozen model in 8 bits.

    Attributes:
        form: "int8": weights in 8 bits by output channel, activations in 8 unsigned bits, sums in 32.
        gradient: what gradients pass it in, "int8" or "float"; "none" where the method has none.
        saved: what a step keeps of its forward pass for the backward one, the same.
        held_out: samples that accuracy was measured on.
        labelled: whether these have labels.
        float_accuracy, accuracy: share of right predictions (or, without labels, of those that are float32's) before and after; None where no
            samples were held out.
        layers: every convolution, then every large linear layer.
    """

    form: str
    gradient: str
    saved: str
    held_out: int
    labelled: bool
    float_accuracy: float | None
    accuracy: float | None
    layers: tuple[QuantisedLayer, ...]

    @property
    def floating(self) -> tuple[QuantisedLayer, ...]:
        """The layers that stay in float32."""
        return tuple(layer for layer in self.layers if layer.choice == "float")

    def line(self) -> str:
        """What is in 8 bits and what that costs, in one line."""
        count, whole = len(self.layers) - len(self.floating), len(self.layers)
        told = f"{self.form}: {count} of {whole} layers"
        told += "" if self.gradient == "none" else f", gradients in {self.gradient}, saved activations in {self.saved}"
        if self.float_accuracy is None or self.accuracy is None:
            return told
        if not self.labelled:
            return f"{told}; {100 * self.accuracy:.1f} % of predictions are those of float, on {self.held_out:,} held-out samples"
        return f"{told}; {100 * self.float_accuracy:.1f} % right in float, {100 * self.accuracy:.1f} % so, on {self.held_out:,} held-out samples"


def read_quantised(node: Node) -> Quantised:
    """From JSON, strictly.

    Raises:
        BundleError: a key is missing, unknown or wrongly typed.
    """
    node.keys({"form", "gradient", "saved", "held_out", "labelled", "float_accuracy", "accuracy", "layers"})
    return Quantised(
        node.child("form").text("int8"),
        node.child("gradient").text("int8|float|none"),
        node.child("saved").text("int8|float|none"),
        node.child("held_out").integer(0),
        node.child("labelled").truth(),
        node.child("float_accuracy").maybe(Node.number),
        node.child("accuracy").maybe(Node.number),
        node.child("layers").items(_layer),
    )


def _layer(node: Node) -> QuantisedLayer:
    node.keys({"layer", "weights", "decibels", "choice", "why"})
    weights, decibels = node.child("weights").integer(0), node.child("decibels").number()
    return QuantisedLayer(node.child("layer").text(), weights, decibels, node.child("choice").text("int8|float"), node.child("why").text())
