"""Searches over functions that cost a simulation per value, and are smooth only from afar."""

from __future__ import annotations

import math
from collections.abc import Callable

_GOLDEN = (math.sqrt(5) - 1) / 2


def crossing(
    value: Callable[[float], float],
    bounds: tuple[float, float],
    near: tuple[float, float],
    precise: tuple[float, float],
) -> float:
    """Where an ascending function crosses 0: false position, or halving where that is slow.

    Args:
        value: the function.
        bounds: where to look; the nearer one if it does not cross in between.
        near: a first guess, and how far off it may well be.
        precise: enough for the place, and for the value.
    """
    least, most = bounds
    place, reach = min(max(near[0], least), most), near[1]
    at = value(place)
    side = 1.0 if at < 0 else -1.0
    other, at_other = place, at
    while abs(at_other) > precise[1]:
        if at_other * side > 0:
            return _between(value, (place, at), (other, at_other), precise)
        if other == (most if side > 0 else least):
            break
        place, at = other, at_other
        other = min(max(place + side * reach, least), most)
        at_other = value(other)
        reach *= 4
    return other


def _between(
    value: Callable[[float], float],
    one: tuple[float, float],
    two: tuple[float, float],
    precise: tuple[float, float],
) -> float:
    """The crossing between two places, given with their values, one below 0 and one above."""
    (low, at_low), (high, at_high) = sorted((one, two))
    halve = False
    while high - low > precise[0]:
        width = high - low
        share = 0.5 if halve else at_low / (at_low - at_high)
        # A little inwards, or one end would stay for long.
        middle = low + width * min(max(share, 0.05), 0.95)
        at = value(middle)
        if abs(at) <= precise[1]:
            return middle
        if at < 0:
            low, at_low = middle, at
        else:
            high, at_high = middle, at
        halve = high - low > width / 2
    return low if -at_low < at_high else high


def lowest(value: Callable[[float], float], most: float, precise: float) -> float:
    """Where a function with one valley is lowest in [0, most], by golden section.

    Args:
        value: the function.
        most: the end of the interval.
        precise: enough for the place.
    """
    low, high = 0.0, most
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = value(left), value(right)
    while high - low > precise:
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - _GOLDEN * (high - low)
            at_left = value(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + _GOLDEN * (high - low)
            at_right = value(right)
    return (low + high) / 2
