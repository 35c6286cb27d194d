"""The tiny world, task 2 of 2: plan the next chapter (the shape of the paper's NCP task, Sec. 4).

The story tells who hid which thing where and who wants which thing. The next chapter is then a matter of
course: everybody goes where the wanted thing is, under the place's other name (`attic` is where `upstairs`
is).

    Karl hides upstairs cup . .. cup tempts Mara . ..        next chapter: Mara goes attic and finds cup . ..

The policy writes a plan after "In summary :"; a frozen copy of the base model reads the TRUE next chapter
with and without it, and the reward is how much easier the plan made the reading."""
from data import worlds
from data.tiny import HIDE, NAMES, PEOPLE, PUT, THINGS
from data.worlds import OFFER, chapter_prompt, plan_of  # noqa: F401, parts of the task

SIZES = {"train": 480, "val": 100, "test": 200}
MEASURE = "reward"  # what a score of this task is called
ANSWER = worlds.PLAN


def make_story(rng):
    """Five things hidden, three wanted. Returns {story, wants: [(person, thing, place)], chapter}."""
    hiders = rng.sample(PEOPLE, 5)
    things = rng.sample(THINGS, 5)
    place = {thing: rng.choice(PUT) for thing in things}
    cast = zip(hiders, things)
    act_one = [f"{person} {rng.choice(HIDE)} {place[thing]} {thing} ." for person, thing in cast]
    tempted = zip(rng.sample(hiders, 3), rng.sample(things, 3))
    wants = [(person, thing, place[thing]) for person, thing in tempted]
    act_two = [f"{thing} tempts {person} ." for person, thing, _ in wants]
    return {"story": " ".join(act_one + act_two), "wants": wants, "chapter": chapter(wants)}


def chapter(wants):
    """The next chapter, if those who want things go to these places."""
    return " ".join(f"{person} goes {NAMES[place]} and finds {thing} ." for person, thing, place in wants)


def examples(split):
    """The split's stories, as worlds.chapters says."""
    return worlds.chapters("tiny.next_chapter", split, SIZES, make_story)


def prompt(example, latent):
    """The story and the task; with `latent`, the offer of the tag."""
    offer = OFFER if latent else ""
    return f"{example['story']} task : plan the next chapter . think aloud{offer} . answer :"


def gold_plan(example):
    """The plan that says what the true chapter tells."""
    return " , ".join(f"{person} {NAMES[place]}" for person, _, place in example["wants"]) + " ."


def scorer():
    """The frozen copy of this world's base that reads chapters: (model, tokenizer)."""
    return worlds.scorer("tiny")


def rewards(examples, completions):
    """See worlds.plan_rewards."""
    return worlds.plan_rewards("tiny", examples, completions)


def reward(example, completion):
    """The same for one completion."""
    return rewards([example], [completion])[0]
