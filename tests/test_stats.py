"""The statistics of the tables, against examples worked out by hand, all cases, or a known truth."""
import itertools

import numpy as np
import pytest

from lib.stats import bootstrap, differs, holm, judge, sign_flips, wilson
from lib import display
from results import stats


# ---------------------------------------------------------------- one table's tests
def test_holms_correction_is_the_worked_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # 3, 1, 2, 4 are left
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([0.02]) == [0.02] and holm([]) == []


def test_the_sign_flips_are_all_of_them_for_few_differences_and_close_to_all_for_many():
    generator = np.random.default_rng(0)
    for n in (1, 5, 10):
        d = generator.normal(0.4, 1, n)
        means = [abs(np.dot(signs, d)) for signs in itertools.product((1, -1), repeat=n)]
        enumerated = np.mean([mean >= abs(d.sum()) - 1e-9 for mean in means])
        assert sign_flips([*d, 0, 0]) == pytest.approx(enumerated)  # what does not differ says nothing
    d = generator.normal(0.4, 1, 14)
    signs = 1 - 2 * (np.arange(2**14)[:, None] >> np.arange(14) & 1)
    exact = np.mean(np.abs(signs @ d) >= abs(d.sum()))
    assert sign_flips(d) == pytest.approx(exact, abs=4 * np.sqrt(exact / 10000))
    assert sign_flips([0, 0]) == 1 and sign_flips([3.0] * 500) == pytest.approx(1 / 10001)


def test_something_differs_if_the_corrected_p_is_small_and_the_interval_leaves_zero_out():
    assert differs(0.01, [0.1, 0.3]) and differs(0.01, [-0.3, -0.1])
    assert not differs(0.05, [0.1, 0.3]) and not differs(0.01, [0.0, 0.3]) and not differs(0.01, [-0.1, 0.1])


def test_the_family_is_all_accuracies_and_all_lengths_of_a_table():
    rows = [{"accuracy_p": p, "accuracy_ci95": [0.1, 0.2], "tokens_p": q, "tokens_ci95": [1, 2]}
            for p, q in ((0.01, 0.02), (0.03, 0.9))]
    judge(rows)
    assert [row["accuracy_holm"] for row in rows] == pytest.approx([0.04, 0.06])
    assert [row["tokens_holm"] for row in rows] == pytest.approx([0.06, 0.9])
    assert [row["accuracy_differs"] for row in rows] == [True, False]
    assert [display.what_differs(row) for row in rows] == ["accuracy, not tokens", "nothing"]


# ---------------------------------------------------------------- seeds and stories
def trial(generator, n_seeds, n_stories, spread):
    """Right and wrong, (S, N), of seeds that differ and stories that are harder for all of them."""
    story = generator.normal(0, 1, n_stories)
    seed = generator.normal(0, spread, (n_seeds, 1))
    return (generator.random((n_seeds, n_stories)) < 1 / (1 + np.exp(-1 - story - seed))).astype(float)


@pytest.mark.parametrize("n_seeds, spread, low, high", [
    (1, 0.0, 0.88, 1.0), (1, 1.0, 0.0, 0.5), (3, 0.0, 0.95, 1.0), (3, 0.3, 0.88, 1.0), (3, 1.0, 0.7, 0.92),
    (10, 0.3, 0.88, 1.0)])
def test_how_often_the_interval_holds_the_truth(n_seeds, spread, low, high):
    """95 of 100 and more, but for one seed where seeds differ (it knows nothing of that), and for three that
    differ much more than chance."""
    generator = np.random.default_rng(0)
    z = generator.normal(0, np.sqrt(1 + spread**2), 200000)
    truth = np.mean(1 / (1 + np.exp(-1 - z)))
    held = 0
    for i in range(100):
        draws, = stats.drawn_means([trial(generator, n_seeds, 100, spread)], i, 500)
        ends = stats.middle(draws)
        held += ends[0] <= truth <= ends[1]
    assert low <= held / 100 <= high


def test_with_one_seed_the_interval_is_the_bootstrap_over_stories():
    array = trial(np.random.default_rng(1), 1, 200, 0.0)
    assert stats.interval(array) == pytest.approx(bootstrap(array[0]), abs=0.01)


def test_an_interval_does_not_collapse_where_all_is_right_or_wrong():
    right, one_wrong = np.ones((3, 500)), np.ones((3, 500))
    one_wrong[2, 0] = 0
    assert stats.interval(right) == pytest.approx([wilson(1.0, 500)[0], 1.0])
    assert stats.interval(one_wrong)[0] < stats.interval(right)[0]  # a worse result has no narrower one
    assert stats.interval(np.zeros((3, 100))) == pytest.approx([0.0, 0.037], abs=1e-3)
    perfect = method(1.0, 9, n=100, noise=0.0)
    got = stats.compare(perfect, perfect)
    assert got["accuracy_ci95"] == pytest.approx([-0.037, 0.037], abs=1e-3) and got["tokens_ci95"] == [0, 0]


