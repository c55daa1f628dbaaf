"""The benchmark times what agrees with its reference, and says what it leaves out and why."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from xlstm_kernels.benchmarks import entries, operators
from xlstm_kernels.benchmarks.report import Row, ratio_to_ours

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
    assert len(left_out) == 9
    assert all("left out: " in line for line in left_out)


def test_packed_documents_are_checked_and_timed(capsys: pytest.CaptureFixture[str]) -> None:
    assert operators.main([*SMALL, "--document", "9", "--operators", "window", "causal"]) == 0
    lines = capsys.readouterr().out
    assert lines.count(" ms ") == 4
    assert (
        "causal       sdpa                       T=40      left out: takes no packed documents"
        in lines
    )


@pytest.mark.parametrize("operator", ["mlstm", "mlstm step"])
def test_a_wrong_operator_is_not_timed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, operator: str
) -> None:
    wanted = (operator, "torch")
    entry = next(e for e in entries.ENTRIES if (e.operator, e.backend) == wanted)
    wrong = entry._replace(run=lambda a, shape: 1.001 * entry.run(a, shape))
    monkeypatch.setattr(operators, "ENTRIES", (wrong,))
    assert operators.main(SMALL) == 1
    _, line = capsys.readouterr().out.splitlines()
    assert "not timed: RMS ratio 1.0e-03 to the reference; allowed: 1e-05" in line


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
    assert operators.worst_ratio(changed, shape, torch.device("cpu"), torch.float32) > 1e-2
    if wrong:
        assert operators.worst_ratio(entry, shape, torch.device("cpu"), torch.float32) < 1e-5


def test_documents_are_checked_where_rows_without_are_timed() -> None:
    entry = entries.ENTRIES[0]
    joined = entry._replace(run=lambda a, s: entry.run(a._replace(ids=None), s))
    shape = entries.Shape(1, 1000, 2, 1, 8, 8, 32, 4, 0)
    assert operators.worst_ratio(joined, shape, torch.device("cpu"), torch.float32) > 1e-2


def test_report_has_table_data_and_plot(tmp_path: Path) -> None:
    arguments = [*SMALL, "--operators", "mlstm", "--tokens", "20", "40", "--report", str(tmp_path)]
    assert operators.main(arguments) == 0
    table = (tmp_path / "kernels.md").read_text()
    assert "| mlstm | torch | forward + backward | 40 |" in table
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
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
    assert ring.positions[0].tolist() == [0, 1, 5, 6, 2, 3, 4]
    assert ring.lengths.tolist() == [7]
