"""Start processes in tests: every one with the same number of threads, and without the network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHIMS = ROOT / "tests" / "shims"
# Sums over several threads round in another order. Tests that compare weights bit by bit would
# then pass or fail by the machine's number of cores.
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}


def process_environment(*, shims: bool = False, **more: str) -> dict[str, str]:
    """Return the environment for a child process: this process's, SETTINGS, then `more`.

    With `shims`, the child also loads tests/shims, which lets FSDP2 and DeepSpeed run on CPUs.
    """
    environment = {**os.environ, **SETTINGS, **more}
    if shims:
        inherited = environment.get("PYTHONPATH", "")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SHIMS), inherited]))
    return environment


def run_python(
    *words: str | Path, cwd: Path | str = ROOT, shims: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments to its end; the caller checks the exit code."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        capture_output=True,
        text=True,
        env=process_environment(shims=shims),
        check=False,
        cwd=cwd,
    )
