"""Find the most that fits, from few compilations."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

LOOKS = 4


@dataclass(frozen=True)
class Limit:
    """The largest value that fits.

    Attributes:
      most: it; 0 where not even the first fits.
      exact: whether a compiler was asked about it and about the next one.
      looks: values that a compiler was asked about.
    """

    most: int
    exact: bool
    looks: int


def largest(
    cost: Callable[[int], int | float],
    values: Sequence[int],
    room: int | float,
    *,
    start: int,
    guess: int,
) -> Limit:
    """The largest of `values` whose cost is at most `room`, from at most four calls of `cost`.

    Costs are taken to be nearly affine in the value: two calls give a line, the next ones are at
    the answer that it gives and at the one above, or where a better line says, if they disagree.

    Args:
      cost: bytes, growing with the value.
      values: ascending; the last is the largest that is of interest.
      room: bytes.
      start: one of the values, whose cost is known or wanted anyway.
      guess: one of the values, near the answer.
    """
    costs: dict[int, int | float] = {}
    first, second = values.index(start), values.index(guess)
    if first == second:
        second += 1 if second + 1 < len(values) else -1
    for index in (first, second):
        if 0 <= index < len(values):
            costs[index] = cost(values[index])
    while len(costs) < LOOKS:
        low, high = _bounds(costs, room, len(values))
        if high - low == 1:
            break
        # Between what fits and what does not; the one above where the line ends at what fits.
        index = min(max(_line(costs, values, room), low), high - 1)
        index = low + 1 if index == low else index
        costs[index] = cost(values[index])
    low, high = _bounds(costs, room, len(values))
    return Limit(values[low] if low >= 0 else 0, high - low == 1, len(costs))


def _bounds(costs: dict[int, int | float], room: int | float, count: int) -> tuple[int, int]:
    """The largest index known to fit (-1 for none), and the least one known not to, or the end."""
    high = min((index for index, cost in costs.items() if cost > room), default=count)
    low = max((index for index, cost in costs.items() if cost <= room and index < high), default=-1)
    return low, high


def _line(costs: dict[int, int | float], values: Sequence[int], room: int | float) -> int:
    """The last index that fits, by the line through the two known costs nearest to the room."""
    nearest = sorted(costs, key=lambda index: abs(costs[index] - room))[:2]
    if len(nearest) < 2:
        return nearest[0]
    (x, y), (z, w) = ((values[index], costs[index]) for index in nearest)
    slope = (w - y) / (z - x)
    if slope <= 0:
        return max(nearest)
    reach = x + (room - y) / slope
    return sum(value <= reach for value in values) - 1


def bisected(cost: Callable[[int], int | float], values: Sequence[int], room: int | float) -> int:
    """The last of `values` whose cost, cheap to ask for, is at most `room`; the first for none."""
    low, high = 0, len(values)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(values[middle]) <= room else (low, middle)
    return values[low]
