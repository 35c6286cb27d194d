"""The serial world, task 2 of 2: plan the next chapter (the shape of the paper's NCP task, Sec. 4).

The same torn map, but no one is named who acts on it: the three chains end with three people. The next chapter is
then a matter of course: those who have the two halves in the end put them together.

    from Mara Otto has it . ..       next chapter: Lena brings a half and Finn brings a half .

The policy writes a plan after "In summary :"; a frozen copy of the base model reads the TRUE next chapter
with and without it, and the reward is how much easier the plan made the reading."""
from data import worlds
from data.serial import HOPS, PEOPLE, events_of
from data.worlds import OFFER, chapter_prompt, plan_of  # noqa: F401, parts of the task

SIZES = {"train": 480, "val": 100, "test": 200}
MEASURE = "reward"  # what a score of this task is called
ANSWER = worlds.PLAN


def make_story(rng, hops=HOPS):
    """One story of three chains. Returns {story, first, chains, chapter}, as in the first task."""
    people = rng.sample(PEOPLE, 3 * hops + 3)
    chains = [people[i * (hops + 1) : (i + 1) * (hops + 1)] for i in range(3)]
    return {
        "story": events_of(rng, chains),
        "first": [chain[0] for chain in chains[:2]],
        "chains": chains[:2],
        "chapter": chapter([chain[-1] for chain in chains[:2]])}


def chapter(holders):
    """The next chapter, if these two have the halves."""
    return " and ".join(f"{person} brings a half" for person in holders) + " ."


def examples(split):
    """The split's stories, as worlds.chapters says."""
    return worlds.chapters("serial.next_chapter", split, SIZES, make_story)


def prompt(example, latent):
    """The story and the task; with `latent`, the offer of the tag."""
    offer = OFFER if latent else ""
    task = f"task : plan the next chapter . think aloud{offer} ."
    return f"{example['story']} {task} the halves start with {' and '.join(example['first'])} :"


def gold_plan(example):
    """The plan that says what the true chapter tells."""
    return " and ".join(chain[-1] for chain in example["chains"]) + " ."


def scorer():
    """The frozen copy of this world's base that reads chapters: (model, tokenizer)."""
    return worlds.scorer("serial")


def rewards(examples, completions):
    """See worlds.plan_rewards."""
    return worlds.plan_rewards("serial", examples, completions)


def reward(example, completion):
    """The same for one completion."""
    return rewards([example], [completion])[0]
