"""The one exception that means "the user can fix this"."""


class UserError(Exception):
    """A mistake the user can mend: bad option, missing file, impossible layout.

    The command line prints its message without a traceback and exits with status 2.
    """
