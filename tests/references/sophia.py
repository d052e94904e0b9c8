"""Sophia in float64 NumPy: the authors' training loop, optax's order of events, and curvature by definition."""

import itertools

import numpy as np


def official(
    w, gradient, label_gradient, steps, *, learning_rate, b1, b2, rho, bs, k, weight_decay
):
    """The authors' loop, as they wrote it: refresh after step k-1, 2k-1, … on the next batch at the new weights.

    Args:
        w: initial weights.
        gradient: (w, step) -> gradient of the mean loss on the batch of that step.
        label_gradient: (w, step) -> gradient of the mean loss with sampled labels on the batch of that step.

    Returns:
        One (weights, win rate of that step, h) per step; h is the authors', without bs.
    """
    w = np.array(w, np.float64)
    m, h = np.zeros_like(w), np.zeros_like(w)
    history = []
    for t in range(steps):
        g = gradient(w, t)
        w = w * (1 - learning_rate * weight_decay)
        m = b1 * m + (1 - b1) * g
        win_rate = np.mean(np.abs(m) < rho * bs * h)
        ratio = np.minimum(np.abs(m) / (rho * bs * h + 1e-15), 1.0)
        w = w - learning_rate * np.sign(m) * ratio
        history.append((w, win_rate, h))
        if t % k == k - 1:
            h = b2 * h + (1 - b2) * label_gradient(w, t + 1) ** 2
    return history


def general(
    w, gradient, diagonal, steps, *, learning_rate, b1, b2, gamma, eps, clip, k, weight_decay,
    bias_correction, after_update,
):  # fmt: skip
    """The same with an estimate of any sign, either phase, and optax's bias correction. Result as in `official`."""
    w = np.array(w, np.float64)
    m, h = np.zeros_like(w), np.zeros_like(w)
    history = []
    for t in range(steps):
        g, old = gradient(w, t), w
        if not after_update and t > 0 and t % k == 0:
            h = b2 * h + (1 - b2) * diagonal(w, t)
        m = b1 * m + (1 - b1) * g
        m_hat = m / (1 - b1 ** (t + 1)) if bias_correction else m
        scale = np.where(h > 0, gamma * h, 0.0)
        u = m_hat / (scale + eps)
        u = np.where(np.abs(u) > clip, clip * np.sign(m_hat), u)
        win_rate = np.mean(np.abs(m_hat) < clip * scale)
        w = w - learning_rate * (u + weight_decay * w)
        if after_update and t % k == 0:
            h = b2 * h + (1 - b2) * diagonal(old, t)
        history.append((w, win_rate, h))
    return history


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def softmax_regression_hessian_diagonal(w, x, mask):
    """Diagonal of the Hessian in w[D, C] of the masked mean cross-entropy of x[N, D] @ w: mean of x² p (1 - p)."""
    p = softmax(x @ w)
    return np.einsum("n,nd,nc->dc", mask / mask.sum(), x**2, p * (1 - p))


def gauss_newton_diagonal(jacobian, logits, mask):
    """Diagonal of the mean of Jᵀ(diag(p) - ppᵀ)J, from jacobian[N, C, P] of logits[N, C] and mask[N]."""
    p = softmax(logits)
    middle = np.einsum("nc,cd->ncd", p, np.eye(p.shape[-1])) - np.einsum("nc,nd->ncd", p, p)
    return np.einsum("n,ncp,ncd,ndp->p", mask / mask.sum(), jacobian, middle, jacobian)


def all_labels(logits):
    """Every assignment of labels to positions, with its probability under the model."""
    p = softmax(logits)
    positions, classes = p.shape
    for labels in itertools.product(range(classes), repeat=positions):
        yield np.array(labels), np.prod(p[np.arange(positions), labels])
