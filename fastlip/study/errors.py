"""The one exception that reaches the user of the study: one line on the terminal and an exit status."""


class StudyError(Exception):
    """Something that the user can fix; the message is one line that says how.

    Attributes:
        status: exit status of the process: 2 where the command or its inputs are wrong, 1 otherwise.
    """

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(" ".join(message.split()))
        self.status = status


def first_line(error: Exception) -> str:
    """The first line of an error's message, at most 300 characters of it."""
    return str(error).strip().split("\n")[0][:300]
