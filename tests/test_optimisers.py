"""Optimisers as pure functions give torch's own steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from edgeadapt.exporters.ir import MANY, VECTOR_BYTES
from edgeadapt.exporters.optimisers import OPTIMISERS, step


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_steps_equal_torchs(name: str) -> None:
    random = torch.Generator().manual_seed(0)
    parameters = {"a": torch.randn(3, 4, generator=random), "b": torch.randn(5, generator=random)}
    hyper = {"rate": torch.tensor(0.01), "momentum": torch.tensor(0.9)}
    optimiser = OPTIMISERS[name]
    moments = optimiser.init(parameters)
    leaves = {key: value.clone().requires_grad_() for key, value in parameters.items()}
    theirs = torch.optim.SGD(leaves.values(), 0.01, 0.9) if name == "sgd" else torch.optim.Adam(leaves.values(), 0.01, (0.9, 0.999), 1e-6)
    for _ in range(5):
        gradients = {key: torch.randn(value.shape, generator=random) for key, value in parameters.items()}
        given = {key: value.clone() for key, value in parameters.items()}
        parameters, moments = optimiser.update(gradients, given, moments, hyper)
        for key, leaf in leaves.items():
            leaf.grad = gradients[key].clone()
        theirs.step()
        for key, leaf in leaves.items():
            torch.testing.assert_close(parameters[key], leaf.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_no_gradient_and_no_momentum_is_no_step(name: str) -> None:
    parameters = {"a": torch.ones(3)}
    hyper = {"rate": torch.tensor(0.1), "momentum": torch.tensor(0.9)}
    optimiser = OPTIMISERS[name]
    following, _ = optimiser.update({"a": torch.zeros(3)}, parameters, optimiser.init(parameters), hyper)
    assert torch.equal(following["a"], parameters["a"])


def test_gradients_of_rounding_alone_do_not_become_full_steps() -> None:
    parameters = {"a": torch.ones(3)}
    hyper = {"rate": torch.tensor(0.1), "momentum": torch.tensor(0.9)}
    optimiser = OPTIMISERS["adam"]
    following, _ = optimiser.update({"a": torch.full((3,), 1e-9)}, parameters, optimiser.init(parameters), hyper)
    assert (following["a"] - 1).abs().max() < 0.1 * 2e-3


@pytest.mark.parametrize("go", [None, 1.0, 0.0])
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_vectors_that_are_taken_as_one_step_as_they_would_alone(name: str, go: float | None) -> None:
    """To the bit, with all moments by the same names in the same order; matrices stay by themselves."""
    random = torch.Generator().manual_seed(0)
    shapes = {"m": (3, 4), **{f"v{index}": (index + 2,) for index in range(MANY)}, "scalar": (), "n": (2, 2, 3)}
    parameters = {key: torch.randn(shape, generator=random) for key, shape in shapes.items()}
    hyper = {"rate": torch.tensor(0.01), "momentum": torch.tensor(0.9)} | ({} if go is None else {"go": torch.tensor(go)})
    optimiser = OPTIMISERS[name]
    ours = theirs = parameters, optimiser.init(parameters)
    for _ in range(3):
        gradients = {key: torch.randn(value.shape, generator=random) * (1.0 if go is None else go) for key, value in parameters.items()}
        ours, theirs = step(optimiser, gradients, *ours, hyper), optimiser.update(gradients, *theirs, hyper)
        for found, wanted, before in zip(ours, theirs, (parameters, optimiser.init(parameters)), strict=True):
            assert list(found) == list(before)
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize(("count", "size", "joined"), [(MANY, 3, True), (MANY - 1, 3, False), (MANY, VECTOR_BYTES // 4 + 1, False)])
def test_many_small_vectors_are_taken_as_one(count: int, size: int, joined: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    optimiser = OPTIMISERS["sgd"]
    update, seen = optimiser.update, []

    def noted(gradients: dict[str, torch.Tensor], *rest: Any) -> Any:
        seen.append([value.numel() for value in gradients.values()])
        return update(gradients, *rest)

    monkeypatch.setattr(optimiser, "update", noted)
    parameters = {"matrix": torch.ones(2, 2), **{f"v{index}": torch.ones(size) for index in range(count)}}
    step(optimiser, parameters, parameters, optimiser.init(parameters), {"rate": torch.tensor(0.1), "momentum": torch.tensor(0.9)})
    assert seen == [[4, count * size] if joined else [4, *[size] * count]]
