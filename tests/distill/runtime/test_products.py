"""Linear layers of many rows: the same numbers, where it pays, of plain tensors only."""

import contextlib
import threading

import pytest
import torch
from torch.overrides import _get_current_function_mode_stack as modes
from torch.profiler import ProfilerActivity, profile

from xlstm_distill import MixerConfig, convert
from xlstm_distill.models.decoding import prefill
from xlstm_distill.runtime import products
from xlstm_distill.runtime.products import LEAST_ROWS, LEAST_WIDTH, LinearAsConvolution
from xlstm_kernels.testing import error_ratio

F = torch.nn.functional
INFO = "vendor_id : {}\n"


class Quantised(torch.Tensor):
    """A weight with a class of its own."""


def convolutions(x: torch.Tensor, *weights: torch.Tensor) -> tuple[torch.Tensor, int]:
    with LinearAsConvolution(), profile(activities=[ProfilerActivity.CPU]) as seen:
        found = F.linear(x, *weights)
    return found, sum(event.name == "aten::conv2d" for event in seen.events())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, LEAST_ROWS, 24), (3, 111, 24), (2, 3, 5, 40, 17)])
def test_gives_the_same_product(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(*shape[:-2], shape[-1], shape[-2]).mT  # in another order in memory
    given = [torch.randn(n, *rest) for n, *rest in [(18, shape[-1]), (18,)][: 1 + bias]]
    found, used = convolutions(x, *given)
    truth = F.linear(x.double(), *(y.double() for y in given))
    assert used == 1
    assert found.is_contiguous()
    assert (found - truth).norm() < 1e-6 * truth.norm()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(LEAST_ROWS, 24), (3, 111, 24)])
def test_gives_the_same_gradients(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    given = [torch.randn(n, *rest) for n, *rest in [shape, (18, 24), (18,)][: 2 + bias]]
    back, found = torch.randn(*shape[:-1], 18), {}
    for dtype in (torch.float32, torch.float64):
        leaves = [x.to(dtype).requires_grad_() for x in given]
        with LinearAsConvolution(), profile(activities=[ProfilerActivity.CPU]) as seen:
            found[dtype] = torch.autograd.grad(F.linear(*leaves), leaves, back.to(dtype))
        used = sum(event.name == "aten::convolution_backward" for event in seen.events())
        assert used == (dtype == torch.float32)
    for single, exact in zip(*found.values(), strict=True):
        assert error_ratio(single, exact) < 1e-6


def test_rows_are_filled_up_to_few_numbers(monkeypatch) -> None:
    """oneDNN keeps code for each: prompts of many lengths would take hundreds of MiB."""
    counts, convolve = set(), F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda x, *y, **z: counts.add(x.shape) or convolve(x, *y, **z))
    for rows in range(LEAST_ROWS, LEAST_ROWS + 129):
        with LinearAsConvolution():
            assert F.linear(torch.ones(rows, 8), torch.ones(16, 8)).eq(8).all()
    assert len(counts) == 3


@pytest.mark.parametrize(
    ("rows", "width", "kind", "dtype"),
    [
        (LEAST_ROWS - 1, LEAST_WIDTH, torch.Tensor, torch.float32),
        (LEAST_ROWS, LEAST_WIDTH - 1, torch.Tensor, torch.float32),
        (LEAST_ROWS, LEAST_WIDTH, Quantised, torch.float32),
        (LEAST_ROWS, LEAST_WIDTH, torch.Tensor, torch.float64),
        (LEAST_ROWS, LEAST_WIDTH, torch.Tensor, torch.bfloat16),
    ],
)
def test_leaves_other_products_as_they_are(
    rows: int, width: int, kind: type, dtype: torch.dtype
) -> None:
    x, weight = torch.randn(rows, 8).to(dtype), torch.randn(width, 8).to(dtype)
    found, used = convolutions(x, weight.as_subclass(kind))
    assert used == 0
    assert torch.equal(found, F.linear(x, weight))
    with torch.autocast("cpu"):
        assert convolutions(x, weight)[0].dtype == F.linear(x, weight).dtype


