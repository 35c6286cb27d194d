"""How sure the tables of reproduce.py are: intervals that count seeds, differences between methods, and
claims, each beside its criterion. A method's results are {seed: row of eval.py} at one sampling; all methods
and seeds answer the same stories."""
import functools

import numpy as np

from lib.display import what_differs
from lib.run import if_finite
from lib.stats import judge, sign_flips, wilson

BASE, RL, FREE = "base, explicit reasoning", "RL without latents", "LiteReason"
OURS, AFTER_RL = "LiteReason + length penalty", "LiteReason after RL + length penalty"
BEFORE = "LiteReason before RL"
TEXT, SHUFFLED = "its latents taken away", "shuffled latents"
# {a method: what it is compared with}: the differences that the text may speak of. Names are those of the
# tables; where one of the two has not been run, the comparison is left out.
COMPARED = [
    (RL, [BASE]),
    (OURS, [BASE, RL]),
    (FREE, [BASE, RL, "RL with tags, no latents", f"{FREE}, {TEXT}", f"{FREE}, {SHUFFLED}"]),
    (BEFORE, [f"{BEFORE}, {SHUFFLED}", f"{BEFORE}, {TEXT}"]),
    (FREE, ["RL with tags, no latents, after stage 2"]),
    (OURS, ["RL + length penalty", "RL with tags + length penalty", "the paper's recipe + length penalty",
            "base frozen + length penalty", "no anchor + length penalty",
            "stage 2 twice as long + length penalty", "RL with tags + length penalty, after stage 2",
            "no noise + length penalty", "pause tokens + length penalty", f"{OURS}, {TEXT}"]),
    (AFTER_RL, [BASE, RL, OURS, "RL with tags after RL + length penalty", f"{AFTER_RL}, {SHUFFLED}"])]
PAIRS = [(ours, theirs) for ours, others in COMPARED for theirs in others]

# (claim, whether "all" or "any" of its tests must be met, [(statistic, methods, more than)])
EQUAL = -0.02  # accuracy gained where accuracy counts as equal: at most two points are lost
LONGER = 1 - 1 / 1.3  # tokens saved against a run that takes 30 % more
CLAIMS = []
for ours in (OURS, FREE, AFTER_RL):
    CLAIMS += [
        (f"{ours} keeps RL's gain", "all", [("gain kept", (ours, RL, BASE), 0.95)]),
        (f"{ours} is shorter than the base", "all", [("tokens saved", (ours, BASE), 0.77)]),
        (f"{ours} is shorter than RL", "all", [("tokens saved", (ours, RL), 0.70)])]
for ours, theirs, words in [
        (FREE, "RL with tags, no latents", "LiteReason beats RL with tags"),
        (FREE, f"{FREE}, {TEXT}", "LiteReason beats itself without latents"),
        (OURS, "RL with tags + length penalty", "LiteReason beats RL with tags under the same penalty"),
        (OURS, f"{OURS}, {TEXT}", "LiteReason beats itself without latents under the penalty"),
        (AFTER_RL, "RL with tags after RL + length penalty",
         "LiteReason after RL beats RL with tags after RL under the same penalty")]:
    tests = [("tokens saved", (ours, theirs), 0.0), ("accuracy gained", (ours, theirs), EQUAL)]
    CLAIMS.append((f"{words}: fewer tokens at equal accuracy", "all", tests))
for ours, theirs, words in [
        ("control plain", "control latents: shuffled", f"latents matter: {SHUFFLED}"),
        ("control plain", "control latents: noise", "latents matter: noise"),
        ("control plain", "control latents: mean", "latents matter: the mean latent"),
        (AFTER_RL, f"{AFTER_RL}, {SHUFFLED}", f"after RL too: {SHUFFLED}")]:
    tests = [("accuracy gained", (ours, theirs), 0.10), ("tokens saved", (ours, theirs), LONGER)]
    CLAIMS.append((f"{words} in their place cost 10 points or 30 % more tokens", "any", tests))
CLAIMED = {methods for _, _, tests in CLAIMS for _, methods, _ in tests}


# ============================================================ statistics that count seeds
def observed(rows, what, seeds):
    """{seed: row} -> the scores, or the tokens, of each story, (S, N)."""
    return np.array([rows[seed]["per_example"][what] for seed in seeds], dtype=np.float64)


