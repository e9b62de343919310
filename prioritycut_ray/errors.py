"""Errors that end a job in one line, each with the exit code of its kind (docs/failures.md)."""


class UserError(Exception):
    """A problem in the user's input or surroundings, told in one line.

    The message names the thing (file, key, run), the reason, and the way out. The command line
    prints it without a traceback and exits with ``exit_code``; ``--debug`` shows the traceback too.
    """

    exit_code = 1


class DataError(UserError):
    """Clips that cannot be read: trying again gives the same."""

    exit_code = 65


class NotFiniteError(UserError):
    """Losses or gradients that stay infinite or not a number: trying again gives the same."""

    exit_code = 76


class Preempted(UserError):
    """The run was asked to stop, saved its state, and waits to be resumed."""

    exit_code = 75


class Superseded(UserError):
    """A newer attempt has taken the run over; this one must not write any more."""

    exit_code = 77


class DiskFull(UserError):
    """No space left where the run writes."""

    exit_code = 73


class Detached(UserError):
    """Ctrl-C, or SIGTERM, to a command that follows a job elsewhere: the job goes on."""

    exit_code = 130


class LeaseHeld(UserError):
    """Another process is at work where this one wanted to be."""

    exit_code = 78
