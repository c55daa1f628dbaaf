"""The two errors a user sees as one line."""


class UserError(Exception):
    """Bad input: one line that names the field, its value, what is allowed and the fix. The CLI exits with 2."""


class RunError(Exception):
    """Failure at run time (non-finite loss, full disk, ...): one line. The CLI exits with 1."""
