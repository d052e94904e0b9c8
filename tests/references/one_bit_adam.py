"""1-bit Adam on N simulated workers in NumPy, written from the published algorithm (arXiv 2102.02888) and the
behaviour of its released code; shares nothing with the package. Signs are packed and exchanged for real.
"""

import dataclasses
import math

import numpy as np


def padded(size, workers):
    block = workers * (workers * 8 // math.gcd(workers, 8))
    return size if size % block == 0 else size + block - size % block


class Collective:
    """The sign-compressed mean of one vector per worker; remembers the errors of all workers."""

    def __init__(self, size, workers, dtype):
        self.size, self.workers, self.dtype = size, workers, dtype
        self.total = padded(size, workers)
        self.chunk = self.total // workers
        self.worker_error = np.zeros((workers, self.total), dtype)
        self.server_error = np.zeros((workers, self.chunk), dtype)

    def encode(self, vector):
        scale = self.dtype(np.linalg.norm(vector) / math.sqrt(vector.size))
        up = vector >= 0
        error = vector - scale * np.where(up, self.dtype(1), self.dtype(-1))
        return np.packbits(up), scale, error

    def decode(self, message, scale):
        bits = np.unpackbits(message).astype(self.dtype)
        return scale * (2 * bits - 1)

    def __call__(self, vectors):
        outbox, scales = [], []
        for n in range(self.workers):
            z = np.zeros(self.total, self.dtype)
            z[: self.size] = vectors[n]
            z += self.worker_error[n]
            message, scale, self.worker_error[n] = self.encode(z)
            outbox.append(np.split(message, self.workers))
            scales.append(scale)
        result = []
        for j in range(self.workers):
            c = np.zeros(self.chunk, self.dtype)
            for n in range(self.workers):
                c += self.decode(outbox[n][j], scales[n]) / self.dtype(self.workers)
            message, scale, self.server_error[j] = self.encode(c + self.server_error[j])
            result.append(self.decode(message, scale))
        return np.concatenate(result)[: self.size]


@dataclasses.dataclass
class OneBitAdam:
    """The optimizer of all workers at once. `params` and all its kin are dicts of arrays.

    compressed: names whose momentum is compressed. mask: names -> 0/1 arrays that multiply the momentum after each
    compression, or None: 1 where the frozen variance is positive. flat: one collective for all. largest: bound of the
    direction of what is compressed.
    """

    params: dict
    workers: int
    warmup: int
    learning_rate: float
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    compressed: tuple = ()
    mask: dict | None = None
    flat: bool = False
    correct_frozen: bool = False
    largest: float = math.inf
    dtype: type = np.float64

    def __post_init__(self):
        self.params = {k: np.array(v, self.dtype) for k, v in self.params.items()}
        self.m = {k: np.zeros_like(v) for k, v in self.params.items()}
        self.v = {k: np.zeros_like(v) for k, v in self.params.items()}
        sizes = {k: self.params[k].size for k in self.compressed}
        if self.flat:
            sizes = {"flat": sum(sizes.values())}
        self.collectives = {k: Collective(s, self.workers, self.dtype) for k, s in sizes.items()}
        self.steps = 0

    def compress(self, local):
        """local[n][name] -> mean[name], through one collective per name or one for all."""
        if not self.flat:
            return {
                k: self.collectives[k]([x[k].ravel() for x in local]).reshape(local[0][k].shape)
                for k in self.compressed
            }
        joined = [np.concatenate([x[k].ravel() for k in self.compressed]) for x in local]
        rest, out = self.collectives["flat"](joined), {}
        for k in self.compressed:
            size = local[0][k].size
            out[k], rest = rest[:size].reshape(local[0][k].shape), rest[size:]
        return out

    def step(self, grads):
        """grads: one dict per worker."""
        self.steps += 1
        b1, b2, one = self.dtype(self.b1), self.dtype(self.b2), self.dtype(1)
        grads = [{k: g[k].astype(self.dtype) for k in self.params} for g in grads]
        frozen = self.steps > self.warmup
        exact = [k for k in self.params if not frozen or k not in self.compressed]
        for k in exact:
            mean = sum(g[k] for g in grads) / self.dtype(self.workers)
            self.m[k] = b1 * self.m[k] + (one - b1) * mean
            self.v[k] = b2 * self.v[k] + (one - b2) * mean * mean
        if frozen:
            local = [
                {k: b1 * self.m[k] + (one - b1) * g[k] for k in self.compressed} for g in grads
            ]
            for k, m in self.compress(local).items():
                mask = (self.v[k] > 0) if self.mask is None else self.mask[k]
                self.m[k] = m * mask
        for k, p in self.params.items():
            v = self.v[k]
            if frozen and self.correct_frozen:
                v = v / self.dtype(
                    1 - self.b2 ** (self.warmup if k in self.compressed else self.steps)
                )
            u = self.m[k] / (np.sqrt(v) + self.dtype(self.eps))
            if frozen and k in self.compressed:
                u = np.clip(u, -self.largest, self.largest)
            u = u + self.dtype(self.weight_decay) * p
            self.params[k] = p - self.dtype(self.learning_rate) * u
        return self.params
