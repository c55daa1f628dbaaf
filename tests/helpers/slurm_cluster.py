"""A Slurm cluster of two nodes on this machine: munged, slurmctld and two slurmd, on loopback.

Slurm comes from Debian's packages, which are installed where they are absent and root may do so. No
service of the system is used or changed: the daemons have a configuration, keys, ports and folders
of their own, and end by their process ids.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

PACKAGES = ("slurm-wlm", "munge", "slurmctld", "slurmd", "slurm-client")
DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "srun")
CONFIGURATION = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
AuthType=auth/munge
AuthInfo=socket={base}/munge.socket
CryptoType=crypto/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool-%n
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/slurmd-%n.pid
SlurmctldLogFile={base}/slurmctld.log
SlurmdLogFile={base}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
MaxArraySize=64
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
NodeName=n[0-1] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{node0}-{node1}] CPUs=2 RealMemory=1000
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 State=UP
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF State=UP
"""  # noqa: E501
START_SECONDS = 60.0


class NoSlurm(Exception):
    """Why there is no cluster here."""


class Cluster:
    """A running cluster; `environment` is what its commands need."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.environment = {"SLURM_CONF": str(base / "slurm.conf")}
        self.daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start all daemons and wait until both nodes are idle; raises NoSlurm."""
        install()
        for name in ("state", "spool-n0", "spool-n1"):
            (self.base / name).mkdir()
        controller, *nodes = free_ports()
        text = CONFIGURATION.format(
            base=self.base, controller=controller, node0=nodes[0], node1=nodes[1]
        )
        (self.base / "slurm.conf").write_text(text)
        key = self.base / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        own = [f"--{name}-file={self.base}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        socket_name = f"--socket={self.base}/munge.socket"
        self._run("munged", "--foreground", "--force", socket_name, *own)
        wait_until(lambda: (self.base / "munge.socket").exists(), "munged does not start")
        self._run("slurmctld", "-D", "-i")
        for node in ("n0", "n1"):
            self._run("slurmd", "-D", "-N", node)
        try:
            wait_until(self._is_idle, "the nodes are not idle")
        except TimeoutError as error:
            logs = "".join(path.read_text()[-2000:] for path in self.base.glob("*.log"))
            self.stop()
            raise NoSlurm(f"Slurm does not start: {error}\n{logs}") from None

    def _run(self, *words: str) -> None:
        with (self.base / "daemons.out").open("ab") as out:
            environment = {**os.environ, **self.environment}
            self.daemons.append(
                subprocess.Popen(words, stdout=out, stderr=out, env=environment, cwd="/")
            )

    def _is_idle(self) -> bool:
        found = self.call("sinfo", "--noheader", "-o", "%T", check=False).split()
        return bool(found) and set(found) == {"idle"}

    def call(self, *words: str, check: bool = True) -> str:
        """Run a command of Slurm's; returns what it prints."""
        environment = {**os.environ, **self.environment}
        done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
        if check and done.returncode != 0:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr}")
        return done.stdout

    def stop(self) -> None:
        """Cancel what is left and end the daemons, the first last."""
        self.call("scancel", "--user=root", check=False)
        deadline = time.monotonic() + 20
        while self.call("squeue", "--noheader", check=False) and time.monotonic() < deadline:
            time.sleep(0.2)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def install() -> None:
    """Install Slurm where it is absent; raises NoSlurm with the reason where that is impossible."""
    missing = [name for name in DAEMONS if shutil.which(name) is None]
    if os.geteuid() != 0:
        raise NoSlurm("needs root: Slurm's daemons start jobs as their users")
    if not missing:
        return
    if shutil.which("apt-get") is None:
        raise NoSlurm(f"needs Slurm ({', '.join(missing)}), and there is no apt-get")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    apt = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES]
    done = _quietly(apt, environment)
    if done.returncode != 0:  # its lists may be old, or not there
        _quietly(["apt-get", "update", "-qq"], environment)
        done = _quietly(apt, environment)
    if done.returncode != 0 or any(shutil.which(name) is None for name in DAEMONS):
        words = (done.stderr.strip().splitlines() or ["apt-get installs no daemons"])[-1]
        raise NoSlurm(f"needs Slurm, which cannot be installed here: {words}")


def _quietly(words: Sequence[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, capture_output=True, text=True, check=False, env=environment, timeout=300
    )


def free_ports() -> tuple[int, int, int]:
    """Three free ports, the second and third side by side, as a range in the configuration."""
    for first in range(23000 + os.getpid() % 2000 * 3, 32000, 3):
        ports = (first, first + 1, first + 2)
        if all(_is_free(port) for port in ports):
            return ports
    raise NoSlurm("no free ports")


def _is_free(port: int) -> bool:
    with socket.socket() as tried:
        try:
            tried.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def wait_until(
    holds: Callable[[], object], what: str, seconds: float = START_SECONDS, pause: float = 0.1
) -> None:
    """Wait until a condition holds; raises TimeoutError with `what` where it does not."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} after {seconds:.0f} s")
        time.sleep(pause)
