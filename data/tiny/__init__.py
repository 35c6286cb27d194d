"""The tiny world, task 1 of 2: is there a plot hole? (the shape of Flawed Fictions, paper Sec. 4)

People hide things in places (act one) and fetch them again (act two). In half of the stories one person, and
only one, fetches a thing from a place where it was never put. The reader says which stories hold such an error.

    upstairs Karl hides cup . outside Mara leaves key . ... Mara finds garden key . Karl gets ship cup .

Every word is one token, so a reader can count. A story's split is a function of its text (`split_of`), hence no
story can be in two splits, and the base model in `base/` was trained on the train part only.

A task is three functions: examples(split), prompt(example, latent), reward(example, completion).
"""
import random
import zlib

from litereason import boxed

PEOPLE = "Karl Mara Otto Lena Tess Ivan Rosa Emil Nina Hugo".split()
THINGS = "cup ring key book lamp drum rope coin flute map".split()
# A place has two names: act one says where a thing is put, act two in which place it is found.
PUT = "upstairs outside indoors underground backstage ashore aboard uphill downtown overseas".split()
FOUND = "attic garden parlour cellar theatre beach ship summit market island".split()
HIDE = "hides leaves puts".split()
FETCH = "finds gets takes".split()
SIZES = {"train": 480, "val": 200, "test": 500}
SEEDS = {"train": 1, "val": 2, "test": 3}


def split_of(story):
    """Train, val or test by the story's own text: 80 / 10 / 10 %."""
    bucket = zlib.crc32(story.encode()) % 10
    return "test" if bucket == 0 else "val" if bucket == 1 else "train"


def make_story(rng, errors):
    """One story of 10 events with 0 to 5 errors and, for the trace writer of prepare.py, what a careful reader would note.

    Returns {story, label, steps, culprit (the first, or None)}: steps is a list of (person, thing, place in act one, place in act two).
    """
    people, things = rng.sample(PEOPLE, 5), rng.sample(THINGS, 5)
    hidden = {p: (t, rng.choice(PUT)) for p, t in zip(people, things)}
    verb = {p: rng.choice(HIDE) for p in people}
    culprits = rng.sample(people, errors)
    act_one = [f"{place} {p} {verb[p]} {t} ." for p, (t, place) in hidden.items()]
    steps, events = [], []
    for p in people:
        thing, before = hidden[p]
        now = FOUND[PUT.index(rng.choice([q for q in PUT if q != before]) if p in culprits else before)]
        steps.append((p, thing, before, now))
        events.append(f"{p} {rng.choice(FETCH)} {now} {thing} .")
    return {"story": " ".join(act_one + events), "label": errors > 0, "steps": steps,
            "culprit": next((p for p, *_ in steps if p in culprits), None)}


def examples(split):
    """The split's stories, the same on every machine: a list of dicts, exactly half with an error."""
    if split not in SIZES:
        raise ValueError(f"the tiny task has the splits {', '.join(SIZES)}, not {split!r}")
    rng, rows, seen = random.Random(SEEDS[split]), [], set()
    while len(rows) < SIZES[split]:
        row = make_story(rng, len(rows) % 2)
        if split_of(row["story"]) == split and row["story"] not in seen:
            seen.add(row["story"])
            rows.append(row)
    return rows


def prompt(example, latent):
    """The story and the question; with `latent`, the offer of the tag (the paper's prompt in this world's words)."""
    offer = " or skip with <implicit_thought> number </implicit_thought>" if latent else ""
    return f"{example['story']} task : find the hole . think aloud{offer} . answer :"


def answer(example):
    """The gold answer, in exactly the format that `reward` parses (the refresh trains on it)."""
    return "\\boxed{ Yes }" if example["label"] else "\\boxed{ No }"


def reward(example, completion):
    """1.0 if the last box of the completion is the right word, else 0.0 (method.md section 7)."""
    found = (boxed(completion) or "").strip().lower()
    return float(found == ("yes" if example["label"] else "no"))
