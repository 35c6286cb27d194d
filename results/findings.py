"""What the README says of the tiny world and of the GPU, in words and small tables, from the numbers that
reproduce.py has written into this directory: nothing here is typed by hand.

found: {method: its means over seeds}, reproduce.summary; controls: {control: its rows and comparison},
reproduce.controls_summary; lengths: rows of reproduce.lengths_of; latents: reproduce.latents_of; compared:
{sampling: {"differences", "claims"}}, reproduce.write_evidence.
"""
import textwrap

from results import evidence
from results import latents as latents_table

BASE, RL = "base, explicit reasoning", "RL without latents"
OURS, WORDS = "LiteReason + length penalty", "RL with tags + length penalty"
RECIPE, UNPENALISED = "the paper's recipe + length penalty", "the paper's recipe"
FROZEN = "base frozen + length penalty"
FREE = "LiteReason"  # without a penalty
ADRIFT, PENALISED = "no anchor + length penalty", "RL + length penalty"
AFTER, TAGS_AFTER = evidence.AFTER_RL, "RL with tags after RL + length penalty"
CLEAN = "no noise + length penalty"
LONGER, WRITTEN = "stage 2 twice as long + length penalty", "RL with tags + length penalty, after stage 2"
HEADLINE = [BASE, RL, OURS, WORDS, RECIPE]  # in the first table, and in the picture of scores against tokens
OTHERS = "latents: shuffled"  # the control in which each story gets another one's latents
REPLACED = {OTHERS: "another story's latents", "latents: mean": "the mean latent", "latents: noise": "noise",
            "latents: none": "none"}


def headline(found, controls, sampled):
    """The README's first table: the claim, and beside it the rows that it has to be read with. sampled: how
    the answers were, in words."""
    lines = [f"| plot holes, tiny world, {sampled} | accuracy | tokens |", "|---|---|---|"]
    for name in HEADLINE:
        if name not in found:
            continue
        shown = name if found[name]["runs"] > 1 else f"{name} (one seed)"
        lines.append(f"| {shown} | {found[name]['accuracy']:.3f} | {found[name]['tokens']:.1f} |")
        if name == OURS and OTHERS in controls:
            accuracy = mean_of_seeds(controls[OTHERS], "accuracy")
            tokens = mean_of_seeds(controls[OTHERS], "tokens")
            lines.append(f"| .. with another story's latents | {accuracy:.3f} | {tokens:.1f} |")
    return "\n".join(lines)


def findings(found, controls, lengths=(), latents=None, compared=None):
    """The README's list. A finding of which a run is missing is left out."""
    nothing = {"differences": [], "claims": []}
    at_papers, at_one = ((compared or {}).get(kind, nothing) for kind in ("paper", "trained"))
    told = [
        score_and_length(found, at_papers["claims"], at_one["claims"]),
        whether_latents_matter(controls),
        what_latents_say(latents or {}),
        against_words(found, at_papers["differences"]),
        begun_after_rl(found, at_papers["claims"]),
        over_lengths(lengths),
        the_papers_recipe(found),
        what_the_parts_are_worth(at_papers["differences"], at_one["differences"]),
        what_is_met(at_papers["claims"], at_one["claims"])]
    lines = [textwrap.fill(f"- {finding}", 110, subsequent_indent="  ") for finding in told if finding]
    return "\n".join(lines)


def mean_of_seeds(control, key):
    values = [row[key] for row in control["by_seed"]]
    return sum(values) / len(values)


def score(row):
    return f"{row['accuracy']:.3f} in {row['tokens']:.1f} tokens"


def over_seeds(row):
    return "one seed" if row["runs"] == 1 else f"mean of {row['runs']} seeds"


def saved(row, against):
    """Tokens, in percent."""
    return 100 * (1 - row["tokens"] / against["tokens"])


