"""Checks of arguments at construction: numbers in a range, names from a list, and the nearest valid choice."""

import difflib
import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax

F = TypeVar("F", bound=Callable[..., Any])


def check(
    name: str,
    value: object,
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
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ValueError(f"{name}={value!r} is not a number.") from None
    low_ok = number > low if open_low else number >= low
    high_ok = number < high if open_high else number <= high
    if low_ok and high_ok:
        return
    interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high or high == float('inf') else ']'}"
    end = low if not low_ok else high
    strict = open_low if not low_ok else open_high
    if math.isinf(end):
        advice = "a finite number"
    elif strict:
        advice = f"a number {'above' if end == low else 'below'} {end:g}"
    else:
        advice = f"{end:g}"
    raise ValueError(
        f"{name}={value!r} is outside {interval}; the nearest allowed value is {advice}."
    )


def nearest(value: object, allowed: Iterable[str]) -> str:
    """The allowed name that is most like `value`."""
    return difflib.get_close_matches(str(value), list(allowed), n=1, cutoff=0.0)[0]


def one_of(name: str, value: object, allowed: Iterable[str]) -> None:
    """Raises ValueError unless `value` is one of the allowed names; the message gives all of them and the nearest."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(
            f"{name}={value!r} is not known; allowed: {', '.join(map(repr, allowed))} "
            f"(did you mean {nearest(value, allowed)!r}?)."
        )


def passes_options_to(inner: Callable[..., Any], *without: str) -> Callable[[F], F]:
    """Completes the signature of a function that passes its ``**options`` on to `inner`.

    The arguments of `inner` replace ``**options`` in ``inspect.signature`` as keyword-only arguments, with their types
    and defaults, so that ``help``, editors and ``optax.inject_hyperparams`` see them although they are written once.

    Args:
        inner: the function that receives the options.
        without: arguments of `inner` that the function sets itself.
    """

    def complete(function: F) -> F:
        own = inspect.signature(function)
        mine = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        taken = {p.name for p in mine} | set(without)
        passed = [
            p.replace(kind=p.KEYWORD_ONLY)
            for p in inspect.signature(inner).parameters.values()
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in taken
        ]
        function.__signature__ = own.replace(parameters=[*mine, *passed])  # type: ignore[attr-defined]
        return function

    return complete
