"""`--launch CONFIG`: start a command in several processes, through accelerate launch.

The launcher runs inside this process. By itself it kills its processes 30 s after a SIGTERM, and
dies of a SIGUSR1 without telling them. Here they get either signal, and the time they need to write
a checkpoint. They get every Ctrl-C too: the first asks for a checkpoint, the second ends them now.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xlstm_distill.errors import UserError
from xlstm_distill.runtime.launcher import adopt_slurm, asked_layout
from xlstm_distill.runtime.signals import EXIT_CODE, INTERRUPTED, SIGNALS
from xlstm_distill.runtime.watch import LAUNCHER

if TYPE_CHECKING:
    from xlstm_distill.recipe import Recipe

OPTIONS = ("--launch", "--launch-args")
"""Options that the launched processes must not get: they would launch others."""
MODULE = "xlstm_distill"
POLL_SECONDS = 0.1
"""Time between two looks at the processes and at the signals received (seconds)."""
INTERRUPT_SECONDS = 5.0
"""Time for the processes to end after a second Ctrl-C; one may wait for another that is gone."""

LaunchConfig = Annotated[
    Path | None,
    typer.Option(
        "--launch",
        metavar="CONFIG",
        help="Start in several processes, through accelerate launch with this configuration "
        "(recipes/accelerate/).",
        show_default="in this process",
    ),
]
LaunchArgs = Annotated[
    str,
    typer.Option(
        "--launch-args",
        metavar="WORDS",
        help="More options of accelerate launch, in one string: '--num_processes 4'.",
        show_default="none",
    ),
]


def dispatch(
    config: Path | None,
    extra: str,
    recipe: Path,
    overrides: Sequence[str] | None,
    check: Callable[[Recipe, int], None],
) -> None:
    """Run this command line in the processes that a configuration names, and exit as they do.

    Without a configuration, this process takes the rank that srun or a launcher has given it.
    `check` gets the recipe and the number of processes before any process starts.

    Raises:
        UserError: the recipe, the configuration or the launcher's request cannot be used.
    """
    if config is None:
        if extra:
            raise UserError(f"--launch-args: {extra!r} has no effect without --launch; give both.")
        # Before `asked_layout`, which reads what this sets.
        adopt_slurm()
        asked_layout()
        return
    from xlstm_distill.recipe import load_recipe

    # Here, so that a bad recipe is reported once and not by every process.
    loaded = load_recipe(recipe, overrides or ())
    arguments = own_arguments(sys.argv[1:])
    # accelerate takes seconds to load. Until then this line shows that something runs.
    typer.echo(f"{loaded.name}: starting processes through accelerate launch ({config})")
    raise typer.Exit(start(config, extra, arguments, lambda count: check(loaded, count)))


def own_arguments(arguments: Sequence[str]) -> list[str]:
    """Return a command line's arguments without the launcher's options."""
    with_value = tuple(f"{option}=" for option in OPTIONS)
    kept: list[str] = []
    rest = iter(arguments)
    for word in rest:
        if word in OPTIONS:
            next(rest, None)  # its value
        elif not word.startswith(with_value):
            kept.append(word)
    return kept


def start(
    config: Path,
    extra: str,
    arguments: Sequence[str],
    check: Callable[[int], None] = lambda processes: None,
) -> int:
    """Run `xlstm-distill ARGUMENTS` in the processes that an accelerate configuration names.

    `extra` holds more arguments of accelerate launch, as a shell would read them. `check` gets the
    number of processes before they start. SIGTERM, SIGUSR1 and Ctrl-C are passed on to them.
    Returns their exit code: `signals.EXIT_CODE` or `signals.INTERRUPTED` if a signal ended them.

    Raises:
        UserError: the configuration or the arguments are not accelerate's.
    """
    try:
        words = shlex.split(extra)
    except ValueError as error:
        raise UserError(
            f"--launch-args: {extra!r} cannot be read as words of a shell: {error}; correct it."
        ) from None
    launcher = parse_launcher(config, [*words, "-m", MODULE, *arguments])
    check(launcher.num_processes)
    # They end when this process is gone, also when it dies before they can ask who started them.
    os.environ[LAUNCHER] = str(os.getpid())
    # The launcher logs every process that failed. Each has printed its own error already.
    logging.disable(logging.ERROR)
    ended = LauncherResult()
    received: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        received.append(number)

    handled = list(SIGNALS)
    # Do not ignore SIGINT here: the processes would inherit that, and never hear of a Ctrl-C. A
    # background job, which the shell starts with SIGINT ignored, goes on ignoring it.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        handled.append(signal.SIGINT)
    # From here on signals are only noted. The loop below passes them on.
    before = {number: signal.signal(number, note) for number in handled}
    try:
        # Not in the main thread, so that the launcher leaves the signal handlers alone.
        thread = threading.Thread(target=ended.run, args=(launcher,), daemon=True)
        thread.start()
        supervisor = _Supervisor(received)
        while thread.is_alive():
            thread.join(POLL_SECONDS)
            supervisor.pass_on()
    finally:
        # A caller of `start` gets its own handlers back.
        for number, handler in before.items():
            signal.signal(number, handler)
        del os.environ[LAUNCHER]
    return ended.exit_code(
        asked=any(number in SIGNALS for number in received),
        interrupts=received.count(signal.SIGINT),
    )


def parse_launcher(config: Path, words: list[str]) -> Any:
    """Parse the arguments of accelerate launch and complete them from its configuration.

    Raises:
        UserError: a word is not accelerate's, or the number of processes is not usable.
    """
    settings = _read_config(config)
    parsed = _parse_words(["--config_file", str(config), *words])
    if not parsed.module or parsed.training_script != MODULE:
        raise UserError(
            f"--launch-args: {parsed.training_script!r} is no option of accelerate launch, and no "
            "value of one; 'accelerate launch --help' lists them."
        )
    field = "--launch-args: --num_processes"
    if parsed.num_processes is None:
        parsed.num_processes = settings.num_processes
        field = f"--launch: {str(config)!r}: num_processes"
    if not isinstance(parsed.num_processes, int) or parsed.num_processes < 1:
        raise UserError(
            f"{field}: {parsed.num_processes!r} must be a whole number from 1 on; give another."
        )
    # The launched processes read it from their environment.
    if settings.use_cpu:
        # accelerate itself does not pass use_cpu on with MULTI_GPU.
        os.environ["ACCELERATE_USE_CPU"] = "true"
    alone = (parsed.num_machines or settings.num_machines or 1) == 1
    if alone and parsed.main_process_port is None and settings.main_process_port is None:
        # 0 means any free port. accelerate's fixed one would keep two runs from sharing a machine.
        parsed.main_process_port = 0
    return parsed


def _read_config(config: Path) -> Any:
    """Read a configuration as accelerate launch does."""
    import yaml
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

    if not config.is_file():
        raise UserError(
            f"--launch: {str(config)!r} does not exist; recipes/accelerate/ holds configurations, "
            "and 'xlstm-distill recipes copy' writes them beside a recipe."
        )
    wrong = f"--launch: {str(config)!r} is not a configuration of accelerate launch"
    try:
        settings = load_config_from_file(str(config))
    except (ValueError, TypeError, AttributeError, KeyError, yaml.YAMLError) as error:
        raise UserError(f"{wrong}: {error}") from None
    if not isinstance(settings, ClusterConfig):
        raise UserError(f"{wrong} on this machine: its compute_environment must be LOCAL_MACHINE.")
    return settings


def _parse_words(words: list[str]) -> Any:
    """Parse a command line of accelerate launch.

    Its parser prints and exits when it cannot; here both become a UserError.
    """
    from accelerate.commands.launch import launch_command_parser

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(io.StringIO()):
            return launch_command_parser().parse_args(words)
    except SystemExit:
        lines = complaint.getvalue().strip().splitlines()
        # --help prints to stdout and exits as well.
        reason = lines[-1] if lines else "it asks for help; 'accelerate launch --help' gives it."
        raise UserError(f"--launch-args: {reason.split('error: ')[-1]}") from None


class LauncherResult:
    """How the launcher ended; the thread that it runs in fills it."""

    def __init__(self) -> None:
        self.codes: list[int] = []
        self.error: Exception | None = None

    def run(self, launcher: Any) -> None:
        """Run the launcher to its end; keep exit codes in the order in which processes failed."""
        from accelerate.commands.launch import launch_command
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

        try:
            launch_command(launcher)
        except ChildFailedError as failed:
            # The first to fail is the cause. The launcher ends the others because of it.
            ordered = sorted(failed.failures.values(), key=lambda failure: failure.timestamp)
            self.codes = [failure.exitcode for failure in ordered]
        except subprocess.CalledProcessError as failed:
            # A process that accelerate starts alone does not go through torch's launcher.
            self.codes = [failed.returncode]
        except Exception as error:
            # An exception would end this thread alone. `exit_code` raises it in the main thread.
            self.error = error

    def exit_code(self, *, asked: bool, interrupts: int = 0) -> int:
        """Return the code of the first process that failed, or that of a stop.

        `asked` says that SIGTERM or SIGUSR1 came, `interrupts` how often Ctrl-C. A process that had
        no handler yet when the signal came died of it (a negative code) and had nothing to save.

        Raises:
            UserError: the launcher itself failed.
        """
        if self.error is not None:
            reason = str(self.error) or type(self.error).__name__
            raise UserError(f"--launch: accelerate launch failed: {reason}") from self.error
        stopped = {EXIT_CODE, *(-number for number in SIGNALS)}
        # One process that stopped in order is enough: others may have been ended by the launcher.
        if asked and stopped & set(self.codes):
            return EXIT_CODE
        died = self.codes if interrupts > 1 else {INTERRUPTED, -signal.SIGINT} & set(self.codes)
        if interrupts and died:
            return INTERRUPTED
        first = self.codes[0] if self.codes else 0
        # Python gives -9 for a process killed by signal 9; shells give 137.
        return first if first >= 0 else 128 - first


class _Supervisor:
    """Sends the launched processes the signals received here, also to those that start later."""

    def __init__(self, received: list[int]) -> None:
        self.received = received
        self.told: Counter[tuple[int, int]] = Counter()  # times by process and signal
        self.end: float | None = None

    def pass_on(self) -> None:
        """Send each process the signals that it lacks; kill it if it outlives a second Ctrl-C."""
        import psutil

        if self.end is None and self.received.count(signal.SIGINT) > 1:
            self.end = time.monotonic() + INTERRUPT_SECONDS
        # Asked anew at each look: processes start one after another, and may start after the
        # signal.
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                # Only the launched processes: this one may have other children.
                if MODULE not in child.cmdline():
                    continue
                if self.end is not None and time.monotonic() > self.end:
                    child.kill()
                for number in self._missing(child.pid):
                    child.send_signal(number)

    def _missing(self, process: int) -> list[int]:
        """Return the signals to send to a process now.

        SIGTERM and SIGUSR1 are sent once, Ctrl-C as often as it came. At most one of each is sent
        at a time: the system merges equal signals that are pending.
        """
        wanted = {number: 1 for number in self.received if number in SIGNALS}
        # torch starts its processes in sessions of their own, which a terminal's Ctrl-C does not
        # reach. A process that accelerate starts alone is in ours: sent again, it counts twice.
        if os.getpgid(process) != os.getpgrp():
            wanted[signal.SIGINT] = self.received.count(signal.SIGINT)
        missing = [n for n, times in wanted.items() if self.told[process, n] < times]
        self.told.update((process, n) for n in missing)
        return missing
