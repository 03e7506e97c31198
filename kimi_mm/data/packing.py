"""Documents of many lengths into rows of one size: best fit, longest first, over a look-ahead pool.

    pool of documents ─► sorted by length ─► each into the fullest row that still takes it ─► rows

The last and emptiest row of a pool goes back to it, so that only whole rows are handed out.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs items into rows by best fit decreasing, in O(n log n).

    Args:
        lengths: of the items; each from 1 to `capacity`.
        capacity: of a row.

    Returns:
        Rows of item numbers, the fullest row first.

    Raises:
        ValueError: for an item that no row could hold.
    """
    if lengths and not 1 <= min(lengths) <= max(lengths) <= capacity:
        raise ValueError(f"lengths must lie in [1, {capacity}], got {min(lengths)} to {max(lengths)}.")
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free positions, row), sorted
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect_left(room, (lengths[item], -1))
        if at == len(room):
            rows.append([])
            free, row = capacity, len(rows) - 1
        else:
            free, row = room.pop(at)
        rows[row].append(item)
        insort(room, (free - lengths[item], row))
    return [rows[row] for _, row in room]


def bucket(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Groups items of like length, so that padding all of a group to its longest one fills at most `capacity`.

    Args:
        lengths: of the items; each from 1 to `capacity`.
        capacity: longest item of a group times its items.

    Returns:
        Groups of item numbers, shortest items first.
    """
    groups: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if not groups or (len(groups[-1]) + 1) * lengths[item] > capacity:
            groups.append([])
        groups[-1].append(item)
    return groups
