"""Intervals and paired tests. A first reading can skip it."""
import math

import numpy as np


def interval(scores):
    """95 % interval of the mean of scores: Wilson's where all of them are 0 or 1, else the normal one."""
    n = len(scores)
    mean = sum(scores) / n
    if set(scores) <= {0, 1}:
        return wilson(mean, n)
    variance = sum((score - mean) ** 2 for score in scores) / max(1, n - 1)
    half = 1.96 * math.sqrt(variance / n)
    return [mean - half, mean + half]


def wilson(share, n):
    """Wilson's 95 % interval of a share of n: it has a width at 0 and at 1, too."""
    z = 1.96
    shrink = 1 / (1 + z**2 / n)
    centre = shrink * (share + z**2 / (2 * n))
    half = shrink * z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return [max(0.0, centre - half), min(1.0, centre + half)]


def sign_flips(differences, seed=0, resamples=10000):
    """Two-sided p for the mean of paired differences: how often it is as far from 0 if the sign of each is a
    matter of chance. Exact for up to 12 differences that are not 0 (all signs are tried; of right and wrong
    answers this is McNemar's test), else from `resamples` draws and the true signs."""
    differences = np.asarray(differences, dtype=np.float64)
    differences = differences[differences != 0]
    n = len(differences)
    threshold = abs(differences.sum()) * (1 - 1e-9)  # the same sum in another order counts as the same
    if n <= 12:
        signs = 1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)  # (2**n, n)
        return float(np.mean(np.abs(signs @ differences) >= threshold))
    signs = 1 - 2 * np.random.default_rng(seed).integers(0, 2, (resamples, n))
    as_far = np.sum(np.abs(signs @ differences) >= threshold)
    return float((1 + as_far) / (resamples + 1))


def bootstrap(differences, seed=0, resamples=10000):
    """95 % interval of the mean of paired differences: examples are drawn again with replacement."""
    differences = np.asarray(differences, dtype=np.float64)
    n = len(differences)
    drawn = np.random.default_rng(seed).integers(0, n, (resamples, n))
    return np.quantile(differences[drawn].mean(1), [0.025, 0.975]).tolist()


def holm(p):
    """Holm's correction: the p of one family of tests -> each one's adjusted p. If it is below 0.05 wherever
    a difference is claimed, the chance of any false claim in the family is below 0.05."""
    p = np.asarray(p, dtype=np.float64)
    order = p.argsort()
    left = np.arange(len(p), 0, -1)  # how many hypotheses are left when this one's turn comes
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * left))
    return adjusted.tolist()


def against(result, plain, seed=0):
    """A control's paired tests against the plain run on the same examples; `judge` says what differs."""
    ours, theirs = result["per_example"], plain["per_example"]
    found = {}
    for what, key in (("accuracy", "score"), ("tokens", "tokens")):
        gained = np.subtract(ours[key], theirs[key])
        found |= {what: float(gained.mean()), f"{what}_ci95": bootstrap(gained, seed),
                  f"{what}_p": sign_flips(gained, seed)}
    return found


def judge(comparisons):
    """Adds to each comparison of one table (as `against` makes them) accuracy_holm, tokens_holm, and
    accuracy_differs, tokens_differs: Holm's p is below 0.05 and the interval leaves 0 out. The family is all
    of them, accuracies and tokens."""
    tests = [(own, what) for own in comparisons for what in ("accuracy", "tokens")]
    adjusted = holm([own[f"{what}_p"] for own, what in tests])
    for (own, what), p in zip(tests, adjusted):
        own[f"{what}_holm"] = p
        low, high = own[f"{what}_ci95"]
        own[f"{what}_differs"] = p < 0.05 and not low <= 0 <= high