def drawn_means(arrays, seed=0, resamples=10000):
    """arrays: (S, N) each, of the same seeds and stories -> their means over seeds and stories that are drawn
    again with replacement, the same ones for all arrays, (len(arrays), resamples).

    All seeds answer the same stories, so one draw of stories serves all seeds of a resample (Owen's
    pigeonhole bootstrap). Of S seeds S - 1 are drawn, which makes the variance of a mean of few seeds
    unbiased (Rao and Wu). Even so, where three seeds differ by much more than chance the interval holds the
    truth in four of five cases, not in 95 of 100 (tests/test_stats.py); one seed counts stories only."""
    draws = _draws(*arrays[0].shape, seed, resamples)
    return np.concatenate([[((seeds @ array) * stories).sum(1) for array in arrays]
                           for seeds, stories in draws], axis=1)


@functools.lru_cache(maxsize=4)
def _draws(n_seeds, n_stories, seed, resamples):
    """Weights of seeds and stories, in blocks of 500 resamples. All tables ask for the same ones."""
    generator = np.random.default_rng(seed)
    wanted = [(n_seeds, max(1, n_seeds - 1)), (n_stories, n_stories)]  # how many there are and are drawn
    return [[generator.multinomial(drawn, np.full(n, 1 / n), 500) / drawn for n, drawn in wanted]
            for _ in range(resamples // 500)]


def middle(draws):  # the 95 % in it
    return np.quantile(draws, [0.025, 0.975]).tolist()


def interval(array):
    """95 % interval of the mean of (S, N), over seeds and stories. Of stories that are right or wrong it is
    nowhere narrower than Wilson's for one seed's number of stories: near 0 and 1 little else is drawn."""
    low, high = middle(drawn_means([array])[0])
    if np.isin(array, (0, 1)).all():
        lowest, highest = wilson(float(array.mean()), array.shape[1])
        low, high = min(low, lowest), max(high, highest)
    return [low, high]


def interval_by_book(scores, books, resamples=10000):
    """95 % interval of the mean of scores (N,), for which whole books are drawn again; too narrow for few."""
    names = sorted(set(books))
    own = [np.asarray([score for score, book in zip(scores, books) if book == name]) for name in names]
    sums, counts = (np.array([f(x) for x in own], dtype=np.float64) for f in (np.sum, len))
    drawn = np.random.default_rng(0).integers(0, len(names), (resamples, len(names)))
    return middle(sums[drawn].sum(1) / counts[drawn].sum(1))


def interval_of_gain(ours, theirs, ours_drawn, theirs_drawn):
    """Of the difference of two means of (S, N). Where both are right on the same stories all that is drawn
    is 0; then Wilson's interval of 0, for one seed's number of stories, on both sides."""
    if (ours == theirs).all() and np.isin(ours, (0, 1)).all():
        reach = wilson(0.0, ours.shape[1])[1]
        return [-reach, reach]
    return middle(ours_drawn - theirs_drawn)


def shared_seeds(*methods):  # of several {seed: row}
    return sorted(set.intersection(*map(set, methods)))


def compare(ours, theirs):
    """{seed: row} of two methods -> their paired differences over the seeds that both have, in the shape of
    lib.stats.against, with tokens_saved as a share of theirs. The intervals count seeds and stories; p counts
    stories alone (sign flips of a story's mean difference): three seeds cannot give a p below 0.25."""
    seeds = shared_seeds(ours, theirs)
    found = {"seeds": seeds}
    for what, of in (("accuracy", "score"), ("tokens", "tokens")):
        a, b = observed(ours, of, seeds), observed(theirs, of, seeds)
        a_drawn, b_drawn = drawn_means([a, b])
        differences = a - b
        found[what] = float(differences.mean())
        found[f"{what}_ci95"] = interval_of_gain(a, b, a_drawn, b_drawn)
        found[f"{what}_p"] = sign_flips(differences.mean(0))
    found["tokens_saved"] = float(1 - a.mean() / b.mean())
    found["tokens_saved_ci95"] = middle(1 - a_drawn / b_drawn)
    return found


# ============================================================ differences and claims
def differences(methods):
    """methods: {name: {seed: row}} at one sampling -> [comparison], one for each of PAIRS that is there."""
    found = [{"ours": ours, "theirs": theirs, **compare(methods[ours], methods[theirs])}
             for ours, theirs in PAIRS
             if {ours, theirs} <= set(methods) and shared_seeds(methods[ours], methods[theirs])]
    judge(found)
    return found


def against_plain(controls):
    """{control: {seed: row}} -> {control: its comparison with "plain", {} for that}, judged together."""
    found = {name: compare(rows, controls["plain"]) for name, rows in controls.items() if name != "plain"}
    judge(list(found.values()))
    return {"plain": {}, **found}


STATISTICS = {  # name: (function of the methods' means, of what, unit as printed)
    "gain kept": (lambda x, rl, base: np.where(rl > base, (x - base) / (rl - base), np.nan), "score", "%"),
    "tokens saved": (lambda ours, theirs: 1 - ours / theirs, "tokens", "%"),
    "accuracy gained": (lambda ours, theirs: ours - theirs, "score", "points")}


def claims(methods, scale=1):
    """methods: {name: {seed: row}}, the controls among them as "control NAME" -> [claim with its tests, each
    with value, interval and whether it is met]. A claim of which a method is missing is left out. scale: 0.01
    if scores are in percent."""
    order = ("met", "met by the mean only", "not met")
    found = []
    for words, needed, tests in CLAIMS:
        names = {name for _, of, _ in tests for name in of}
        if names <= set(methods) and shared_seeds(*(methods[name] for name in names)):
            measured = [measure(methods, *test, scale) for test in tests]
            worst_or_best = max if needed == "all" else min
            met = worst_or_best((test["met"] for test in measured), key=order.index)
            found.append({"claim": words, "needed": needed, "tests": measured, "met": met})
    return found


def measure(methods, statistic, names, more_than, scale=1):
    """One test of a claim: met if the whole interval is beyond the criterion. Value and interval are None
    where RL gains nothing of which a share could be kept."""
    function, of, unit = STATISTICS[statistic]
    seeds = shared_seeds(*(methods[name] for name in names))
    factor = scale if unit == "points" else 1
    arrays = [factor * observed(methods[name], of, seeds) for name in names]
    means = drawn_means(arrays)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(function(*(array.mean() for array in arrays)))
        draws = function(*means)
    ci95 = middle(draws) if np.isfinite(draws).all() else None
    if statistic == "accuracy gained":
        ci95 = interval_of_gain(*arrays, *means)
    met = "not met"
    if value > more_than:
        met = "met" if ci95 and ci95[0] > more_than else "met by the mean only"
    return {"statistic": statistic, "seeds": seeds, "value": if_finite(value), "ci95": ci95,
            "more_than": more_than, "unit": unit, "met": met}


# ============================================================ as Markdown
def markdown(headings, rows):
    """Lists of cells -> a table."""
    top, *lines = [f"| {' | '.join(cells)} |" for cells in (headings, *rows)]
    return "\n".join([top, f"|{'---|' * len(headings)}", *lines])


def differences_table(found, sampled, digits=3):
    """found: from `differences`; sampled: in words; digits: of accuracies."""
    rows = []
    for own in found:
        cells = [f"{own['ours']}: {own['theirs']}"]
        for what, form in (("accuracy", f"+.{digits}f"), ("tokens", "+.1f")):
            cells += [with_interval(own[what], own[f"{what}_ci95"], form), f"{own[f'{what}_holm']:.2g}"]
        saved = [100 * end for end in own["tokens_saved_ci95"]]
        rows.append([*cells, with_interval(100 * own["tokens_saved"], saved, ".1f"), what_differs(own)])
    return markdown([f"compared with, {sampled}", "accuracy gained (95 % interval)", "Holm's p",
                     "tokens gained", "Holm's p", "tokens saved, %", "differs in"], rows)


def claims_table(by_sampling):
    """{sampling in words: from `claims`} -> Markdown. What is not tested at a sampling has no cells there."""
    rows = {}
    for i, own in ((i, own) for i, found in enumerate(by_sampling.values()) for own in found):
        joined = " and " if own["needed"] == "all" else " or "
        criterion = joined.join(f"{test['statistic']} over {100 * test['more_than']:.0f} {test['unit']}"
                                for test in own["tests"])
        row = rows.setdefault(own["claim"], [own["claim"], criterion, *[""] * 2 * len(by_sampling)])
        row[2 + 2 * i : 4 + 2 * i] = joined.join(map(in_its_unit, own["tests"])), f"**{own['met']}**"
    return markdown(["claim", "criterion", *(cell for sampled in by_sampling for cell in (sampled, ""))],
                    rows.values())


def in_its_unit(test):
    if test["value"] is None:
        return f"{test['statistic']}: there is none"
    interval = in_words([100 * end for end in test["ci95"]], ".1f") if test["ci95"] else "no interval"
    one_seed = ", one seed" if len(test["seeds"]) == 1 else ""
    return f"{test['statistic']} {100 * test['value']:.1f} {test['unit']} ({interval}{one_seed})"


def in_words(ci95, form):
    return f"{ci95[0]:{form}} to {ci95[1]:{form}}"


def with_interval(value, ci95, form):
    return f"{value:{form}} ({in_words(ci95, form)})"
