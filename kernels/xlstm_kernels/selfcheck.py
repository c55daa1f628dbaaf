"""Check the Triton kernels on this machine against torch in float64, on small cases.

`python -m xlstm_kernels.selfcheck --questions '[["mlstm", "bfloat16", [["Dk", 64], ["Dv", 64]]]]'`

The cases have an odd number of tokens, four chunks in bfloat16 and more elsewhere, grouped heads,
states in and out, and every gradient. Rows of two documents and of one have kernels of their own,
and so have the mLSTM's rows in super-chunks, without gradients, and without that of the values: all
run (`Way`). `verdicts` starts this module as a process of its own, which ends after a kernel that
broke its device.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xlstm_kernels.api import (
    hybrid_step,
    mlstm,
    mlstm_step,
    sliding_window_attention,
    window_step,
)
from xlstm_kernels.dispatch import Backend
from xlstm_kernels.state import MLSTMState, Ring, RingSlots
from xlstm_kernels.testing import (
    device_is_broken,
    error_ratio,
    outputs_and_grads,
    random_inputs,
    random_state,
    to_float64,
)
from xlstm_kernels.verdicts import BEGUN, Question, Verdict

# RMS ratio to float64 of every output and gradient. They hold in the interpreter with a GPU's
# rounding (tests/kernels/test_verdicts.py), and are below 1e-2, so that an error of 1 % is one.
BOUNDS = {"float32": 1e-5, "bfloat16": 8e-3, "float16": 2e-3}
# In bfloat16 a chunk has 128 tokens: these are four, the last one cut short, and two in each of two
# super-chunks.
TOKENS, SUPER_CHUNKS = 421, 2
WINDOW, SINKS, HEADS, GROUPS = 80, 4, 4, 2  # the window ends in the middle of a block
TIMED_TOKENS, REPEATS, STEPS = 2048, 5, 3
# Of the forget gates: states then carry most of each result, and an error of 1 % in them is one of
# about 1 % there. At 2, which forgets within a few tokens, one in dC was an error of 0.35 %.
FORGET_BIAS = 6.0
SOFTCAP = 3.0  # of scores that are about as large as 1
WIDE = ("i", "f", "C", "n", "m", "gate", "sink_logits")  # float32 whatever the dtype of the others
Tensors = dict[str, Tensor]
Draw = Callable[[Mapping[str, int], int], Tensors]


class Way(NamedTuple):
    """How a case runs. Triton compiles kernels anew for each.

    documents: two in a row, else one. cut: super-chunks of a row; 0: as many as the device needs.
    gradients: none if False. values: whether v gets one, which stage I does not ask for.
    """

    documents: bool = True
    cut: int = 1
    gradients: bool = True
    values: bool = True


Run = Callable[..., Tensors]  # of inputs, backend and way
ONE_WAY = {"": Way()}
WINDOW_WAYS = ONE_WAY | {"one document": Way(documents=False)}
MLSTM_WAYS = WINDOW_WAYS | {
    "cut": Way(cut=SUPER_CHUNKS, values=False),
    "one document, cut": Way(documents=False, cut=SUPER_CHUNKS, values=False),
    "no gradients": Way(gradients=False),
    "one document, no gradients": Way(documents=False, gradients=False),
}
TIMED = Way(cut=0)


def check(asked: Question, device: torch.device, tokens: int = TOKENS) -> Verdict:
    """Answer a question on a device."""
    start = time.monotonic()
    try:
        ratios = measure(asked, device, tokens)
        times = timings(asked, device) if device.type == "cuda" else {}
    except Exception as error:  # whatever a compiler or a driver raises is an answer
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
            return Verdict(False, f"the check found too little memory: {_line(error)}", final=False)
        return Verdict(False, f"{type(error).__name__}: {_line(error)}")
    bound = BOUNDS[asked.dtype]
    over = {name: ratio for name, ratio in ratios.items() if not ratio < bound}  # NaN is over
    reason = ""
    if over:
        figures = ", ".join(f"{name} {ratio:.1e}" for name, ratio in over.items())
        reason = f"RMS ratio to float64 over {bound:.0e}: {figures}"
    return Verdict(
        not over, reason, ratios=ratios, bound=bound, milliseconds=times,
        seconds=round(time.monotonic() - start, 1),
    )  # fmt: skip


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]


def measure(asked: Question, device: torch.device, tokens: int) -> dict[str, float]:
    """Return the RMS ratio of every output and gradient to float64, in each way of the case."""
    run, draw, ways = case(asked.operator)
    drawn = draw(dict(asked.dims), tokens)
    dtype = getattr(torch, asked.dtype)
    # Rounded before the truth is computed, so that both sides see the same numbers.
    rounded = {name: x if name in WIDE else cast(x, dtype) for name, x in drawn.items()}
    given = {name: x.to(device) for name, x in leaves(rounded).items()}
    # The truth on the CPU: nothing of the device has a part in it.
    exact = to_float64(rounded)
    truths = {
        documents: run(exact, "torch", Way(documents))
        for documents in {way.documents for way in ways.values()}
    }
    ratios = {}
    for title, way in ways.items():
        truth = truths[way.documents]
        for name, found in run(given, "triton", way).items():
            ratios[f"{title} {name}".lstrip()] = error_ratio(found.cpu(), truth[name])
    return ratios


def leaves(inputs: Mapping[str, Tensor]) -> Tensors:
    """Copy inputs as they are, without gradients: `run_sequence` asks for them on the device."""
    return {name: x.detach() for name, x in inputs.items()}


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round x and keep whether it requires gradients."""
    return x.detach().to(dtype).requires_grad_(x.requires_grad)


