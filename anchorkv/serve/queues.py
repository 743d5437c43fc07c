"""Who is next: the tenants in turn, and of each its oldest request, or an older conversation before a new one."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque

from anchorkv.serve.slots import Slot


class Queues:
    """Requests that wait to be admitted. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tenants: OrderedDict[str, deque[Slot]] = OrderedDict()

    def __len__(self) -> int:
        with self._lock:
            return sum(len(queue) for queue in self._tenants.values())

    def all(self) -> list[Slot]:
        with self._lock:
            return [slot for queue in self._tenants.values() for slot in queue]

    def put(self, slot: Slot, first: bool = False) -> None:
        """first: before this tenant's others, for what has been admitted before."""
        with self._lock:
            queue = self._tenants.setdefault(slot.tenant, deque())
            if first:
                queue.appendleft(slot)
            else:
                queue.append(slot)

    def heads(self) -> list[Slot]:
        """One of each tenant, the tenant served longest ago first: one that had to leave the engine, else the oldest
        that goes on from what is held, unless the very oldest is pressing, else that one.

        Were the oldest always first, it might push out of memory just what the next ones go on from.
        """
        with self._lock:
            return [_head(queue) for queue in self._tenants.values()]

    def admitted(self, slot: Slot) -> None:
        """`slot` runs now: its tenant goes to the end of the line."""
        with self._lock:
            for older in self._tenants[slot.tenant]:
                if older is slot:
                    break
                older.overtaken += 1
        self.remove(slot)
        with self._lock:
            if slot.tenant in self._tenants:
                self._tenants.move_to_end(slot.tenant)

    def remove(self, slot: Slot) -> None:
        with self._lock:
            queue = self._tenants[slot.tenant]
            queue.remove(slot)
            if not queue:
                del self._tenants[slot.tenant]


def _head(queue: deque[Slot]) -> Slot:
    oldest = queue[0]
    if oldest.away is not None or oldest.pressing:
        return oldest
    return next((slot for slot in queue if slot.expected), oldest)
