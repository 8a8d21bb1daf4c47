"""Failures with a message for the user instead of a traceback."""


class UserError(Exception):
    """A mistake the user can mend: bad option, missing file, impossible layout.

    The command line prints its message without a traceback and exits with status 2.
    """


class TrainingError(Exception):
    """The run itself failed: its loss diverges again and again.

    The command line prints its message without a traceback and exits with status 3.
    """


class Stopped(Exception):
    """A signal asked the run to end, and it did so at a step boundary, with a checkpoint.

    The command line prints its message without a traceback and exits with status 4.
    """
