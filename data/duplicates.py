"""Which texts are versions of one another. The data sets' prepare.py use it, so that a split never holds
out what another one shows."""
import re
from collections import Counter

import numpy as np


def words_of(text):
    """The words of a text in lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())


def find_clusters(texts, n=8, share=0.0):
    """Cluster numbers, one per text, each the place of the cluster's first text: texts that have runs of n
    words in common, directly or through others, are in one cluster.

    share: how many runs it takes: more than this share, 0 to 1, of those of the text that has fewer. With 0
    a single one is enough."""
    numbers = {}  # word -> its number
    weights = np.random.default_rng(0).integers(2**63, size=n, dtype=np.uint64)
    runs = []  # per text, a hash of 64 bits per run of n words
    for text in texts:
        ids = [numbers.setdefault(word, len(numbers) + 1) for word in words_of(text)]
        ids = np.array(ids + [0] * (n - len(ids)), dtype=np.uint64)  # a short text is one run of its own
        starts = len(ids) - n + 1
        runs.append(np.unique(sum(weight * ids[i : i + starts] for i, weight in enumerate(weights))))

    owner = np.repeat(np.arange(len(runs)), [len(own) for own in runs])
    every = np.concatenate(runs)
    order = np.argsort(every, kind="stable")
    same = np.flatnonzero(every[order][1:] == every[order][:-1])
    common = Counter(zip(owner[order[same]].tolist(), owner[order[same + 1]].tolist()))

    cluster = list(range(len(runs)))
    for (i, j), count in common.items():
        if count > share * min(len(runs[i]), len(runs[j])):
            a, b = sorted((cluster[i], cluster[j]))
            cluster = [a if own == b else own for own in cluster]
    return cluster
