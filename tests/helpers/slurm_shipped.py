"""Run the quickstart's experts as jobs of a real Slurm and compare all weights with a local run's.

`python tests/helpers/slurm_shipped.py FOLDER` takes about 15 minutes of one core. It starts the
tests' cluster (root, Debian), submits recipes/quickstart.yaml as shipped, but for an evaluation of
two items, runs the same recipe on this machine with as many threads, and prints the SHA-256 of
every student. It ends with code 1 where one differs. `--against RUN` compares with a run that is
there. FOLDER keeps both runs, with scripts and logs; given again, the command goes on there.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from processes import ROOT, SETTINGS, process_environment
from slurm_cluster import Cluster

RECIPE = ROOT / "recipes" / "quickstart.yaml"
PROGRAM = [sys.executable, "-m", "xlstm_distill"]
PATHS = os.pathsep.join(str(ROOT / name) for name in ("distill", "kernels", "eval"))
# Models are made before: the weights do not depend on how many questions they are asked.
SHORT = ("evaluate.limit=2", "evaluate.experts=false", "evaluate.speed.seconds=0")
OVERRIDES = [word for value in SHORT for word in ("--set", value)]


def call(*words: str | Path) -> None:
    """Run `xlstm-distill WORDS` with the tests' threads; raises CalledProcessError."""
    subprocess.run(
        [*PROGRAM, *map(str, words)], check=True, env=process_environment(PYTHONPATH=PATHS)
    )


def run_as_jobs(cluster: Cluster, run: Path, extra: list[str]) -> None:
    """Submit all jobs, with more options of sbatch, and wait until the queue is empty."""
    values = {
        # A job takes all cores of a node.
        "defaults": {"partition": "low", "time": "120", "cpus": 2, "extra": extra},
        "program": PROGRAM,
        "environment": {**SETTINGS, "PYTHONPATH": PATHS},
    }
    site = run.parent / "site.yaml"
    site.write_text(yaml.safe_dump(values))
    call("slurm", RECIPE, "--run", run, "--site", site, "--submit", *OVERRIDES)
    wait_until_over(cluster)
    call("status", run)


def wait_until_over(cluster: Cluster) -> None:
    """Wait until the queue is empty; on a busy machine Slurm may not answer in time."""
    waiting = True
    while waiting:
        time.sleep(5)
        with contextlib.suppress(RuntimeError):
            waiting = bool(cluster.call("squeue", "--noheader"))


def weights(run: Path) -> dict[str, str]:
    """SHA-256 of the weights of every student of a run."""
    found = {}
    for path in sorted((run / "artifacts").glob("**/model.safetensors")):
        label = str(path.parents[1].relative_to(run / "artifacts"))
        found[label] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def main() -> int:
    """Print a line for each student; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--against", type=Path, help="a finished local run of the same recipe")
    parser.add_argument("--one", action="store_true", help="one job at a time, not two")
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        cluster = Cluster(Path(place))
        cluster.start()
        os.environ.update(cluster.environment)
        try:
            run_as_jobs(cluster, folder / "jobs", ["--nodelist=n0"] if options.one else [])
        finally:
            cluster.stop()
    if not options.against:
        call("run", RECIPE, "--run", folder / "local", *OVERRIDES)
    jobs, local = weights(folder / "jobs"), weights(options.against or folder / "local")
    for label, digest in jobs.items():
        same = "equal" if local.get(label) == digest else f"DIFFERS: {local.get(label)}"
        print(f"{label:14} {digest} {same}")
    experts = [f"distill/{name}" for name in ("math", "code", "stem", "chat")]
    complete = set(jobs) == {"align", "merge", *experts}
    return 0 if complete and all(local.get(label) == own for label, own in jobs.items()) else 1


if __name__ == "__main__":
    sys.exit(main())
