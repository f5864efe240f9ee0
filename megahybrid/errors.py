"""What the user is told when something they gave cannot work, or a machine does not."""


class UserError(Exception):
    """One sentence that says what is wrong and what to change; the command line prints it without a traceback."""


class MachineFault(UserError):
    """A process, node, GPU or link failed, not what was asked for: the same start may succeed elsewhere or later."""
