"""The one exception that a user's mistake or a full disk ends in."""


class InputError(Exception):
    """Something the user can mend; its message is one sentence: what, where, how to mend it.

    Binaries print the message alone and exit with `status`.
    """

    def __init__(self, message: str, *, status: int = 2):
        # A name from a file may have line breaks in it.
        super().__init__(" ".join(message.splitlines()))
        self.status = status
