"""Threads that belong to one provider: named, bounded, and gone when it stops."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from tokens.errors import ProviderUnavailable

P = ParamSpec("P")
T = TypeVar("T")


class Threads:
    """At most `count` threads, started when they are first needed.

    Arguments:
        name: what the threads are called.
    """

    def __init__(self, name: str, count: int) -> None:
        self._executor = ThreadPoolExecutor(max_workers=count, thread_name_prefix=name)
        self._futures: set[Future[Any]] = set()
        self._stopped = False

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `function` returns. Raises what it raises, and ProviderUnavailable after `stop`."""
        if self._stopped:
            raise ProviderUnavailable("The key store has been stopped.", "Try again when the service has started anew.")
        future = self._executor.submit(function, *args, **kwargs)
        self._futures.add(future)
        future.add_done_callback(self._futures.discard)
        return await asyncio.wrap_future(future)

    async def stop(self) -> None:
        """Finishes what runs, refuses what comes, and ends the threads."""
        self._stopped = True
        running = [asyncio.wrap_future(future) for future in tuple(self._futures)]
        await asyncio.gather(*running, return_exceptions=True)
        # nothing runs any more: this joins idle threads and does not block the loop
        self._executor.shutdown()
