"""The tiny world, task 2 of 2: plan the next chapter (the shape of the paper's NCP task, Sec. 4).

The story tells who hid which thing where and who wants which thing. The next chapter is then a matter of course:
everybody goes where the wanted thing is, under the place's other name (`attic` is where `upstairs` is). The policy writes a plan after "In summary :"; a frozen copy of the base
model reads the TRUE next chapter with and without it, and the reward is how much easier the plan made the reading.
"""
import functools
import random

from data.tiny import HIDE, NAMES, PEOPLE, PUT, SEEDS, THINGS, split_of
from data import improvement, perplexity
from litereason import load, parse_tags

SIZES = {"train": 480, "val": 100, "test": 200}
ANSWER = "In summary :"  # what follows is the plan, the only part that the scorer reads


def make_story(rng):
    """8 events: five things hidden, three wanted. Returns {story, wants: [(person, thing, place)], chapter}."""
    hiders, things = rng.sample(PEOPLE, 5), rng.sample(THINGS, 5)
    place = {t: rng.choice(PUT) for t in things}
    act_one = [f"{p} {rng.choice(HIDE)} {place[t]} {t} ." for p, t in zip(hiders, things)]
    wants = [(p, t, place[t]) for p, t in zip(rng.sample(hiders, 3), rng.sample(things, 3))]
    act_two = [f"{t} tempts {p} ." for p, t, _ in wants]
    return {"story": " ".join(act_one + act_two), "wants": wants, "chapter": chapter(wants)}


def chapter(wants):
    return " ".join(f"{p} goes {NAMES[where]} and finds {t} ." for p, t, where in wants)


def examples(split):
    """The split's stories; each carries `other`, the chapter of another story, for the contrastive reward."""
    if split not in SIZES:
        raise ValueError(f"the tiny.next_chapter task has the splits {', '.join(SIZES)}, not {split!r}")
    rng, rows, seen = random.Random(100 + SEEDS[split]), [], set()
    while len(rows) < SIZES[split]:
        row = make_story(rng)
        if split_of(row["story"]) == split and row["story"] not in seen:
            seen.add(row["story"])
            rows.append(row)
    for row, other in zip(rows, rows[1:] + rows[:1]):
        # The paper draws the other chapter anew at every step; a fixed one keeps reward() a function of its arguments.
        row["other"] = other["chapter"]
    return rows


def prompt(example, latent):
    offer = " or skip with <implicit_thought> number </implicit_thought>" if latent else ""
    return f"{example['story']} task : plan the next chapter . think aloud{offer} . answer :"


def chapter_prompt(example, plan):
    """What the frozen scorer reads before the chapter: the story, then the plan if there is one."""
    return f"{example['story']} plan : {plan} chapter :" if plan else f"{example['story']} chapter :"


def gold_plan(example):
    return " ".join(f"{p} {NAMES[where]} ," for p, _, where in example["wants"])[:-2] + " ."


def plan_of(completion):
    """The text after the last "In summary :", without tags and without the words that would end the scorer's prompt."""
    if ANSWER not in completion:
        return ""
    plan = completion.rsplit(ANSWER, 1)[1]
    for a, b, _ in reversed(parse_tags(plan)):
        plan = plan[:a] + plan[b:]
    return " ".join(w for w in plan.split() if w not in ("chapter", "plan", "task", ":", "<|endoftext|>"))


@functools.cache
def scorer():
    """The frozen copy of the base model that reads chapters: (model, tokenizer)."""
    return load("tiny")


@functools.cache
def unaided(story, chapter):
    """Perplexity of a chapter without a plan; each is computed once."""
    return perplexity(*scorer(), [f"{story} chapter :"], [chapter])[0]


def rewards(examples, completions):
    """VR-CLI, contrastive (paper Sec. 4): I(true chapter) - 0.5 * I(another story's chapter), I in percent."""
    plans = [plan_of(c) for c in completions]
    contexts = [chapter_prompt(e, p) for e, p in zip(examples, plans)]
    gain = {}
    for which in ("chapter", "other"):
        aided = perplexity(*scorer(), contexts, [e[which] for e in examples])
        gain[which] = [improvement(unaided(e["story"], e[which]), a) if p else 0.0 for e, a, p in zip(examples, aided, plans)]
    return [true - 0.5 * other for true, other in zip(gain["chapter"], gain["other"])]


def reward(example, completion):
    """The same for one completion; a plan that says nothing earns 0."""
    return rewards([example], [completion])[0]
