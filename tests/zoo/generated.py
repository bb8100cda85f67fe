"""Random architectures: whatever mixture of ordinary layers a user may bring, small, deterministic, and never degenerate.

A network is a list of blocks drawn one after the other. Each block is tried on zeros to learn its output shape; one that does not fit is drawn
again. A whole network is kept only if it is within the size limits, its logits are finite and depend on the input, and gradients reach most of
its parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tests.zoo.blocks import ONE, TWO, Draw, Rejected, block, head, unit
from tests.zoo.calibrate import calibrate

PARAMETERS = 300_000
MULTIPLICATIONS = 30_000_000
CELLS = 40_000
"""Limits: parameters, multiplications and the largest activation of one input."""


class Generated(nn.Module):
    """Blocks in sequence, then a head."""

    def __init__(self, blocks: Sequence[nn.Module], head: nn.Sequential) -> None:
        super().__init__()
        self.blocks, self.head = nn.Sequential(*blocks), head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


def _multiplications(model: nn.Module, x: Tensor) -> tuple[int, int]:
    """Multiplications of the convolutions and linear layers for one input, and the largest activation."""
    counts, largest = [0], [x[0].numel()]

    def count(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        largest.append(output[0].numel())
        if hasattr(module, "weight") and module.weight is not None and module.weight.dim() > 1:
            positions = output[0].numel() // output.shape[1] if output.dim() > 2 else 1
            counts.append(module.weight.numel() * positions)

    handles = [m.register_forward_hook(count) for m in model.modules() if not list(m.children())]
    model(x)
    for handle in handles:
        handle.remove()
    return sum(counts), max(largest)


def _out_shape(module: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    try:
        out = module.eval()(torch.zeros(2, *shape))
    except (RuntimeError, ValueError) as error:  # a kernel larger than its input, padding larger than the input, and the like
        raise Rejected(str(error)) from error
    return tuple(out.shape[1:])


def _initialise(model: nn.Module) -> None:
    """He initialisation, so that signals survive a dozen layers without norm."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() > 1:
            nn.init.kaiming_normal_(weight, nonlinearity="linear")
            weight.data.mul_(1.3)


def _attempt(seed: int) -> tuple[nn.Module, tuple[int, ...], str]:
    draw = Draw(seed)
    kit = ONE if draw.chance(0.2) else TWO
    shape: tuple[int, ...] = (draw.pick(1, 3, 6), draw.pick(24, 50, 64, 128)) if kit is ONE else (draw.pick(3, 3, 1), draw.integer(12, 32), 0)
    if kit is TWO:
        shape = (shape[0], shape[1], shape[1] if draw.chance(0.7) else draw.integer(12, 32))
    start, classes = shape, draw.integer(2, 10)
    blocks: list[nn.Module] = []
    texts: list[str] = []
    count = draw.integer(3, 12)
    for _ in range(20 * count):
        if len(blocks) == count:
            break
        try:
            layer, text = unit(draw, kit, shape[0], draw.pick(8, 12, 16)) if not blocks else block(draw, kit, shape)
            after = _out_shape(layer, shape)
        except Rejected:
            continue
        cells = after[0]
        for s in after[1:]:
            cells *= s
        if min(after[1:]) < 3 or cells > 12_000 or after[0] > 64:
            continue
        blocks.append(layer)
        texts.append(text)
        shape = after
    layers, text = head(draw, kit, shape, classes)
    model = Generated(blocks, layers)
    _initialise(model)
    if sum(p.numel() for p in model.parameters()) > PARAMETERS or len(blocks) < count:
        raise Rejected("too large")
    model.eval()
    with torch.no_grad():
        multiplications, largest = _multiplications(model, torch.zeros(1, *start))
    if multiplications > MULTIPLICATIONS or largest > CELLS:
        raise Rejected("too much work")
    calibrate(model, start, seed)
    _spread(model, start, seed)
    return model, start, f"{start} {classes} classes: " + " -> ".join([*texts, text])


def _spread(model: Generated, shape: tuple[int, ...], seed: int) -> None:
    """Scale the last layer so that each logit has about zero mean and unit spread over noise inputs.

    Raises:
        Rejected: the network ignores its input, is not finite, or its gradients vanish or explode.
    """
    x = torch.randn(32, *shape, generator=torch.Generator().manual_seed(seed + 1))
    out = model.head.out
    with torch.no_grad():
        features = model(x)
        deviation = features.std(0)
        if not torch.isfinite(features).all() or bool((deviation < 1e-3 * (features.abs().mean() + 1e-3)).any()):
            raise Rejected("constant or not finite")
        out.weight.div_(deviation.view(-1, *[1] * (out.weight.dim() - 1)))
        out.bias.sub_(features.mean(0)).div_(deviation)
    model.zero_grad()
    model(x).square().sum().backward()
    norms = [float(p.grad.norm()) for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    if not all(0 <= n < 1e5 for n in norms) or sum(n > 1e-6 for n in norms) < 0.7 * len(norms):
        raise Rejected("vanishing or exploding gradients")


def generate(seed: int) -> tuple[nn.Module, tuple[int, ...], str]:
    """A random network for this seed.

    Returns:
        the network in eval mode (float32 [N, *input_shape] to logits [N, classes], 2 to 10 classes, logits of about unit spread on noise), its input
        shape without the batch axis (C x H x W up to 3x32x32, or C x L for about one seed in five), and a description of its blocks.
    """
    for attempt in range(100):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed * 100 + attempt)
            try:
                return _attempt(seed * 100 + attempt)
            except Rejected:
                continue
    raise RuntimeError(f"seed {seed}: no acceptable network in 100 draws")
