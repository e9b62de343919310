"""The one exception that means "the user can mend this"."""


class UserError(Exception):
    """A problem in the user's input or surroundings, told in one line.

    The message names the thing (file, key, run), the reason, and the way out. The command line
    prints it without a traceback and exits with code 1; ``--debug`` shows the traceback too.
    """
