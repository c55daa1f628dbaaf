"""200 faults at the file operations of all stages: nothing is lost, and the result stays the same.

The table is printed with -s; `python tests/helpers/fault_report.py FILE` writes it to a page.
"""

from __future__ import annotations

import shutil
import sys

import pytest
from fault_lab import run_injections
from fault_plan import CORE, STAGES
from fault_report import table

pytestmark = [
    pytest.mark.slow,
    pytest.mark.multi_process,
    pytest.mark.skipif(
        sys.platform != "linux", reason="the faults come from an LD_PRELOAD library"
    ),
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler"),
]


# About 4 minutes of processor time. A machine with other work to do takes longer.
@pytest.mark.timeout(3600)
def test_after_a_fault_at_any_operation_nothing_is_lost_and_the_next_run_ends_the_same(tmp_path):
    outcomes, seconds = run_injections(tmp_path, count=200, seed=0)
    print(f"\n{table(outcomes)}\n{seconds:.0f} s of processor time")
    wrong = [f"{outcome.injection}: {outcome.wrong}" for outcome in outcomes if outcome.wrong]
    assert not wrong, "\n".join(wrong)
    assert all(outcome.same for outcome in outcomes)
    met = {(outcome.injection.stage, outcome.injection.fault) for outcome in outcomes}
    assert {(stage, fault) for stage in STAGES for fault in CORE} <= met
    # Faults that came too late for their process to meet them show nothing.
    assert sum(not outcome.reached for outcome in outcomes) <= 2