def documents(way: Way, x: Tensor) -> Tensor | None:
    """Return two documents a row of x (B, heads, T, D), whose border is inside a chunk, or None."""
    if not way.documents:
        return None
    tokens = x.shape[2]
    return (torch.arange(tokens, device=x.device) >= tokens // 2 - 5).long().expand(len(x), -1)


def with_gradients(inputs: Tensors, way: Way) -> Tensors:
    """Ask for the gradients of a way; m is a constant."""
    without = {"m"} if way.values else {"m", "v"}
    return {
        name: x.detach().requires_grad_(way.gradients and name not in without)
        for name, x in inputs.items()
    }


def run_mlstm(inputs: Tensors, backend: Backend, way: Way) -> Tensors:
    """Run the mLSTM from a state to a state."""

    def operator(C: Tensor, n: Tensor, m: Tensor, **row: Tensor) -> tuple[Tensor, ...]:
        x: dict[str, Any] = {**row, "state": MLSTMState(C, n, m)}
        x["segment_ids"] = documents(way, row["q"])
        if backend == "triton":
            from xlstm_kernels.triton.mlstm import mlstm_triton

            h, final = mlstm_triton(**x, cut=way.cut)
        else:
            h, final = mlstm(**x, return_state=True, backend=backend)
        return h, final.C, final.n

    return outputs_and_grads(operator, with_gradients(inputs, way))


def run_window(
    inputs: Tensors, backend: Backend, way: Way, softcap: float | None = None
) -> Tensors:
    """Run the attention."""

    def operator(q: Tensor, k: Tensor, v: Tensor, sink_logits: Tensor | None = None) -> Tensor:
        return sliding_window_attention(
            q, k, v, window=WINDOW, sinks=SINKS, segment_ids=documents(way, q),
            softcap=softcap, sink_logits=sink_logits, backend=backend,
        )  # fmt: skip

    return outputs_and_grads(operator, with_gradients(inputs, way))


def run_mlstm_steps(inputs: Tensors, backend: Backend, _: Way) -> Tensors:
    """Decode some tokens from a state."""
    x = {name: tensor.detach() for name, tensor in inputs.items()}
    state = MLSTMState(*(x.pop(name).clone() for name in MLSTMState._fields))
    outputs = []
    for t in range(x["q"].shape[2]):
        rows = row_indices(state) if t % 2 else None  # as the plugin for vLLM gives them
        outputs.append(mlstm_step(**token_of(x, t), state=state, index=rows, backend=backend))
    return {"h": torch.stack(outputs), "C": state.C, "n": state.n}


def run_hybrid_steps(
    inputs: Tensors, backend: Backend, _: Way, softcap: float | None = None
) -> Tensors:
    """Decode some tokens of the whole mixer from a state, past the end of a short window."""
    x = {name: tensor.detach() for name, tensor in inputs.items()}
    state = MLSTMState(*(x.pop(name).clone() for name in MLSTMState._fields))
    q, k = x["q"], x["k"]
    settings: dict[str, Any] = {"sinks": 1, "softcap": softcap, "backend": backend}
    settings["sink_logits"] = x.pop("sink_logits", None)
    ring = Ring.empty(
        len(q), k.shape[1], q.shape[-1], x["v"].shape[-1],
        window=STEPS - 1, sinks=1, dtype=k.dtype, device=q.device,
    )  # fmt: skip
    outputs = []
    for t in range(q.shape[2]):
        # Kernels of their own: a step that counts its token; a model's, which has slots; the one of
        # the plugin for vLLM, which also names its rows.
        slots = RingSlots.of(ring.lengths.clone(), STEPS - 1, 1, k.dtype) if t else None
        rows = row_indices(state) if t > 1 else None
        given: dict[str, Any] = {"ring": ring, "slots": slots, "index": rows, **settings}
        outputs.append(hybrid_step(**token_of(x, t), state=state, **given))
        ring.lengths.fill_(t + 1)
    # A student without the mLSTM decodes by the same kernel without its memory, another binary.
    last = token_of({name: x[name] for name in "qkv"}, 0)
    slots = RingSlots.of(ring.lengths.clone(), STEPS - 1, 1, k.dtype)
    attended = window_step(**last, ring=ring, slots=slots, **settings)
    return {"h": torch.stack(outputs), "C": state.C, "n": state.n, "attended": attended}


def token_of(x: Tensors, t: int) -> dict[str, Any]:
    """Take token t of (B, heads, T, ...) tensors; heads adjoin, as in what a model gives."""
    return {name: tensor[:, :, t].contiguous() for name, tensor in x.items()}


def row_indices(state: MLSTMState) -> Tensor:
    """Name each row of a state, in order."""
    return torch.arange(len(state.C), device=state.C.device)


def draw_mlstm(dims: Mapping[str, int], tokens: int) -> Tensors:
    """Draw a sequence and a state."""
    Dk, Dv = dims["Dk"], dims["Dv"]
    row = random_inputs(1, HEADS, tokens, Dk, Dv, GROUPS, seed=1, forget_bias=FORGET_BIAS)
    return row | random_state(1, HEADS, Dk, Dv, seed=2)


def draw_window(dims: Mapping[str, int], tokens: int) -> Tensors:
    """Draw a sequence of attention."""
    draw, D = torch.Generator().manual_seed(3), dims["D"]
    heads = {"q": HEADS, "k": GROUPS, "v": GROUPS}
    return {name: torch.randn(1, n, tokens, D, generator=draw) for name, n in heads.items()}


def draw_steps(dims: Mapping[str, int], _: int) -> Tensors:
    """Draw some tokens of the mLSTM and a state."""
    return draw_mlstm(dims, STEPS)


def draw_hybrid_steps(dims: Mapping[str, int], _: int) -> Tensors:
    """Draw what a mixer computes from some tokens, in the order of hybrid_step's arguments."""
    x, attention = draw_mlstm(dims, STEPS), draw_window({"D": dims["D"]}, STEPS)
    gate = torch.rand(1, HEADS, STEPS, generator=torch.Generator().manual_seed(4))
    row = {"q": attention["q"], "k": attention["k"], "v": x["v"]}
    row |= {"phi_q": x["q"], "phi_k": x["k"], "i": x["i"], "f": x["f"], "gate": gate}
    return row | {name: x[name] for name in MLSTMState._fields}


def with_sink_logits(draw: Draw, dims: Mapping[str, int], tokens: int) -> Tensors:
    """Draw a logit of each head besides: about as large as those of the keys together."""
    logits = torch.randn(HEADS, generator=torch.Generator().manual_seed(5))
    return draw(dims, tokens) | {"sink_logits": logits + 4}


CASES: dict[str, tuple[Run, Draw, Mapping[str, Way]]] = {
    "mlstm": (run_mlstm, draw_mlstm, MLSTM_WAYS),
    "sliding_window_attention": (run_window, draw_window, WINDOW_WAYS),
    "mlstm_step": (run_mlstm_steps, draw_steps, ONE_WAY),
    "hybrid_step": (run_hybrid_steps, draw_hybrid_steps, ONE_WAY),
}


def case(operator: str) -> tuple[Run, Draw, Mapping[str, Way]]:
    """Find an operator's case; its name says what the softmax has besides (`dispatch.variant`)."""
    name, *extras = operator.split("+")
    run, draw, ways = CASES[name]
    if "softcap" in extras:
        run = functools.partial(run, softcap=SOFTCAP)
    if "sink_logits" in extras:
        draw = functools.partial(with_sink_logits, draw)
    return run, draw, ways


def timings(asked: Question, device: torch.device) -> dict[str, float]:
    """Return the median milliseconds of the case by backend, at more tokens than were checked."""
    run, draw, _ = case(asked.operator)
    dtype = getattr(torch, asked.dtype)
    inputs = {
        name: x.detach().to(device, x.dtype if name in WIDE else dtype)
        for name, x in draw(dict(asked.dims), TIMED_TOKENS).items()
    }
    found: dict[str, float] = {}
    backends: tuple[Backend, ...] = ("triton", "torch")
    for backend in backends:
        times = []
        for _ in range(REPEATS + 1):
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            run(inputs, backend, TIMED)
            torch.cuda.synchronize(device)
            times.append(1e3 * (time.perf_counter() - start))
        found[backend] = statistics.median(times[1:])  # the first may compile
    return found


def main(arguments: list[str] | None = None) -> None:
    """Print the verdict of each question as a line of JSON, until one breaks the device."""
    parser = argparse.ArgumentParser(
        prog="python -m xlstm_kernels.selfcheck", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--device", type=int, default=0, help="number of the CUDA device")
    parser.add_argument(
        "--questions", required=True, help="JSON: [[operator, dtype, [[letter, size], ...]], ...]"
    )
    options = parser.parse_args(arguments)
    device = torch.device("cuda", options.device)
    torch.zeros(1, device=device)  # a device that is full or taken says so before a question begins
    for operator, dtype, dims in json.loads(options.questions):
        asked = Question(operator, dtype, tuple((letter, size) for letter, size in dims))
        print(BEGUN, flush=True)
        print(json.dumps(check(asked, device)._asdict()), flush=True)
        # After an illegal access every kernel of this process fails: another one asks the rest.
        if device_is_broken(device):
            return


if __name__ == "__main__":
    main()