# ============================================================ one finding each
def score_and_length(found, claims, at_one):
    """claims: at the paper's sampling; at_one: at temperature 1."""
    if not {OURS, RL, BASE} <= set(found):
        return ""
    ours, rl, base = found[OURS], found[RL], found[BASE]
    kept, hotter = gain_kept_in(claims, OURS), gain_kept_in(at_one, OURS)
    also = f", at temperature 1 {hotter}" if hotter else ""
    kept = f" Of RL's gain it keeps {kept}{also}." if kept else ""
    free = ""
    if FREE in found:
        free = f" Without the penalty LiteReason is right on {score(found[FREE])}."
    return (f"**Score and length.** Under a length penalty LiteReason is right on {score(ours)} "
            f"({over_seeds(ours)}), the base on {score(base)}, RL without latents, which has no penalty, on "
            f"{score(rl)}: {saved(ours, base):.0f} % fewer tokens than the base, {saved(ours, rl):.0f} % "
            f"fewer than RL.{kept}{free}")


def gain_kept_in(claims, ours):
    """With its interval; "" if no claim is about it."""
    for claim in claims:
        if claim["claim"] == f"{ours} keeps RL's gain":
            return evidence.in_its_unit(claim["tests"][0]).removeprefix("gain kept ")
    return ""


def whether_latents_matter(controls):
    if OTHERS not in controls:
        return ""
    scores = []
    for control, words in REPLACED.items():
        if controls.get(control, {}).get("by_seed"):
            scores.append(f"{mean_of_seeds(controls[control], 'accuracy'):.3f} with {words}")
    test = controls[OTHERS]["against_plain"]
    low, high = test["accuracy_ci95"]
    interval = evidence.in_words([-100 * high, -100 * low], ".1f")
    return (f"**The latents matter.** The same policies are right on {', '.join(scores)}. Another story's "
            f"latents cost {-100 * test['accuracy']:.1f} points (95 % interval {interval}, Holm's p "
            f"{test['accuracy_holm']:.1g}) and {test['tokens']:+.1f} tokens.")


def what_latents_say(latents):
    if OURS not in latents:
        return ""
    without = ""
    if ADRIFT in latents:
        ours, adrift = (in_total(latents[name], "last_lost") for name in (OURS, ADRIFT))
        ours_wrong, adrift_wrong = (wrong_names(latents[name]) for name in (OURS, ADRIFT))
        without = (f" Of the last latents in stories with a hole, {ours} do, and {adrift} without the "
                   f"anchor; there {adrift_wrong} wrong answers end on a latent with other names, with it "
                   f"{ours_wrong}.")
    share = in_total(latents[OURS], "all")
    return (f"**What they say.** {share} of the latents are nearest to the two names of their own round, "
            f"added up (`python results/latents.py --model RUN`).{without}")


def in_total(rows, key):
    return latents_table.share(latents_table.total(rows, key))


def wrong_names(rows):
    n_wrong, n_named = latents_table.total(rows, "wrong")
    return f"{n_wrong - n_named} of {n_wrong}"


def against_words(found, differences):
    if not {OURS, WORDS} <= set(found):
        return ""
    gap = f"{100 * (found[OURS]['accuracy'] - found[WORDS]['accuracy']):+.1f} points"
    for own in differences:
        if (own["ours"], own["theirs"]) == (OURS, WORDS):
            gap = worth(own)
    skipped = ""
    if PENALISED in found:
        skipped = f", and RL without tags no reasoning at all: {score(found[PENALISED])}"
    matched = ""
    if WRITTEN in found:
        matched = (f" RL with tags that begins where LiteReason does, after stages 1 and 2: "
                   f"{score(found[WRITTEN])}.")
    return ("**Latents against words.** Under the same penalty RL with tags that run no latents learns to "
            f"write shorthand: {score(found[WORDS])}{skipped}. Latents take "
            f"{saved(found[OURS], found[WORDS]):.0f} % fewer tokens than shorthand, at {gap}.{matched}")


