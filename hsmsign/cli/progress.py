"""A progress bar on stderr, where that is a terminal; else nothing."""

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Self

if TYPE_CHECKING:
    import rich.progress


class Progress:
    """The way of one request: up, signing, down."""

    def __init__(self) -> None:
        self._bar: rich.progress.Progress | None = None
        self._task: rich.progress.TaskID | None = None
        self._left = 0

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def upload(self, size: int) -> None:
        """The request begins: `size` bytes of files."""
        self._left = size
        self._begin("Sending", size)

    def download(self, size: int | None) -> None:
        """The answer begins; None: nobody knows how long it is."""
        self._begin("Receiving", size)

    def advance(self, size: int) -> None:
        """So many bytes more."""
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task, size)

    def open(self, path: Path) -> BinaryIO:
        """The file, telling the bar what is read of it."""
        return _Counted(path, self)

    def sent(self, size: int) -> None:
        """So many bytes of the files were read; when all are, the server is at work."""
        self._left -= size
        self.advance(size)
        if size and not self._left:
            self._begin("Signing", None)

    def _begin(self, description: str, size: int | None) -> None:
        if self._bar is not None:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(description, total=size)


class _Counted(io.FileIO):
    """A file that tells the bar what is read of it."""

    def __init__(self, path: Path, progress: Progress) -> None:
        super().__init__(path)
        self._progress = progress

    def read(self, size: int | None = -1, /) -> bytes:
        chunk = super().read(size) or b""
        self._progress.sent(len(chunk))
        return chunk
