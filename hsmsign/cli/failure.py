"""How a command ends that could not do its work: a sentence, what to do next, and an exit code."""

from typing import IO, Any

import click


class Failure(click.ClickException):
    """The command failed on this machine.

    Arguments:
        message: what happened.
        hint: what to do next.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint

    def show(self, file: IO[Any] | None = None) -> None:
        """Prints it to stderr."""
        for text in (f"Error: {self.message}", self.hint):
            if text:
                click.echo(printable(text), file=file, err=True)


class WrongUsage(Failure):
    """The options or the settings are wrong; the code is click's own for that."""

    exit_code = 2


class Refused(Failure):
    """The server refused the request (4xx)."""

    exit_code = 3


class ServerFailed(Failure):
    """The server failed, or stayed busy (5xx)."""

    exit_code = 4


class NoAnswer(Failure):
    """There was no connection, no answer in time, or not the whole answer."""

    exit_code = 5


def printable(text: str) -> str:
    """The text without what would steer a terminal: it may come from a server."""
    return "".join(character if character.isprintable() or character == "\n" else "?" for character in text)
