"""The one exception for mistakes that the user can mend. A leaf: imports nothing of the project."""


class UserError(ValueError):
    """Something given from outside is wrong: a flag, a file, an annotation, a checkpoint.

    The message is one line: which file, which field, what was found, what to do. The entry points
    print it and exit with status 2; `--debug` shows the traceback too.
    """
