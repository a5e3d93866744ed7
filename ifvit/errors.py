"""How a command ends otherwise than well; `cli` turns each into a sentence and an exit code."""


class UserError(Exception):
    """Something the user can mend; commands print it on stderr and exit 2.

    The message is one sentence that says what is wrong, then the remedy.
    """


class CheckpointNotFound(UserError):
    """There is no checkpoint at the path that was given."""


class Failure(Exception):
    """The run itself failed, e.g. the loss is NaN: exit code 1, no traceback."""


class Interrupted(Exception):
    """A signal stopped the run after it was saved; `code` is the exit code."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code
