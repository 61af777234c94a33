"""What a user reads when something is wrong: one line, and an exit code."""


class UserError(ValueError):
    """The user's input cannot be used. The command line prints its one line and exits with 2."""

    told_elsewhere = False
    """Whether another process of the run prints it."""

    def __init__(self, message: object = "") -> None:
        super().__init__(str(message).replace("\n", " "))  # a stranger's name in it may hold line breaks


class Damaged(UserError):
    """A file is not what was written: empty, cut short or changed. The line begins with `damaged:`."""


class Failure(RuntimeError):
    """The work itself failed (disk full, non-finite loss, out of memory). Printed in one line; exits with 1."""


class Stopped(Failure):
    """Ctrl-C or SIGTERM ended the work where it can go on."""


class DiskFull(Failure, OSError):
    """Something could not be written for want of space; what was there before is intact."""
