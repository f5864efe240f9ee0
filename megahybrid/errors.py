"""What the user is told when something they gave cannot work."""


class UserError(Exception):
    """One sentence that says what is wrong and what to change; the command line prints it without a traceback."""
