"""AdamCPR in float64 NumPy: one matrix, the arithmetic and the order of events of the released CPU path."""

import numpy as np

PLACEHOLDER = 1000.0  # the released code's "bound not set yet"


def measure(kind, x):
    if kind == "l2":
        return np.sum(x * x)
    if kind == "l1":
        return np.sum(np.abs(x))
    if kind == "std":
        return np.std(x, ddof=1)
    return np.sum(np.where(np.abs(x) < 1, x * x / 2, np.abs(x) - 0.5))


def gradient(kind, x):
    if kind == "l2":
        return 2 * x
    if kind == "l1":
        return np.sign(x)
    if kind == "std":
        return 2 * (x - x.mean()) / (x.size - 1) / (2 * np.std(x, ddof=1))
    return np.where(np.abs(x) < 1, x, np.sign(x))


class Matrix:
    """State of one matrix; call with the weights after Adam's step to get the regularised ones."""

    def __init__(self, w, *, bound, parameter, kind="l2", rate=1.0, every=1):
        self.bound, self.parameter, self.kind, self.every = bound, parameter, kind, every
        self.rate = rate if kind == "std" else rate / w.size
        self.step, self.force, self.sample, self.growth = 0, 0.0, 0.0, 0.0
        self.warm_start = parameter if bound == "warm_start" else 0
        self.kappa = {
            "uniform": parameter,
            "warm_start": 0.0,
            "dependent": None if bound != "dependent" else parameter * measure(kind, w),
            "inflection": PLACEHOLDER,
        }[bound]

    def __call__(self, theta, scale=1.0):
        self.step += 1
        size = measure(self.kind, theta)
        if self.bound == "inflection" and self.kappa == PLACEHOLDER:
            if self.step % self.every == 0 and self.step > self.parameter:
                growth = size - self.sample
                if self.step > 3 * self.parameter and self.growth > growth:
                    self.kappa = size
                self.sample = size
                if self.step > 2 * self.parameter:
                    self.growth = growth
        elif self.step > self.warm_start:
            self.force = max(0.0, self.force + self.rate * (size - self.kappa))
            theta = theta - scale * self.force * gradient(self.kind, theta)
        elif self.bound == "warm_start" and self.step == self.warm_start:
            self.kappa = size
        return theta
