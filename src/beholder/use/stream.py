"""An answer while it is written: the model writes in a thread of its own, the reader takes the pieces."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class AnswerStream(Iterator[str]):
    """An answer while it is written: iterate for its pieces.

    ``text`` is what was given out so far. ``complete``: the model ended by itself, rather than being cut by a limit or
    closed. The model writes in a thread of its own and stops at the next token after `close`.
    """

    def __init__(
        self, write: Callable[[Any], None], decode: Callable[[Sequence[int]], str], end_ids: Sequence[int]
    ) -> None:
        self.text = ""
        self.complete = False
        self._ids: list[int] = []
        self._decode, self._end_ids = decode, frozenset(end_ids)
        self._channel = _Channel()
        # The thread knows the channel only: a stream that nobody holds any more is collected, and stops it.
        self._thread = threading.Thread(target=_write_into, args=(write, self._channel), name="answer", daemon=True)
        self._thread.start()
        self._over = False

    def __next__(self) -> str:
        while not self._over:
            item = self._channel.get()
            if isinstance(item, BaseException):
                self.close()
                raise item
            if item is None:
                self._over = True
                self._thread.join()
            else:
                self._ids.append(item)
                self.complete |= item in self._end_ids
            if piece := self._fresh():
                self.text += piece
                return piece
        raise StopIteration

    def close(self) -> None:
        """Stop the model; what was given out stays in ``text``."""
        self._over = True
        self._channel.stop()
        self._thread.join()

    def __del__(self) -> None:
        if hasattr(self, "_channel"):
            self._channel.stop()

    def _fresh(self) -> str:
        """What can be said now and was not yet: characters whose bytes are not all there are waited for.

        The whole answer is decoded at every token, which costs less than a hundredth of writing it.
        """
        return beyond(self.text, settled(self._decode(self._ids), over=self._over), over=self._over)


def settled(text: str, *, over: bool) -> str:
    """What of a decoded answer stays as it is whatever comes after: all of it once it is ``over``."""
    return text if over else text.rstrip("\N{REPLACEMENT CHARACTER}").rstrip()


def beyond(said: str, text: str, *, over: bool) -> str:
    """What of ``text`` comes after what was ``said`` of it; nothing while it is shorter."""
    if not over and not text.startswith(said):
        return ""
    assert text.startswith(said), "the tokenizer decodes a longer answer to another beginning"
    return text[len(said) :]


class _Stopped(Exception):
    """Nobody wants the rest of the answer."""


class _Channel:
    """From the writing thread to the reading one: token ids, then None or what went wrong.

    ``put`` and ``end`` are what transformers calls on a streamer.
    """

    def __init__(self) -> None:
        self._items: SimpleQueue[int | BaseException | None] = SimpleQueue()
        self._stop = threading.Event()

    def put(self, ids: torch.Tensor) -> None:
        if self._stop.is_set():
            raise _Stopped
        for i in ids.flatten().tolist():  # nothing at first: a prompt of embeddings has no ids
            self._items.put(int(i))

    def end(self) -> None: ...

    def close(self, error: BaseException | None) -> None:
        self._items.put(error)

    def get(self) -> int | BaseException | None:
        while True:
            try:
                return self._items.get(timeout=0.2)  # in slices: a Ctrl-C reaches every platform between them
            except Empty:
                continue

    def stop(self) -> None:
        self._stop.set()


def _write_into(write: Callable[[Any], None], channel: _Channel) -> None:
    error: BaseException | None = None
    try:
        write(channel)
    except _Stopped:
        pass
    except BaseException as e:  # raised again where the stream is read
        error = e
    channel.close(error)