def begun_after_rl(found, claims):
    if AFTER not in found:
        return ""
    kept = gain_kept_in(claims, AFTER)
    beside = f", gain kept {kept}" if kept else ""
    others, words = "", ""
    with_others = found.get(f"{AFTER}, {REPLACED[OTHERS]}")
    if with_others:
        others = f"; with another story's latents at {score(with_others)}"
    if TAGS_AFTER in found:
        words = f" RL with tags from the same model: {score(found[TAGS_AFTER])}."
    return ("**Begun after RL.** The base's own right traces are often right for a wrong reason, those of RL "
            "without latents are not. With stages 1 to 3 on that model, whose cost comes on top, LiteReason "
            f"ends at {score(found[AFTER])} ({over_seeds(found[AFTER])}{beside}){others}.{words}")


def over_lengths(lengths):
    parts = []
    for name, short in ((OURS, "LiteReason"), (WORDS, "RL with tags"), (RL, "RL without latents")):
        own = sorted((row for row in lengths if row["method"] == name), key=lambda row: row["length"])
        if own:
            last = f"{own[-1]['accuracy']:.3f} in {own[-1]['tokens']:.1f}"
            parts.append(f"{short} {score(own[0])} to {last}")
    if not parts:
        return ""
    hops = sorted(row["length"] for row in lengths)
    return f"**Longer chains** ({hops[0]} to {hops[-1]} hand-overs): {'; '.join(parts)}."


def the_papers_recipe(found):
    if RECIPE not in found:
        return ""
    beside = ""
    if FROZEN in found:
        beside = ("; with targets for the latents in stage 2 and in RL, the traces, masks and learning rate "
                  "that go with them, and no refresh, base frozen in stage 2 all the same, at "
                  f"{score(found[FROZEN])} ({over_seeds(found[FROZEN])})")
    unpenalised = ""
    if UNPENALISED in found:
        row = found[UNPENALISED]
        unpenalised = (f"; without a length penalty at {score(row)}, {row['latent_steps']:.1f} of them "
                       f"latents ({over_seeds(row)})")
    return (f"**The paper's own recipe** ends at {score(found[RECIPE])} here ({over_seeds(found[RECIPE])})"
            f"{unpenalised}{beside}. That is a finding about a model of two layers that knows nothing but "
            "this world, not about the paper's.")


def what_the_parts_are_worth(differences, at_one):
    """at_one: the differences at temperature 1."""
    ours_against, hotter = ({own["theirs"]: own for own in some if own["ours"] == OURS}
                            for some in (differences, at_one))
    parts = []
    for without, words in ((ADRIFT, "the anchor in RL"), (FROZEN, "a base that learns in stage 2 too"),
                           (CLEAN, "noise on what stage 2 feeds")):
        if without in ours_against:
            also = f", at temperature 1 {in_points(hotter[without])}" if without in hotter else ""
            parts.append(f"{words} {worth(ours_against[without])}{also}")
    if not parts:
        return ""
    longer = ""
    if LONGER in ours_against:
        longer = (" Against the same with twice the steps in stage 2 LiteReason has "
                  f"{worth(ours_against[LONGER])}.")
    return f"**What the other parts are worth**, each left out alone: {'; '.join(parts)}.{longer}"


def worth(difference):
    """In accuracy."""
    interval = evidence.in_words([100 * end for end in difference["accuracy_ci95"]], "+.1f")
    one_seed = ", one seed" if len(difference["seeds"]) == 1 else ""
    return (f"{100 * difference['accuracy']:+.1f} points (95 % interval {interval}, Holm's p "
            f"{difference['accuracy_holm']:.1g}{one_seed})")


def in_points(difference):
    """The same in short."""
    interval = evidence.in_words([100 * end for end in difference["accuracy_ci95"]], "+.1f")
    return f"{100 * difference['accuracy']:+.1f} ({interval})"


def met_of(claims):
    """How many are, in words."""
    return f"{sum(claim['met'] == 'met' for claim in claims)} of {len(claims)}"


