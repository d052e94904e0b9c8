"""Checks of numbers at construction."""

from typing import Any

import jax


def check(
    name: str,
    value: Any,
    low: float = float("-inf"),
    high: float = float("inf"),
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Raises ValueError when a concrete number lies outside a range; traced values and schedules pass.

    The message names the value, the range and the nearest allowed end.
    """
    if callable(value) or isinstance(value, jax.core.Tracer):
        return
    try:
        if isinstance(value, str):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}={value!r} is not a number.") from None
    low_ok = number > low if open_low else number >= low
    high_ok = number < high if open_high else number <= high
    if low_ok and high_ok:
        return
    interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high or high == float('inf') else ']'}"
    end = low if not low_ok else high
    strict = open_low if not low_ok else open_high
    advice = f"a number {'above' if end == low else 'below'} {end:g}" if strict else f"{end:g}"
    raise ValueError(
        f"{name}={value!r} is outside {interval}; the nearest allowed value is {advice}."
    )
