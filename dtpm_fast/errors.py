"""The one exception that a user is meant to read: command lines print it in one line, without a traceback."""


class UserError(Exception):
    """What went wrong, where (the file's name), and what to do about it."""