@pytest.mark.parametrize("vendor", ["AuthenticAMD", "GenuineIntel"])
def test_is_for_processors_where_it_was_measured(tmp_path, monkeypatch, vendor: str) -> None:
    (info := tmp_path / "cpuinfo").write_text(INFO.format(vendor))
    monkeypatch.setattr(products, "CPU_INFO", info)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    products.is_mkl_narrow.cache_clear()
    try:
        used = products.fast_linear_layers(torch.device("cpu"))
        wanted = torch.backends.mkl.is_available() and vendor == "AuthenticAMD"
        assert isinstance(used, LinearAsConvolution) == wanted
        assert not isinstance(
            products.fast_linear_layers(torch.device("meta")), LinearAsConvolution
        )
    finally:
        products.is_mkl_narrow.cache_clear()


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
@torch.no_grad()
def test_a_prompt_read_by_it_has_the_same_logits(tiny_teacher, monkeypatch, family) -> None:
    used, convolve = [], products._convolve
    monkeypatch.setattr(products, "_convolve", lambda *x: used.append(1) or convolve(*x))
    teacher = tiny_teacher(family, num_hidden_layers=2)
    model = convert(teacher, MixerConfig(window=8, sinks=2)).eval()
    ids = torch.randint(3, 97, (2, LEAST_ROWS), generator=torch.Generator().manual_seed(1))
    exact = model.double()(ids, logits_to_keep=1).logits
    assert not used  # of float64
    model.float()
    for context, wanted in ((contextlib.nullcontext, False), (LinearAsConvolution, True)):
        monkeypatch.setattr(prefill, "fast_linear_layers", lambda device, made=context: made())
        found = model(ids, logits_to_keep=1).logits
        assert error_ratio(found, exact) < 3e-6
        assert bool(used) == wanted


@torch.no_grad()
def test_a_teacher_reads_prompts_by_it_and_steps_as_before(tiny_teacher, monkeypatch) -> None:
    used, convolve = [], products._convolve
    monkeypatch.setattr(products, "_convolve", lambda *x: used.append(1) or convolve(*x))
    monkeypatch.setattr(products, "is_mkl_narrow", lambda: True)
    model = tiny_teacher("llama", num_hidden_layers=2).eval()
    ids = torch.randint(3, 97, (2, LEAST_ROWS), generator=torch.Generator().manual_seed(1))
    exact = model.double()(ids).logits
    model.float()
    with products.fast_prompts(model):
        assert error_ratio(model(input_ids=ids).logits, exact) < 3e-6
        assert used
        used.clear()
        with pytest.raises(IndexError):
            model(ids + 10_000)  # what has begun ends all the same
        model(ids[:, :3])
        with torch.enable_grad():
            model(ids).logits.sum().backward()
    F.linear(torch.ones(LEAST_ROWS, 8), torch.ones(4, 8))
    model(ids)
    assert not used


@torch.no_grad()
def test_passes_of_threads_and_passes_broken_off_leave_no_mode(tiny_teacher, monkeypatch) -> None:
    monkeypatch.setattr(products, "is_mkl_narrow", lambda: True)
    model, left = tiny_teacher("llama", num_hidden_layers=1).eval(), []
    inside, ids = threading.Barrier(2), torch.full((2, LEAST_ROWS), 3)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    @torch.no_grad()
    def answer() -> None:
        model(ids)
        left.append(len(modes()))

    with products.fast_prompts(model):
        # Both are in a pass at once.
        hook = model.model.register_forward_hook(lambda *_: (inside.wait(20), None)[1])
        threads = [threading.Thread(target=answer) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        hook.remove()
    assert left == [0, 0]
    with pytest.raises(KeyboardInterrupt), products.fast_prompts(model):
        model.model.register_forward_hook(stop)
        model(ids)
    assert not modes()
