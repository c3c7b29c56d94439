"""Dense float64 NumPy definitions of the merges, written from the papers."""

from __future__ import annotations

import numpy as np


def flat(tensors):
    return np.concatenate([np.asarray(t, dtype=np.float64).reshape(-1) for t in tensors.values()])


def trimmed(tau, keep):
    order = np.lexsort((np.arange(len(tau)), -np.abs(tau)))
    out = np.zeros_like(tau)
    out[order[:keep]] = tau[order[:keep]]
    return out


def ties(base, experts, density, scale, weights, scope, divisor="count"):
    deltas = [{n: np.asarray(e[n], np.float64) - np.asarray(base[n], np.float64) for n in base} for e in experts]
    kept = []
    for delta in deltas:
        if scope == "global":
            vector = flat(delta)
            vector = trimmed(vector, max(int(np.floor(density * len(vector))), 1))
            out, at = {}, 0
            for n, d in delta.items():
                out[n], at = vector[at : at + d.size].reshape(d.shape), at + d.size
        else:
            out = {
                n: trimmed(d.reshape(-1), max(int(np.floor(density * d.size)), 1)).reshape(d.shape)
                for n, d in delta.items()
            }
        kept.append(out)
    weighted = [{n: w * k[n] for n in k} for w, k in zip(weights, kept, strict=True)]
    signs = np.concatenate([np.sign(sum(w[n] for w in weighted)).reshape(-1) for n in base])
    majority = 1.0 if signs.sum() >= 0 else -1.0
    merged = {}
    for n in base:
        sign = np.sign(sum(w[n] for w in weighted))
        sign[sign == 0] = majority
        total, count = np.zeros_like(sign), np.zeros_like(sign)
        for w, d in zip(weights, weighted, strict=True):
            agree = d[n] * sign > 0
            total += d[n] * agree
            count += agree * (abs(w) if divisor == "weight" else 1)
        merged[n] = np.asarray(base[n], np.float64) + scale * total / np.where(count == 0, 1, count)
    return merged


def task_arithmetic(base, experts, scale, weights):
    return {
        n: np.asarray(base[n], np.float64)
        + scale
        * sum(
            w * (np.asarray(e[n], np.float64) - np.asarray(base[n], np.float64))
            for w, e in zip(weights, experts, strict=True)
        )
        for n in base
    }


def average(experts, weights):
    return {
        n: sum(w * np.asarray(e[n], np.float64) for w, e in zip(weights, experts, strict=True)) / sum(weights)
        for n in experts[0]
    }
