"""The error that a command shows as one line."""


class UserError(Exception):
    """Something the user gave is wrong: a path, a flag, a key, a line of data. The message says what and what would be right."""
