"""The tiny world, task 1 of 2: is there a plot hole? (the shape of Flawed Fictions, paper Sec. 4)

In act one eight people put things somewhere, in act two, in another order, they fetch them again. `attic`
is where `upstairs` is, and so on. In half of the stories one thing, and only one, is fetched from a place
where it was not put. A reader asks about one thing: the wrong one, or any if all is well. The answer says
whether the story holds an error.

    Karl hides upstairs cup . Mara leaves outside key . .. Mara finds ship key . .. Karl gets attic cup . ..

Every word is one token, so a reader can count. A story's split is a function of its text (`split_of`),
hence no story can be in two splits, and the base model in `base/` was trained on the train part only."""
import random

# split_of, answer and reward are parts of the task.
from data.worlds import OFFER, SEEDS, answer, check_split, collect, reward, split_of  # noqa: F401

PEOPLE = "Karl Mara Otto Lena Tess Ivan Rosa Emil Nina Hugo".split()
THINGS = "cup ring key book lamp drum rope coin flute map".split()
PUT = "upstairs outside indoors underground backstage ashore aboard uphill".split()
FOUND = "attic garden parlour cellar theatre beach ship summit".split()
NAMES = dict(zip(PUT, FOUND))  # the same place in act one and in act two
HIDE = "hides leaves puts".split()
FETCH = "finds gets takes".split()
SIZES = {"train": 480, "val": 200, "test": 500}


def make_story(rng, errors, things=8):
    """One story of 2 * things events with so many errors and, for the trace writer of prepare.py, what a
    careful reader notes.

    Returns {story, label, steps, asked}: steps are (thing, place in act one, place in act two).
    """
    people = rng.sample(PEOPLE, things)
    things = rng.sample(THINGS, things)
    misplaced = rng.sample(things, errors)
    put = {thing: rng.choice(PUT) for thing in things}
    found = {}
    for thing in things:
        place = put[thing]
        if thing in misplaced:
            place = rng.choice([other for other in PUT if other != place])
        found[thing] = NAMES[place]
    cast = list(zip(people, things))
    act_one = [f"{person} {rng.choice(HIDE)} {put[thing]} {thing} ." for person, thing in cast]
    order = rng.sample(cast, len(cast))
    act_two = [f"{person} {rng.choice(FETCH)} {found[thing]} {thing} ." for person, thing in order]
    return {
        "story": " ".join(act_one + act_two),
        "label": errors > 0,
        "steps": [(thing, put[thing], found[thing]) for thing in things],
        "asked": rng.choice(misplaced or things),
    }


def examples(split):
    """The split's stories, the same on every machine: a list of dicts, exactly half with an error."""
    check_split("tiny", split, SIZES)
    rng = random.Random(SEEDS[split])
    return collect(split, SIZES[split], lambda number: make_story(rng, errors=number % 2))


def prompt(example, latent):
    """The story and the question; with `latent`, the offer of the tag (the paper's prompt in this world's
    words)."""
    offer = OFFER if latent else ""
    question = f"find the hole . reader asks about {example['asked']}"
    return f"{example['story']} task : {question} . think aloud{offer} . answer :"