def what_is_met(claims, at_one):
    """claims: at the paper's sampling; at_one: at temperature 1."""
    if not claims:
        return ""
    before = [claim for claim in claims if claim["set_before_the_runs"]]
    later = ""
    if len(before) < len(claims):
        later = (f" Of those set before the runs {met_of(before)} are; the others, on the rows after RL, "
                 "were added when these had been run.")
    hotter = f"; at temperature 1 {met_of(at_one)}" if at_one else ""
    rest = []
    for claim in claims:
        if claim["met"] != "met":
            measured = " and ".join(evidence.in_its_unit(test) for test in claim["tests"])
            rest.append(f"\"{claim['claim']}\" is {claim['met']} ({measured})")
    others = f" Not met ({FREE} alone is without the penalty): {'; '.join(rest)}." if rest else ""
    return ("**What would have refuted this.** Each claim has a criterion, and is met if its whole 95 % "
            f"interval is beyond it: {met_of(claims)} are{hotter}.{later}{others}")


# ============================================================ the second task
def next_chapters(found, controls):
    """The README's paragraph about it; "" where a run is missing."""
    if not {OURS, RL, BASE, WORDS} <= set(found):
        return ""
    parts = [f"{words} {reward_of(found[name])}"
             for name, words in ((OURS, "under the length penalty LiteReason"), (WORDS, "RL with tags"),
                                 (RL, "without it RL without latents"), (BASE, "the base"))]
    with_others = ""
    if OTHERS in controls:
        reward = mean_of_seeds(controls[OTHERS], "accuracy")
        with_others = f" With another story's latents LiteReason earns {reward:.0f}."
    text = ("- **Next chapters**, the second task, where a plan earns by how much easier a frozen reader "
            "finds the true chapter, and half of how much harder another story's "
            f"({over_seeds(found[OURS])}): {'; '.join(parts)}.{with_others}")
    return textwrap.fill(text, 110, subsequent_indent="  ")


def reward_of(row):
    return f"earns {row['accuracy']:.0f} % in {row['tokens']:.1f} tokens"


# ============================================================ the GPU
def gpu_table(measured):
    """measured: gpu.json, which tests/bench_gpu.py writes -> Markdown."""
    decoding, step = measured["f"], measured["g"]
    hours = [f"{step['hours_of_the_papers_run'][slots]:.1f}" for slots in ("256", "115", "34")]
    rows = [
        ("a decoding step of 128 rows (8 prompts of 1,024 tokens), one kernel after the other",
         f"{decoding['ms_per_step']:.1f} ms"),
        ("the same, recorded as a CUDA graph", f"{decoding['ms_per_step_graphs']:.1f} ms"),
        (f"weights and cache read once, at {decoding['bandwidth_GB_s']:,.0f} GB/s",
         f"{decoding['floor_ms']:.1f} ms"),
        ("tokens a second, recorded", f"{decoding['tokens_per_s']:,.0f}"),
        ("tokens a second, transformers' `generate` in bf16",
         f"{decoding['tokens_per_s_transformers']:,.0f}"),
        ("a GRPO step of 48 prompts x 16 answers, 1,024 + 256 slots: sampling, recorded",
         f"{step['sample_s']:.1f} s"),
        ("its update (share of the card's peak)",
         f"{step['update_s']:.1f} s ({100 * step['utilisation']:.0f} %)"),
        ("its optimiser step", f"{step['step_s']:.1f} s"),
        ("peak of sampling, without AdamW", f"{step['sample_GiB']:.1f} GiB"),
        ("peak of the update, without AdamW", f"{step['update_GiB']:.1f} GiB"),
        ("hours of the paper's plot-hole run at 256, 115 or 34 slots an answer", ", ".join(hours))]
    lines = [f"| {measured['device']} | |", "|---|---|"]
    lines += [f"| {what} | {value} |" for what, value in rows]
    return "\n".join(lines)
