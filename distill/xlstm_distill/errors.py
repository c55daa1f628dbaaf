"""The two errors that a user sees as plain lines, without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Bad input: one line per problem. The command line exits with 2.

    A line names the field, its value, what is allowed and the fix.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class RunError(Exception):
    """Failure at run time (non-finite loss, full disk, ...), in one line; exit code 1."""
