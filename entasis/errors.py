"""What a user reads when something is wrong: one line, and an exit code."""


class UserError(ValueError):
    """The user's input cannot be used. The command line prints its one line and exits with 2."""


class Failure(RuntimeError):
    """The work itself failed (disk full, non-finite loss, out of memory). Printed in one line; exits with 1."""
