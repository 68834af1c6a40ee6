"""The error that a command shows as one line."""


class UserError(Exception):
    """A path, flag, key or line of data that the user gave is wrong; the message says what, and what would be right."""
