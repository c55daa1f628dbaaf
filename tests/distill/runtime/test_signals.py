"""Signals: deferred in a training, else they end the command at once."""

from __future__ import annotations

import signal

import pytest
import typer

from xlstm_distill.cli.failures import one_line_errors
from xlstm_distill.runtime import signals

HANDLED = (*signals.SIGNALS, signal.SIGINT)


@pytest.fixture(autouse=True)
def _listening():
    """Handle signals as the command line does, and give pytest its own handlers back."""
    before = {number: signal.getsignal(number) for number in HANDLED}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signals.listen()
    yield
    signals.listen()  # with nothing pending
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_outside_of_a_training_a_signal_ends_the_command_at_once(number):
    expected = f"stopped by {number.name}; run the same command again to go on"
    with pytest.raises(signals.Stopped, match=expected) as caught:
        signal.raise_signal(number)
    assert caught.value.exit_code == 75
    assert not caught.value.agreed


def test_a_second_signal_does_not_disturb_what_the_first_one_ends():
    cleaned = []
    with pytest.raises(signals.Stopped):
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            # Slurm signals every process of a job, and the batch script does too.
            signal.raise_signal(signal.SIGTERM)
            cleaned.append(True)
    assert cleaned


def test_outside_of_a_training_ctrl_c_ends_the_command_at_once():
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_training_sees_the_signal_and_ends_by_itself(capfd):
    with pytest.raises(signals.Stopped) as caught, signals.deferred():
        assert signals.pending() is None
        signal.raise_signal(signal.SIGINT)
        assert signals.pending() is signal.SIGINT
        raise signals.stopped("after step 8", "to go on at step 9", interrupted=True)
    assert str(caught.value) == (
        "stopped by Ctrl-C after step 8; run the same command again to go on at step 9."
    )
    assert caught.value.exit_code == signals.INTERRUPTED == 130
    assert caught.value.agreed
    assert capfd.readouterr().err.strip() == (
        "Ctrl-C: the training ends after this step. Press it again to end at once."
    )


def test_a_second_ctrl_c_ends_a_training_at_once():
    with pytest.raises(KeyboardInterrupt), signals.deferred():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second one did nothing")


def test_one_rank_speaks_to_the_terminal(capfd, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(KeyboardInterrupt), signals.deferred():
        signal.raise_signal(signal.SIGINT)
        raise KeyboardInterrupt
    assert capfd.readouterr().err == ""


def test_a_scheduler_s_signal_outweighs_ctrl_c():
    with pytest.raises(signals.Stopped), signals.deferred():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert signals.pending() is signal.SIGTERM
        raise signals.stopped("here", "to go on", interrupted=False)


def test_a_rank_that_got_no_signal_says_so():
    with pytest.raises(signals.Stopped, match="stopped by a signal to another process here"):
        raise signals.stopped("here", "to go on", interrupted=False)


def test_a_rank_that_is_ending_keeps_its_exit_code():
    """A launcher sends SIGTERM to the ranks that are still ending when the first one has ended."""
    stopped = signals.stopped("here", "to go on", interrupted=True)
    signal.raise_signal(signal.SIGTERM)
    assert stopped.exit_code == 130


def test_a_rank_that_has_failed_ends_without_a_traceback():
    """The signal may come while Python runs what libraries have left for the exit."""
    with pytest.raises(typer.Exit), one_line_errors(debug=False):
        raise ValueError("wrong")
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(("number", "name"), [(10, "SIGUSR1"), (2, "Ctrl-C")])
def test_a_signal_that_comes_after_the_last_look_is_heard(number, name):
    expected = f"stopped by {name} after the last step"
    with pytest.raises(signals.Stopped, match=expected), signals.deferred():
        signal.raise_signal(number)
    signals.listen()
    with pytest.raises(ValueError, match="own"), signals.deferred():  # another end goes first
        signal.raise_signal(number)
        raise ValueError("own")


def test_a_background_job_goes_on_ignoring_ctrl_c():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signals.listen()
    signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
