"""Which steps are left out, in float64, from lists of losses and gradient norms alone."""

import math


def reference_skips(
    losses: list[float], norms: list[float], sigma: float | None, window: int, bound: int
) -> list[bool]:
    taken: list[tuple[float, float]] = []
    spikes, left_out = 0, []
    for step in zip(losses, norms, strict=True):
        recent = taken[-window:]
        broken = not all(math.isfinite(x) for x in step)
        high = (
            not broken
            and sigma is not None
            and len(recent) >= window // 2
            and any(
                x > mean(values) + sigma * deviation(values)
                for x, values in zip(step, zip(*recent), strict=True)
            )
        )
        if high and spikes >= bound:
            taken, high = [], False
        if broken or high:
            spikes += high
        else:
            taken, spikes = [*taken, step], 0
        left_out.append(broken or high)
    return left_out


def mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values)


def deviation(values: tuple[float, ...]) -> float:
    middle = mean(values)
    return math.sqrt(sum((x - middle) ** 2 for x in values) / len(values))
