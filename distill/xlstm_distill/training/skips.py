"""Steps that train nothing: skip a few of them, and stop where there are too many."""

from __future__ import annotations

from collections.abc import Callable

from xlstm_distill.errors import RunError

MOST_SKIPS = 10
"""Steps in a row that may be skipped, for either reason; then the training stops."""


class Skips:
    """Counts skipped steps in a row and says each one through `say`.

    `tolerant` is the recipe's `non_finite: skip`. `steps` is the length of the training.
    """

    def __init__(self, say: Callable[[str], None], *, tolerant: bool, steps: int) -> None:
        self.say, self.tolerant, self.steps = say, tolerant, steps
        self.mute = self.not_finite = 0

    def no_supervised_token(self, where: str, rows: str) -> None:
        """Skip a step whose rows have nothing to train on.

        Raises:
            RunError: too many in a row, or all steps of the training.
        """
        self.mute += 1
        message = f"{where}: none of its rows {rows} has a supervised token"
        if self.mute <= min(MOST_SKIPS, self.steps - 1):
            self.say(f"{message}; the step is skipped")
            return
        earlier = self.mute - 1
        again = f", nor has one of the {earlier} steps before it" if earlier else ""
        raise RunError(f"{message}{again}; check the data's labels.")

    def bad_figure(self, message: str) -> None:
        """Skip a step whose loss or gradient is not finite, or stop.

        Raises:
            RunError: the recipe says stop, or too many steps in a row were skipped.
        """
        self.not_finite += 1
        if self.tolerant and self.not_finite <= MOST_SKIPS:
            self.say(f"{message}; the step is skipped")
            return
        again = ""
        if self.not_finite > 1:
            again = f"{MOST_SKIPS} steps before it were skipped, so it is not these rows alone. "
        raise RunError(
            f"{message}; nothing was published, the last checkpoint is kept. {again}Lower lr, look "
            "at these rows, or set non_finite: skip, which goes on from the checkpoint."
        )

    def has_tokens(self) -> None:
        """Note that a step has supervised tokens."""
        self.mute = 0

    def is_finite(self) -> None:
        """Note that a step's loss and gradient are finite."""
        self.not_finite = 0
