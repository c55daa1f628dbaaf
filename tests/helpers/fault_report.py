"""Run the injections of test_faults.py and write a page with their table.

`python tests/helpers/fault_report.py FILE [--count N] [--seed N]`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fault_lab import LOOKS, Outcome, run_injections
from fault_plan import AFTERWARDS, FAULTS, STAGES

from xlstm_distill.runtime.arithmetic import arithmetic

PAGE = """# Faults at every write

A fault met every stage at an operation on its files: opening for writing, write, truncate, fsync,
rename, mkdir, unlink, rmdir, link. Then the same command ran again. Every publishing step (the
manifest, the rename, the flush after it) met ENOSPC, EIO and SIGKILL. All other places and faults
were drawn at random (seed {seed}).

```
python tests/helpers/fault_report.py FILE --seed {seed} --count {count}
```

`make test-all` runs the same injections (`tests/e2e/test_faults.py`).

- **whole**: after the fault all artifacts of the stage were there and equal to those of an
  undisturbed run.
- **absent**: at least one was not there yet. Each that was there was whole.
- **same**: after the next run all artifacts are equal, byte by byte, to those of an undisturbed
  run, and nothing else is left over. The weights are among them. The report, which shows times,
  counts by its fingerprint and the names of its files.

Artifacts of earlier stages must stay as they were. So must an earlier artifact of the stage itself,
in its place or kept beside it: in {remade} of the injections one of other settings was there.
`status` and `verify` must work on what is left. A full disk, and any other error, must be one plain
line and exit code 1.

The next run went on in the same place {same} times, with the clock set back a day {clock} times,
after the run directory was moved {moved} times, and after the teacher was moved {teacher} times.

| fault | what happens at the operation |
|---|---|
| ENOSPC, EDQUOT | it fails, a write after its first half; all that needs space fails from then on |
| EIO, ESTALE | it fails, once |
| SIGKILL | the process is killed before it |
| SIGKILL in a write | the process is killed when half of the write is written |
| clock set back | from then on the clock is a day back, so that files lie in the future |
| watched | the process stops; `{looks}` and a second run of a training are tried; it goes on |

{wrong} of {count} injections ended otherwise. {seconds:.0f} s of processor time ({facts}).

{table}
"""


def table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes by stage and fault: injections, whole, absent, same content after the next."""
    counts: Counter[tuple[str, str, str]] = Counter()
    for outcome in outcomes:
        key = outcome.injection.stage, outcome.injection.fault
        counts[*key, "all"] += 1
        counts[*key, outcome.state] += 1
        counts[*key, "same"] += outcome.same
    lines = ["| stage | fault | injections | whole | absent | same after the next run |"]
    lines.append("|---|---|---|---|---|---|")
    for stage in STAGES:
        for fault in FAULTS:
            found = [counts[stage, fault, name] for name in ("all", "whole", "absent", "same")]
            if found[0]:
                lines.append(f"| {stage} | {fault} | " + " | ".join(map(str, found)) + " |")
    totals = [len(outcomes), *(sum(o.state == s for o in outcomes) for s in ("whole", "absent"))]
    totals.append(sum(outcome.same for outcome in outcomes))
    lines.append("| all | | " + " | ".join(map(str, totals)) + " |")
    return "\n".join(lines)


def page(outcomes: Sequence[Outcome], seconds: float, seed: int) -> str:
    """Describe the injections, and what they were run on."""
    afterwards = Counter(outcome.injection.afterwards for outcome in outcomes)
    return PAGE.format(
        count=len(outcomes),
        seed=seed,
        seconds=seconds,
        remade=sum(outcome.injection.remade for outcome in outcomes),
        wrong=sum(bool(outcome.wrong) for outcome in outcomes),
        facts=", ".join(f"{name} {value}" for name, value in arithmetic().items()),
        table=table(outcomes),
        looks="`, `".join(LOOKS),
        **{name: afterwards[name] for name in AFTERWARDS},
    )


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("file", type=Path)
    options.add_argument("--count", type=int, default=200)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        outcomes, seconds = run_injections(Path(name), given.count, given.seed)
    given.file.write_text(page(outcomes, seconds, given.seed))
    print(table(outcomes))
    sys.exit(any(outcome.wrong for outcome in outcomes))
