"""Rotational AdamW in float64 NumPy: one matrix [rows, inputs], the arithmetic of the released optimizer."""

import numpy as np


def centred(w):
    """Rows without their means, with the norms they had: what the released constructor makes of the weights."""
    norm = np.linalg.norm(w, axis=1, keepdims=True)
    zero = w - w.mean(axis=1, keepdims=True)
    return norm * zero / np.linalg.norm(zero, axis=1, keepdims=True)


class Rotation:
    """Call with weights, Adam's direction and ρ to get the new weights. Whole matrices: pass them as one row."""

    def __init__(self, memory, eps, zero_mean):
        self.memory, self.eps, self.zero_mean = memory, eps, zero_mean
        self.norm, self.square, self.step = None, 0.0, 0

    def __call__(self, p, d, angle):
        self.step += 1
        if self.norm is None:
            self.norm = np.linalg.norm(p, axis=1, keepdims=True)
        if self.zero_mean:
            d = d - d.mean(axis=1, keepdims=True)
        d = d - p * (np.sum(d * p, axis=1, keepdims=True) / self.norm**2)
        now = np.sum(d * d, axis=1, keepdims=True)
        self.square = (1 - self.memory) * now + self.memory * self.square
        typical = np.sqrt(self.square / (1 - self.memory**self.step))
        new = p - angle * (d / (self.eps + typical)) * self.norm
        return new * self.norm / np.linalg.norm(new, axis=1, keepdims=True)
