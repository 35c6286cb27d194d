"""The tiny world, task 2 of 2: plan the next chapter (the shape of the paper's NCP task, Sec. 4).

The story tells who hid which thing where and who wants which thing. The next chapter is then a matter of
course: everybody goes where the wanted thing is, under the place's other name (`attic` is where `upstairs`
is).

    Karl hides upstairs cup . .. cup tempts Mara . ..        next chapter: Mara goes attic and finds cup . ..

The policy writes a plan after "In summary :"; a frozen copy of the base model reads the TRUE next chapter
with and without it, and the reward is how much easier the plan made the reading."""
import functools
import random

from data import improvement, perplexity
from data.tiny import HIDE, NAMES, PEOPLE, PUT, SEEDS, THINGS, collect
from litereason import load, parse_tags

SIZES = {"train": 480, "val": 100, "test": 200}
MEASURE = "reward"  # what a score of this task is called
ANSWER = "In summary :"  # what follows is the plan, the only part that the scorer reads


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
    """The split's stories; each carries `other`, the chapter of another story, for the contrastive reward.

    The paper draws the other chapter again at every step; a fixed one makes reward() a function."""
    if split not in SIZES:
        raise ValueError(f"the tiny.next_chapter task has the splits {', '.join(SIZES)}, not {split!r}")
    rng = random.Random(100 + SEEDS[split])
    rows = collect(split, SIZES[split], lambda _: make_story(rng))
    for row, following in zip(rows, rows[1:] + rows[:1]):
        row["other"] = following["chapter"]
    return rows


def prompt(example, latent):
    """The story and the task; with `latent`, the offer of the tag."""
    offer = " or skip with <implicit_thought> number </implicit_thought>" if latent else ""
    return f"{example['story']} task : plan the next chapter . think aloud{offer} . answer :"


def chapter_prompt(example, plan):
    """What the frozen scorer reads before the chapter: the story, then the plan if there is one."""
    return f"{example['story']} plan : {plan} chapter :" if plan else f"{example['story']} chapter :"


def gold_plan(example):
    """The plan that says what the true chapter tells."""
    return " , ".join(f"{person} {NAMES[place]}" for person, _, place in example["wants"]) + " ."


def plan_of(completion):
    """The text after the last "In summary :", without tags and without the words that would end the
    scorer's prompt."""
    if ANSWER not in completion:
        return ""
    plan = completion.rsplit(ANSWER, 1)[1]
    for start, end, _ in reversed(parse_tags(plan)):
        plan = plan[:start] + plan[end:]
    structure = ("chapter", "plan", "task", ":", "<|endoftext|>")
    return " ".join(word for word in plan.split() if word not in structure)


@functools.cache
def scorer():
    """The frozen copy of the base model that reads chapters: (model, tokenizer)."""
    return load("tiny")


@functools.cache
def unaided(story, chapter):
    """Perplexity of a chapter without a plan; each is computed once."""
    return perplexity(*scorer(), [f"{story} chapter :"], [chapter])[0]


def gains(examples, plans, chapters):
    """I in percent, of each plan for each chapter; 0.0 for an empty plan."""
    contexts = [chapter_prompt(example, plan) for example, plan in zip(examples, plans)]
    aided = perplexity(*scorer(), contexts, chapters)
    gain = [0.0] * len(plans)
    for i, plan in enumerate(plans):
        if plan:
            gain[i] = improvement(unaided(examples[i]["story"], chapters[i]), aided[i])
    return gain


def rewards(examples, completions):
    """VR-CLI, contrastive (paper Sec. 4): I(true chapter) - 0.5 * I(another's chapter), I in percent."""
    plans = [plan_of(completion) for completion in completions]
    own = gains(examples, plans, [example["chapter"] for example in examples])
    other = gains(examples, plans, [example["other"] for example in examples])
    return [gain - 0.5 * gain_other for gain, gain_other in zip(own, other)]


def reward(example, completion):
    """The same for one completion; a plan that says nothing earns 0."""
    return rewards([example], [completion])[0]
