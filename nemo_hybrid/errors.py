"""Failures with a message for the user instead of a traceback."""


class UserError(Exception):
    """A mistake the user can mend: bad option, missing file, impossible layout.

    The command line prints its message without a traceback and exits with status 2.
    """


class TrainingError(Exception):
    """The run itself failed: the loss or a gradient is not finite.

    The command line prints its message without a traceback and exits with status 3.
    """
