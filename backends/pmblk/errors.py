"""Errors that a person can mend. A media fault under an I/O is a `Status`, never one of these."""


class PmblkError(Exception):
    """Something outside is wrong. `message` says what and where, `hint` what to do about it."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class MediaError(PmblkError):
    """The media of a namespace cannot be created, opened, locked or mapped. Nothing was changed."""
