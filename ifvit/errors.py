"""A user's mistake, told in one sentence with its remedy."""


class UserError(Exception):
    """Something the user can mend; commands print it on stderr and exit 2.

    The message is one sentence that says what is wrong, then the remedy.
    """


class CheckpointNotFound(UserError):
    """There is no checkpoint at the path that was given."""
