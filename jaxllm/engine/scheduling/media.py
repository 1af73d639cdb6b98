"""Which pictures are encoded in a step: those that a chunk needs and that are not there, as far as there is room.

A chunk ends in front of the first item that does not fit; nobody else waits for it. An item stays until the last of
its tokens is computed, so whoever holds one can go on to its end, and gives it back: nobody waits for ever.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxllm.engine.cache.encoder_cache import EncoderCache
from jaxllm.multimodal.items import EncodedPart, EncoderInput, HeldMedia

if TYPE_CHECKING:
    from jaxllm.engine.request import Request
    from jaxllm.engine.step import SchedulerOutput


class MediaScheduling:
    """Of one scheduler.

    Args:
        num_rows: vectors that the encoder's cache has room for, at least those of the largest item.
        max_encoder_tokens: vectors that are made in a step; an item of more is made by itself.
        keeps_whole: whether a chunk has all tokens of an item that it has any of: they see each other. Those that were
            found in the prefix cache have seen the others.
    """

    def __init__(self, num_rows: int, max_encoder_tokens: int, *, keeps_whole: bool = False) -> None:
        self.cache, self._keeps_whole = EncoderCache(num_rows), keeps_whole
        self._max_encoder_tokens = max_encoder_tokens
        self._left = 0
        #: steps in which a prompt ended in front of an item for which there was no room, and most vectors that
        #: would have been in use, had there been
        self.num_waiting_steps = self.most_wanted = 0
        #: of this step: what there was no room for
        self._missing: dict[str, int] = {}
        #: requests that hold items
        self._holders: dict[str, Request] = {}

    def begin(self) -> None:
        """Another step."""
        self._left = self._max_encoder_tokens
        self._missing.clear()

    def least(self, request: Request, start: int) -> int:
        """How many tokens a chunk from `start` on has at least."""
        if request.media is None or not self._keeps_whole:
            return 0
        return next((stop - start for _, first, stop, _ in request.media.media.items if first <= start < stop), 0)

    def chunk(self, step: SchedulerOutput, request: Request, start: int, count: int) -> int:
        """How many of `count` tokens from `start` on can be computed; the items among them are held, and encoded where
        they are not there.
        """
        held = request.media
        if held is None:
            return count
        for number, (item, first, stop, _) in enumerate(held.media.items):
            if first >= start + count:
                break
            if stop > start + count and self._keeps_whole:
                return max(first - start, 0)
            if stop <= start or number in held.rows:
                continue
            rows = self.cache.acquire(item)
            if rows is None:
                is_first = self._left == self._max_encoder_tokens
                if not self.cache.can_hold(item.num_tokens) or (item.num_tokens > self._left and not is_first):
                    self._missing[item.content_hash] = item.num_tokens
                    return max(first - start, 0)
                rows = self.cache.allocate(item)
                self._left -= item.num_tokens
                step.encoder_inputs.append(EncoderInput(item, rows))
            held.rows[number] = rows
            held.new.append(number)
            self._holders[request.request_id] = request
        return count

    def place(self, step: SchedulerOutput, request: Request) -> None:
        """Tell the runner where it finds the items of a request that runs in this step."""
        held = request.media
        if held is not None:
            for number in held.new:
                step.encoded_parts.append(EncodedPart(request.row, held.media.items[number].start, held.rows[number]))
            held.new.clear()

    def end(self, step: SchedulerOutput) -> None:
        """Give back what is computed; at the end of a step, whose encoder runs before all else.

        A step without entries is not executed: what it would have encoded is not there.
        """
        if self._missing:
            self.num_waiting_steps += 1
            self.most_wanted = max(self.most_wanted, self.cache.num_used + sum(self._missing.values()))
        if not step.rows:
            for item, _ in step.encoder_inputs:
                self.cache.forget(item)
            step.encoder_inputs.clear()
        for request in list(self._holders.values()):
            held = request.media
            assert held is not None
            for number in [n for n in held.rows if held.media.items[n].stop <= request.num_computed_tokens]:
                self._give_back(held, number)
            if not held.rows:
                del self._holders[request.request_id]

    def release(self, request: Request) -> None:
        """Give back all that a request holds."""
        held = request.media
        if held is None:
            return
        for number in list(held.rows):
            self._give_back(held, number)
        held.new.clear()
        self._holders.pop(request.request_id, None)

    def _give_back(self, held: HeldMedia, number: int) -> None:
        del held.rows[number]
        self.cache.release(held.media.items[number].item)
