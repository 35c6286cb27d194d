"""The tiny world, task 2 of 2: plan the next chapter (the shape of the paper's NCP task, Sec. 4).

The same torn map, but no one is named who acts on it: the three chains end with three people. The next
chapter is then a matter of course: those who have the two halves in the end put them together.

    from Mara Otto has it . ..       next chapter: Lena brings a half and Finn brings a half .

The policy writes a plan after "In summary :"; the frozen base reads the TRUE next chapter with and without
it, and the reward is how much easier the plan made it. Both people do the same, so the chapter is read both
ways round and the easier one counts: who of them is named first says nothing."""
import functools
import random

from data import improvement, perplexity
from data.tiny import OFFER, PEOPLE, SEEDS, collect, events_of, length_of
from litereason import load, parse_tags

SIZES = {"train": 6000, "val": 100, "test": 200}
MEASURE = "reward"  # what a score of this task is called
PENALTY = 400.0  # the most that the length penalty takes; a right plan earns about 200, a wrong one -190
LEAST_GAIN = -500.0  # a muddled plan can make a chapter a thousand times harder; six times is enough
ANSWER = "In summary :"  # what follows is the plan, the only part that the scorer reads


# ============================================================ stories
def make_story(rng, hops):
    """One story of three chains -> {story, first, chains, chapter}, as in the first task."""
    people = rng.sample(PEOPLE, 3 * hops + 3)
    chains = [people[i * (hops + 1) : (i + 1) * (hops + 1)] for i in range(3)]
    halves = chains[:2]
    return {"story": events_of(rng, chains), "first": [chain[0] for chain in halves], "chains": halves,
            "chapter": chapter([chain[-1] for chain in halves])}


def chapter(holders):  # if these two have the halves
    return " and ".join(f"{person} brings a half" for person in holders) + " ."


def examples(split):
    """The split's stories; each carries `other`, the chapter of another story, for the contrastive reward.

    The paper draws it again at every step; a fixed one makes the reward a function."""
    rng = random.Random(100 + SEEDS[split])
    rows = collect(split, SIZES[split], lambda number: make_story(rng, length_of(number)))
    for row, following in zip(rows, rows[1:] + rows[:1]):
        row["other"] = following["chapter"]
    return rows


def prompt(example, latent):
    """The story and the task; with `latent`, the offer of the tag."""
    task = f"task : plan the next chapter . think aloud{OFFER if latent else ''} ."
    return f"{example['story']} {task} the halves start with {' and '.join(example['first'])} :"


def gold_plan(example):  # it says what the true chapter tells
    return " and ".join(chain[-1] for chain in example["chains"]) + " ."


# ============================================================ the reward
def plan_of(completion):
    """The text after the last "In summary :", without tags and without the words that would end the
    scorer's prompt."""
    plan = completion.rpartition(ANSWER)[2] if ANSWER in completion else ""
    for start, end, _ in reversed(parse_tags(plan)):
        plan = plan[:start] + plan[end:]
    structure = ("chapter", "plan", "task", ":", "<|endoftext|>")
    return " ".join(word for word in plan.split() if word not in structure)


def chapter_prompt(example, plan):
    """What the frozen scorer reads before the chapter: the story, then the plan if there is one."""
    return f"{example['story']} plan : {plan} chapter :" if plan else f"{example['story']} chapter :"


@functools.cache
def scorer():
    """The shipped base, whatever the policy is, frozen: it reads chapters -> (model, tokenizer)."""
    return load("tiny")


def other_way_round(chapter):  # with the other person first
    first, second = chapter.removesuffix(" .").split(" and ")
    return f"{second} and {first} ."


def readings(contexts, chapters):
    """Perplexity of each chapter after its context, told the way round that is easier to read."""
    as_told = perplexity(*scorer(), contexts, chapters)
    other = perplexity(*scorer(), contexts, list(map(other_way_round, chapters)))
    return list(map(min, as_told, other))


@functools.cache
def unaided(story, chapter):
    """Perplexity of a chapter without a plan; each is computed once."""
    return readings([f"{story} chapter :"], [chapter])[0]


def gains(examples, plans, chapters):
    """I in percent, LEAST_GAIN or more, of each plan for each chapter; 0.0 for an empty plan."""
    contexts = [chapter_prompt(example, plan) for example, plan in zip(examples, plans)]
    aided = readings(contexts, chapters)
    return [max(LEAST_GAIN, improvement(unaided(example["story"], chapter), after)) if plan else 0.0
            for example, plan, chapter, after in zip(examples, plans, chapters, aided)]


def rewards(examples, completions):
    """VR-CLI, contrastive (paper Sec. 4): I(true chapter) - 0.5 * I(another's chapter), I in percent;
    a plan that says nothing earns 0."""
    plans = [plan_of(completion) for completion in completions]
    own = gains(examples, plans, [example["chapter"] for example in examples])
    other = gains(examples, plans, [example["other"] for example in examples])
    return [gain - 0.5 * gain_other for gain, gain_other in zip(own, other)]