# ---------------------------------------------------------------- methods
def method(right, tokens, n_seeds=3, n=200, seed=0, noise=4.0):
    """{seed: row} of a method that is right so often, in about so many tokens."""
    generator = np.random.default_rng(seed)
    rows = {}
    for s in range(n_seeds):
        score = (generator.random(n) < right).astype(float).tolist()
        length = (tokens + noise * generator.normal(size=n)).tolist()
        rows[s] = {"per_example": {"score": score, "tokens": length}, "accuracy": sum(score) / n}
    return rows


METHODS = {
    "base, explicit reasoning": method(0.7, 100.0, seed=1),
    "RL without latents": method(0.97, 80.0, seed=2),
    "LiteReason": method(0.97, 20.0, seed=3),
    "RL with tags, no latents": method(0.97, 20.0, seed=4),
    "control plain": method(0.97, 20.0, seed=3),
    "control latents: shuffled": method(0.5, 20.0, seed=5),
    "control latents: noise": method(0.97, 40.0, seed=6),
    "control latents: mean": method(0.96, 21.0, seed=7)}


def test_two_methods_are_compared_over_the_seeds_and_stories_that_both_have():
    ours, theirs = METHODS["LiteReason"], METHODS["RL without latents"]
    got = stats.compare({**ours, 7: ours[0]}, theirs)
    assert got["seeds"] == [0, 1, 2] and got["tokens"] == pytest.approx(-60, abs=1)
    assert got["tokens_saved"] == pytest.approx(0.75, abs=0.01)
    assert got["tokens_saved_ci95"][0] < got["tokens_saved"] < got["tokens_saved_ci95"][1]
    assert got["tokens_p"] < 1e-3 and got["accuracy_ci95"][0] < 0 < got["accuracy_ci95"][1]


def test_a_pair_that_shares_its_mistakes_has_the_narrower_interval():
    ours = method(0.7, 20.0)
    worse = {}
    for seed, row in ours.items():  # the same but for every 20th story
        score = [0.0 if i % 20 == 0 else x for i, x in enumerate(row["per_example"]["score"])]
        worse[seed] = {"per_example": {**row["per_example"], "score": score}}
    paired, alone = stats.compare(ours, worse), stats.compare(ours, method(0.665, 20.0, seed=9))
    assert np.ptp(paired["accuracy_ci95"]) < 0.6 * np.ptp(alone["accuracy_ci95"])
    assert paired["accuracy_ci95"][0] > 0 and paired["tokens_p"] == 1 and paired["tokens_ci95"] == [0, 0]


def test_each_claim_is_met_or_not_by_its_criterion_and_the_table_says_so():
    found = {own["claim"]: own for own in stats.claims(METHODS)}
    met = {claim: own["met"] for claim, own in found.items()}
    assert met == {
        "LiteReason keeps RL's gain": met["LiteReason keeps RL's gain"],
        "LiteReason is shorter than the base": "met",
        "LiteReason is shorter than RL": "met",
        "LiteReason beats RL with tags: fewer tokens at equal accuracy": met[
            "LiteReason beats RL with tags: fewer tokens at equal accuracy"],
        "latents matter: shuffled latents in their place cost 10 points or 30 % more tokens": "met",
        "latents matter: noise in their place cost 10 points or 30 % more tokens": "met",
        "latents matter: the mean latent in their place cost 10 points or 30 % more tokens": "not met"}
    assert met["LiteReason beats RL with tags: fewer tokens at equal accuracy"] != "met"  # they are alike
    test, = found["LiteReason is shorter than the base"]["tests"]
    assert test["value"] == pytest.approx(0.8, abs=0.01) and test["ci95"][0] > 0.77
    text = stats.claims_table(list(found.values()), "greedy")
    assert "tokens saved over 77 % | **met** |" in text and "accuracy gained over 10 points or" in text


@pytest.mark.parametrize("ours, says", [(0.99, "met"), (0.8, "not met")])
def test_the_gain_kept_is_a_share_of_rls_gain(ours, says):
    arrays = {"base": method(0.5, 9, seed=1, n=800), "rl": method(0.97, 9, seed=2, n=800),
              "ours": method(ours, 9, seed=3, n=800)}
    test = stats.measure(arrays, "gain kept", ("ours", "rl", "base"), 0.95)
    assert test["value"] == pytest.approx((ours - 0.5) / 0.47, abs=0.05) and test["met"] == says
    none = stats.measure(arrays, "gain kept", ("ours", "base", "base"), 0.95)  # of no gain
    assert none["met"] == "not met" and stats.in_its_unit(none) == "gain kept: there is none"


def test_only_pairs_of_which_both_are_there_are_compared_and_judged_together():
    found = stats.differences(METHODS)
    pairs = [(own["ours"], own["theirs"]) for own in found]
    assert pairs == [pair for pair in stats.PAIRS if set(pair) <= set(METHODS)] and len(pairs) == 4
    by_pair = {own["theirs"]: display.what_differs(own) for own in found if own["ours"] == "LiteReason"}
    assert by_pair["base, explicit reasoning"] == "accuracy and tokens"
    assert by_pair["RL without latents"] == "tokens, not accuracy"
    table = stats.differences_table(found, "greedy")
    assert len(table.splitlines()) == 2 + len(pairs) and "| compared with, greedy |" in table
