"""What can go wrong for a user, and the exit code of the command that meets it."""


class MocoError(Exception):
    """A condition the user can act on: the command prints its message in one line and exits with `exit_code`."""

    exit_code = 1


class UsageError(MocoError):
    """A wrong call or config."""

    exit_code = 2


class DataError(MocoError):
    """Missing, unreadable or unsuitable input files."""

    exit_code = 3


class DivergedError(MocoError):
    """Training went non-finite and stayed so."""

    exit_code = 4


class Preempted(MocoError):
    """The run was asked to stop and has saved itself; the same command goes on from there."""

    exit_code = 75
