"""The benchmark times what agrees with its reference, and says what it leaves out and why."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from xlstm_kernels.benchmarks import entries, operators, timing
from xlstm_kernels.benchmarks.checking import Checker
from xlstm_kernels.benchmarks.parts import UNFINISHED, WITH_FAILURES
from xlstm_kernels.benchmarks.report import BOTH, FORWARD, Row, ratio_to_ours, read_lines
from xlstm_kernels.state import held_positions

CPU = torch.device("cpu")

SMALL = [
    "--batch", "1", "--tokens", "40", "--heads", "2", "--groups", "1", "--key-dim", "8",
    "--window", "8", "--device", "cpu", "--repeats", "1",
]  # fmt: skip


def test_torch_backends_are_timed_and_the_rest_left_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert operators.main(SMALL) == 0
    rates, *lines = capsys.readouterr().out.splitlines()
    assert "TFLOP/s, copy" in rates
    timed = [line for line in lines if " ms " in line]
    assert len(timed) == 4 * 2 + 2  # mlstm, window, dense and causal, both ways; two steps
    assert all("of the roofline" in line for line in timed)
    left_out = [line for line in lines if " ms " not in line]
    assert len(left_out) == 17
    assert all("left out: " in line for line in left_out)


def test_packed_documents_are_checked_and_timed(capsys: pytest.CaptureFixture[str]) -> None:
    assert operators.main([*SMALL, "--document", "9", "--operators", "window", "causal"]) == 0
    lines = capsys.readouterr().out
    assert lines.count(" ms ") == 4
    causal = next(line for line in lines.splitlines() if line.startswith("causal"))
    assert "left out: takes no packed documents; use --document 0" in causal


@pytest.mark.parametrize("operator", ["mlstm", "mlstm step"])
def test_a_wrong_operator_is_not_timed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, operator: str
) -> None:
    wanted = (operator, "torch")
    entry = next(e for e in entries.ENTRIES if (e.operator, e.backend) == wanted)
    wrong = entry._replace(run=lambda a, shape: 1.001 * entry.run(a, shape))
    monkeypatch.setattr(operators, "ALL_ENTRIES", (wrong,))
    assert operators.main(SMALL) == WITH_FAILURES
    _, line = capsys.readouterr().out.splitlines()
    assert "wrong: RMS ratio 1.0e-03 to the reference; allowed: 1e-05" in line


WRONG_SETTINGS = [
    ("window", {"window": 99}),
    ("window", {"sinks": 0}),
    ("causal", {}),
    ("hybrid step", {"sinks": 0}),
]


@pytest.mark.parametrize(("operator", "wrong"), WRONG_SETTINGS)
def test_the_check_sees_beyond_window_and_sinks(operator: str, wrong: dict[str, int]) -> None:
    shape = entries.Shape(4, 100_000, 2, 1, 8, 8, 100, 4, 0)
    entry = next(
        e for e in entries.ENTRIES if e.operator == operator and not e.needs and not e.cuda_only
    )
    if operator == "causal":  # that is a window without end
        entry = entry._replace(operator="window", reference=entries.window_truth)
    changed = entry._replace(run=lambda a, s: entry.run(a, s._replace(**wrong)))
    checker = Checker(CPU, torch.float32)
    assert checker.worst_ratio(changed, shape) > 1e-2
    if wrong:
        assert checker.worst_ratio(entry, shape) < 1e-5


def test_documents_are_checked_where_rows_without_are_timed() -> None:
    entry = entries.ENTRIES[0]
    joined = entry._replace(run=lambda a, s: entry.run(a._replace(ids=None), s))
    shape = entries.Shape(1, 1000, 2, 1, 8, 8, 32, 4, 0)
    assert Checker(CPU, torch.float32).worst_ratio(joined, shape) > 1e-2


def test_report_has_table_data_and_plot(tmp_path: Path) -> None:
    arguments = [*SMALL, "--operators", "mlstm", "--tokens", "20", "40", "--report", str(tmp_path)]
    assert operators.main(arguments) == 0
    table = (tmp_path / "kernels.md").read_text()
    assert "| mlstm | torch | forward + backward | 1 | 2 | 40 |" in table
    assert "Not timed:" in table
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    rows = [row for row in rows if row["status"] == "timed" and row["backend"] == "torch"]
    assert all(0 < row["error"] < 1e-5 for row in rows)
    assert {(row["tokens"], row["passes"]) for row in rows} == {
        (tokens, passes) for tokens in (20, 40) for passes in ("forward", "forward + backward")
    }
    drawing = ElementTree.parse(tmp_path / "kernels.svg").getroot()
    assert any(element.tag.endswith("polyline") for element in drawing)


def test_ratios_are_to_our_fastest_named_kernel() -> None:
    def row(operator: str, backend: str, taken: float) -> Row:
        return Row(operator, backend, "forward", 64, taken, 1.0, 1.0, 0.5)

    rows = [row("window", "torch", 8.0), row("window", "triton", 2.0), row("causal", "sdpa", 10.0)]
    assert [ratio_to_ours(r, rows) for r in rows] == [4.0, 1.0, 5.0]
    assert ratio_to_ours(row("mlstm", "fla simple_gla", 1.0), rows) is None


def test_counted_work_of_the_mlstm_is_linear_in_tokens() -> None:
    shape = entries.Shape(1, 4096, 8, 2, 128, 128, 512, 4, 0)
    entry = entries.ENTRIES[0]
    one, two = (entries.work(entry, shape._replace(tokens=n), 2, True) for n in (4096, 8192))
    assert two == (2 * one[0], 2 * one[1])
    assert one[0] == 3.5 * 4096 * 8 * (4 * 128 * 128 + 64 * 256)


def test_full_ring_is_what_decoding_would_have_left() -> None:
    shape = entries.Shape(1, 16, 2, 1, 8, 8, 5, 2, 0)
    ring = entries.full_ring(shape, torch.device("cpu"), torch.float32)
    assert ring.keys.shape == (1, 1, 7, 8)
    assert ring.lengths.tolist() == [7]
    assert held_positions(ring.lengths, 5, 2)[0].tolist() == [0, 1, 5, 6, 2, 3, 4]


def entry_named(operator: str, backend: str) -> entries.Entry:
    wanted = (operator, backend)
    return next(e for e in entries.ENTRIES if (e.operator, e.backend) == wanted)


def test_an_entry_that_raises_is_a_row_and_the_rest_is_timed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(a: entries.Inputs, shape: entries.Shape) -> torch.Tensor:
        raise RuntimeError("Triton 3.6.0 is refused on Hopper\nand more")

    entry = entry_named("mlstm step", "torch")
    broken = entry._replace(backend="broken", run=refuse)
    monkeypatch.setattr(operators, "ALL_ENTRIES", (broken, entry))
    assert operators.main([*SMALL, "--report", str(tmp_path)]) == WITH_FAILURES
    _, first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("failed: RuntimeError: Triton 3.6.0 is refused on Hopper")
    assert " ms " in second
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["status"] for row in rows] == ["failed", "timed"]


class RefusesBackward(torch.autograd.Function):
    """The identity, whose backward pass raises, as fla's does on some versions of Triton."""

    @staticmethod
    def forward(ctx: object, h: torch.Tensor) -> torch.Tensor:
        return h.clone()

    @staticmethod
    def backward(ctx: object, dh: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("Triton 3.6.0 is refused on Hopper")


class WrongBackward(RefusesBackward):
    """The identity with a gradient that is off by 1 %."""

    @staticmethod
    def backward(ctx: object, dh: torch.Tensor) -> torch.Tensor:
        return 1.01 * dh


def through(function: type[torch.autograd.Function], native: bool = False) -> entries.Entry:
    """Our mLSTM through a function, as a peer; native: as one that nothing is compared with."""
    entry = entry_named("mlstm", "torch")

    def run(a: entries.Inputs, shape: entries.Shape) -> torch.Tensor:
        return function.apply(entry.run(a, shape))  # type: ignore[no-any-return,misc]

    def prepare(a: entries.Inputs, shape: entries.Shape) -> entries.Prepared:
        return [a.x[name] for name in entries.GATED], lambda: run(a, shape)

    changed = entry._replace(backend=f"peer {function.__name__}", run=run)
    return changed._replace(run=None, reference=None, prepare=prepare) if native else changed


@pytest.mark.parametrize(
    ("entry", "status", "reason"),
    [
        (through(RefusesBackward), "failed", "RuntimeError: Triton 3.6.0 is refused on Hopper"),
        (through(RefusesBackward, True), "failed", "RuntimeError: Triton 3.6.0 is refused"),
        (through(WrongBackward), "wrong", "RMS ratio 1.0e-02 to the reference; allowed: 1e-05"),
    ],
)
def test_a_backward_pass_that_fails_leaves_the_time_forward(
    entry: entries.Entry, status: str, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(operators, "ALL_ENTRIES", (entry,))
    assert operators.main([*SMALL, "--report", str(tmp_path)]) == WITH_FAILURES
    rows = [Row(**row) for row in json.loads((tmp_path / "kernels.json").read_text())["rows"]]
    assert [(row.passes, row.status) for row in rows] == [(FORWARD, "timed"), (BOTH, status)]
    assert rows[0].milliseconds > 0
    assert rows[1].reason.startswith(reason)


def test_what_failed_is_tried_again_after_the_new_and_what_is_timed_stays(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    refusing, step = through(RefusesBackward), entry_named("mlstm step", "torch")
    absent = refusing._replace(backend="absent", needs="no_such_package")
    monkeypatch.setattr(operators, "ALL_ENTRIES", (refusing, absent))
    arguments = [*SMALL, "--report", str(tmp_path)]
    assert operators.main(arguments) == WITH_FAILURES
    # A program that broke the device's context and starts itself anew does not try it again.
    capsys.readouterr()
    assert operators.main([*arguments, "--since", "0"]) == WITH_FAILURES
    assert len(capsys.readouterr().out.splitlines()) == 1
    mended = entry_named("mlstm", "torch")._replace(backend=refusing.backend)
    brought = mended._replace(backend="absent")
    monkeypatch.setattr(operators, "ALL_ENTRIES", (mended, brought, step))
    assert operators.main(arguments) == 0
    rows = [Row(**row) for row in json.loads((tmp_path / "kernels.json").read_text())["rows"]]
    assert [(row.backend, row.passes) for row in rows] == [
        (refusing.backend, FORWARD), ("torch", FORWARD), (refusing.backend, BOTH),
        ("absent", FORWARD), ("absent", BOTH),
    ]  # fmt: skip
    assert {row.status for row in rows} == {"timed"}
    assert operators.main(arguments) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + 4 + 1  # and nothing at the last


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("0.5.1", "flash-linear-attention 0.5.1 is too old; bring 0.5.2 or newer"),
        ("0.5.2", "needs a CUDA device"),
        ("0.10.0", "needs a CUDA device"),
        (None, "the version of fla is not known; install flash-linear-attention 0.5.2 or newer"),
    ],
)
def test_a_peer_that_is_too_old_is_left_out(
    version: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fla").mkdir()
    (tmp_path / "fla" / "__init__.py").touch()
    if version:
        metadata = tmp_path / f"flash_linear_attention-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Name: flash-linear-attention\nVersion: {version}\n")
    # Alone: an installed one would be found too.
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    shape = entries.Shape(1, 40, 4, 2, 8, 8, 8, 4, 0)
    inputs = entries.draw(shape, CPU, torch.float32)
    for name in ("fla simple_gla", "fla simple_gla native"):
        entry = next(e for e in operators.ALL_ENTRIES if e.backend == name)
        assert (entry.skipped(shape, inputs) or "").startswith(said)


def test_a_benchmark_that_is_started_again_goes_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    entry, calls = entry_named("mlstm step", "torch"), []
    assert entry.run is not None

    def counted(a: entries.Inputs, shape: entries.Shape) -> torch.Tensor:
        calls.append(shape.tokens)
        return entry.run(a, shape)  # type: ignore[misc]

    monkeypatch.setattr(operators, "ALL_ENTRIES", (entry._replace(run=counted),))
    arguments = [*SMALL, "--report", str(tmp_path), "--tokens"]
    operators.main([*arguments, "20"])
    calls.clear()
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"operator": "mlstm st')  # killed in the middle of a line
    operators.main([*arguments, "20", "30"])
    assert set(calls) == {30}
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert [row["tokens"] for row in rows] == [20, 30]


def test_lines_are_read_again_without_the_one_that_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lines.jsonl"
    assert read_lines(path) == []
    whole = '{"a": 1}\n{"a": 2}\n'
    for broken in ("", '{"a": 3', '{"a": 3}', '{"a"{"a": 4}\n'):
        path.write_text(whole + broken)
        assert read_lines(path) == [{"a": 1}, {"a": 2}]
        assert path.read_text() == whole
    # Whole, it is not written: who is stopped in between would lose it.
    path.chmod(0o444)
    before = path.stat()
    read_lines(path)
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    assert [each.name for each in path.parent.iterdir()] == ["lines.jsonl"]


def test_a_budget_stops_an_entry_that_never_ends_and_keeps_the_rows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def hang(a: entries.Inputs, shape: entries.Shape) -> torch.Tensor:
        while True:
            time.sleep(0.01)

    entry = entry_named("mlstm step", "torch")
    endless = entry._replace(backend="endless", run=hang)
    monkeypatch.setattr(operators, "ALL_ENTRIES", (entry, endless))
    arguments = [*SMALL, "--report", str(tmp_path), "--budget-s"]
    assert operators.main([*arguments, "2"]) == UNFINISHED
    *_, row, last = capsys.readouterr().out.splitlines()
    assert "endless" in row
    assert "stopped: the budget ended after" in row
    assert last.startswith("Stopped: the time of --budget-s")
    assert "| mlstm step | torch | forward | 1 | 2 | 40 |" in (tmp_path / "kernels.md").read_text()
    # Started again, it goes on with what it has not tried, and not with what stopped it.
    monkeypatch.setattr(operators, "ALL_ENTRIES", (endless, entry._replace(backend="next")))
    assert operators.main([*arguments, "2"]) == UNFINISHED
    assert "| mlstm step | next | forward | 1 | 2 | 40 |" in (tmp_path / "kernels.md").read_text()
    monkeypatch.setattr(operators, "ALL_ENTRIES", (entry._replace(backend="endless"),))
    assert operators.main([*arguments, "60"]) == 0
    assert "stopped" not in (tmp_path / "kernels.md").read_text()


def test_a_reference_runs_once_for_all_backends_and_at_few_heads() -> None:
    entry, shapes = entry_named("mlstm", "torch"), []
    assert entry.reference is not None

    def counted(a: entries.Inputs, shape: entries.Shape) -> torch.Tensor:
        shapes.append(shape)
        return entry.reference(a, shape)  # type: ignore[misc]

    checker, large = Checker(CPU, torch.float32), entries.Shape(4, 40, 128, 32, 8, 8, 8, 4, 0)
    for backend in ("one", "other"):
        named = entry._replace(backend=backend, reference=counted)
        checker.worst_ratio(named, large)
        checker.worst_ratio(named, large._replace(batch=1))
    assert len(shapes) == 2  # one document, and packed documents
    assert {(shape.batch, shape.heads, shape.groups) for shape in shapes} == {(1, 8, 2)}


def test_a_nan_is_wrong() -> None:
    entry = entry_named("mlstm step", "torch")
    nan = entry._replace(run=lambda a, s: entry.run(a, s).fill_(float("nan")))  # type: ignore[misc]
    shape = entries.Shape(1, 1, 2, 1, 8, 8, 8, 4, 0)
    assert not Checker(CPU, torch.float32).worst_ratio(nan, shape) < 1.0


def test_decoding_is_timed_over_more_states_than_the_cache_holds() -> None:
    shape = entries.Shape(1, 1, 2, 1, 8, 8, 8, 4, 0)
    inputs = entries.draw(shape, CPU, torch.float32)
    copies = timing.rotated(inputs, cache=2**14)
    held = sum(x.nbytes for copy in copies for x in (*copy.state, *copy.ring))
    assert held >= timing.ROTATED_CACHES * 2**14
    assert len({copy.state.C.data_ptr() for copy in copies}) == len(copies)
    assert len(timing.rotated(inputs, cache=0)) == 1


def test_heads_keep_how_many_share_a_value_head() -> None:
    options = operators.parse(["--heads", "32", "128", "--groups", "8", "--batch", "1"])
    shapes = list(operators.shapes_of(options))
    assert [(shape.heads, shape.groups) for shape in shapes] == [(32, 8), (128, 32)]


def test_peers_are_timed_natively_too() -> None:
    shape = entries.Shape(1, 40, 4, 2, 8, 8, 8, 4, 0)
    inputs = entries.draw(shape, CPU, torch.float32)
    for entry in operators.NATIVE:
        assert entry.skipped(shape, inputs)
        assert entry.run is None
