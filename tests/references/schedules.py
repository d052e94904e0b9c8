"""Shrink per step of the named schedules in plain Python, from the released programs; t counts completed updates."""

import math


def nanochat(t, *, decay, steps, rate):
    """Muon's groups: cosine to zero, times the learning rate."""
    return rate * decay * 0.5 * (1 + math.cos(math.pi * t / steps))


def adana(t, *, steps, rate, peak, omega=4.0):
    """Its step counts from one."""
    return omega / (steps // 10 + (t + 1)) * rate / peak


def slowrun(t, *, decay, steps, rate):
    """Piecewise linear between four corners, at whole steps."""
    a, b = round(2 / 15 * steps), round(8 / 15 * steps)
    if t <= a:
        factor = 0.8
    elif t <= b:
        factor = 0.8 + (0.1 - 0.8) * (t - a) / (b - a)
    else:
        factor = 0.1 + (0.93 - 0.1) * (t - b) / (steps - b)
    return rate * decay * factor


def palm(t, *, decay, rate):
    """Emerging-Optimizers: decay has the unit of one over the rate."""
    return decay * rate**2
