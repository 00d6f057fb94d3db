"""Iterators over a loader's batches. Only the newest iterator of a loader can be used."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Generator, Iterator
from contextlib import suppress
from inspect import GEN_CLOSED, getgeneratorstate
from typing import Generic, TypeVar

Item = TypeVar("Item")

_iterators: weakref.WeakSet[EpochIterator] = weakref.WeakSet()


@atexit.register
def _close_iterators() -> None:
    """Close unfinished iterators, since a thread inside torch or DALI must not outlive the interpreter."""
    for iterator in list(_iterators):
        with suppress(ValueError, RuntimeError):  # the generator is running, or ended with an error
            iterator.close()


class EpochIterator(Iterator[Item], Generic[Item]):
    """Iterator over the items of a generator. The iterator can be ended early.

    Args:
        items: Generator of pairs (item, is_last).
    """

    def __init__(self, items: Generator[tuple[Item, bool]]) -> None:
        self._items = items
        self.is_started = False
        self._had_last = False
        self._is_replaced = False
        _iterators.add(self)

    def __next__(self) -> Item:
        """Return the next item.

        Raises:
            RuntimeError: The iterator was replaced before its last item.
        """
        if self._is_replaced:
            raise RuntimeError(
                "this iterator was ended by a newer one or by setting the loader's position; a loader has one set of "
                "buffers, so use one iterator at a time, or build a second loader"
            )
        self.is_started = True
        item, self._had_last = next(self._items)
        return item

    def close(self) -> None:
        """End the iterator, so that `next` raises StopIteration."""
        self._items.close()

    def replace(self) -> None:
        """End the iterator. `next` then raises RuntimeError if the iterator was unfinished, otherwise StopIteration."""
        is_unfinished = not self._had_last and getgeneratorstate(self._items) != GEN_CLOSED
        self._items.close()
        self._is_replaced |= is_unfinished
