"""Tools for the tests and benchmarks of the operators: errors, random inputs, memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def error_ratio(actual: Tensor, expected: Tensor) -> float:
    """Return rms(expected - actual) / rms(expected), in float64.

    0 if the tensors are equal; inf or nan if only `expected` is all zero or a value is not finite.
    Raises ValueError if the shapes differ.
    """
    if actual.shape != expected.shape:
        raise ValueError(
            f"error_ratio: actual has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
        )
    expected = expected.detach().double()
    difference = rms(expected - actual.detach())
    return 0.0 if difference == 0 else float(difference / rms(expected))


def rms(x: Tensor) -> Tensor:
    """Return the root of the mean square."""
    return x.square().mean().sqrt()


def random_inputs(
    B: int,
    H: int,
    T: int,
    Dk: int,
    Dv: int | None = None,
    G: int | None = None,
    *,
    seed: int = 0,
    forget_bias: float = 2.0,
) -> dict[str, Tensor]:
    """Draw float32 inputs of `mlstm` from a seed.

    q, k (B, H, T, Dk) have gone through a softmax feature map; v (B, G, T, Dv) and i, f (B, H, T)
    are Gaussian. By default Dv = Dk and G = H. All require gradients.
    """
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    inputs = {
        "q": (2 * normal(B, H, T, Dk)).softmax(dim=-1),
        "k": (2 * normal(B, H, T, Dk)).softmax(dim=-1),
        "v": normal(B, G or H, T, Dv or Dk),
        "i": normal(B, H, T),
        "f": normal(B, H, T) + forget_bias,
    }
    return {name: x.requires_grad_() for name, x in inputs.items()}


def random_state(B: int, H: int, Dk: int, Dv: int, *, seed: int = 0) -> dict[str, Tensor]:
    """Draw the fields of an MLSTMState: C and n require gradients, n is positive, m Gaussian."""
    draw = torch.Generator().manual_seed(seed)
    C = torch.randn(B, H, Dk, Dv, generator=draw).requires_grad_()
    n = torch.rand(B, H, Dk, generator=draw).requires_grad_()
    return {"C": C, "n": n, "m": torch.randn(B, H, generator=draw)}


def random_segments(B: int, T: int, *, mean_length: int, seed: int = 0) -> Tensor:
    """Draw segment ids (B, T): documents of geometric length, numbered in order."""
    draw = torch.Generator().manual_seed(seed)
    return (torch.rand(B, T, generator=draw) < 1 / mean_length).long().cumsum(dim=1)


def to_float64(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors as float64 leaves that require gradients where the originals do."""
    return {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in inputs.items()}


def outputs_and_grads(
    operator: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Mapping[str, Tensor],
    *,
    seed: int = 1,
) -> dict[str, Tensor]:
    """Run operator(**inputs) and back-propagate fixed random cotangents through every output.

    Returns the outputs as h (several: h0, h1, ...) and, for each input that requires gradients, its
    gradient as d<name>. Equal output shapes get equal cotangents, whatever the dtype.
    """
    result = operator(**inputs)
    outputs = (result,) if isinstance(result, Tensor) else tuple(result)
    draw = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(x.shape, generator=draw).to(x) for x in outputs]
    leaves = {name: x for name, x in inputs.items() if x.requires_grad}
    grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents) if leaves else ()
    names = ["h"] if isinstance(result, Tensor) else [f"h{n}" for n in range(len(outputs))]
    found = dict(zip(names, [x.detach() for x in outputs], strict=True))
    for name, grad in zip(leaves, grads, strict=True):
        found[f"d{name}"] = grad
    return found


def device_is_broken(device: torch.device) -> bool:
    """Say whether a kernel's illegal access has ended this process's context."""
    try:
        torch.zeros(1, device=device).cpu()
    except RuntimeError as error:
        return "out of memory" not in str(error)
    return False


def allocated_peak(step: Callable[[], None]) -> int:
    """Return the most bytes that the CPU allocator held in a step, beyond those held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = recorded.profiler.kineto_results.events()
    allocations = [event for event in events if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(allocations, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
