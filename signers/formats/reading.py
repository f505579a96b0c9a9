"""Reading at any place in what may be too large for memory."""

from collections.abc import Callable, Iterator

ReadAt = Callable[[int, int], bytes]
"""`read_at(offset, length)`: that many bytes, fewer only at the end."""

CHUNK_BYTES = 1024 * 1024
"""How much is in memory while it is read through."""


def chunks(read_at: ReadAt, begin: int, end: int) -> Iterator[bytes]:
    """The bytes from `begin` to `end`, a MiB at a time."""
    for at in range(begin, end, CHUNK_BYTES):
        yield read_at(at, min(CHUNK_BYTES, end - at))
