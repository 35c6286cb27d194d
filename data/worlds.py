"""What the two tiny worlds, data/tiny and data/serial, share: their splits, their verdicts, and how plans for the
next chapter are read and rewarded. Every word is one token, so all texts are words between spaces."""
import functools
import random
import zlib

from data import boxed, improvement, perplexity
from litereason import load, parse_tags

SEEDS = {"train": 1, "val": 2, "test": 3}
OFFER = " or skip with <implicit_thought> number </implicit_thought>"  # the paper's offer of the tag, in few words
PLAN = "In summary :"  # what follows is the plan, the only part that the scorer reads


# ============================================================ stories
def split_of(story):
    """Train, val or test by the story's own text: 80 / 10 / 10 %."""
    bucket = zlib.crc32(story.encode()) % 10
    return "test" if bucket == 0 else "val" if bucket == 1 else "train"


def collect(split, n, make):
    """n different stories of the split; make(number of the next one) -> a story, of any split."""
    rows = []
    seen = set()
    while len(rows) < n:
        row = make(len(rows))
        if split_of(row["story"]) == split and row["story"] not in seen:
            seen.add(row["story"])
            rows.append(row)
    return rows


def check_split(task, split, sizes):
    if split not in sizes:
        raise ValueError(f"the {task} task has the splits {', '.join(sizes)}, not {split!r}")


# ============================================================ plot holes
def answer(example):
    """The gold answer, in exactly the format that `reward` parses (the refresh trains on it)."""
    return "\\boxed{ Yes }" if example["label"] else "\\boxed{ No }"


def reward(example, completion):
    """1.0 if the last box of the completion is the right word, else 0.0 (paper Sec. 4)."""
    said = (boxed(completion) or "").strip().lower()
    return float(said == ("yes" if example["label"] else "no"))


# ============================================================ next chapters
def chapters(task, split, sizes, make_story):
    """The split's stories; each carries `other`, the chapter of another story, for the contrastive reward.

    The paper draws the other chapter again at every step; a fixed one makes the reward a function."""
    check_split(task, split, sizes)
    rng = random.Random(100 + SEEDS[split])
    rows = collect(split, sizes[split], lambda _: make_story(rng))
    for row, following in zip(rows, rows[1:] + rows[:1]):
        row["other"] = following["chapter"]
    return rows


def chapter_prompt(example, plan):
    """What the frozen scorer reads before the chapter: the story, then the plan if there is one."""
    return f"{example['story']} plan : {plan} chapter :" if plan else f"{example['story']} chapter :"


def plan_of(completion):
    """The text after the last "In summary :", without tags and without the words that would end the
    scorer's prompt."""
    if PLAN not in completion:
        return ""
    plan = completion.rsplit(PLAN, 1)[1]
    for start, end, _ in reversed(parse_tags(plan)):
        plan = plan[:start] + plan[end:]
    structure = ("chapter", "plan", "task", ":", "<|endoftext|>")
    return " ".join(word for word in plan.split() if word not in structure)


@functools.cache
def scorer(world):
    """The frozen copy of the world's base that reads chapters: (model, tokenizer)."""
    return load(world)


@functools.cache
def unaided(world, story, chapter):
    """Perplexity of a chapter without a plan; each is computed once."""
    return perplexity(*scorer(world), [f"{story} chapter :"], [chapter])[0]


def gains(world, examples, plans, chapters):
    """I in percent, of each plan for each chapter; 0.0 for an empty plan."""
    contexts = [chapter_prompt(example, plan) for example, plan in zip(examples, plans)]
    aided = perplexity(*scorer(world), contexts, chapters)
    gain = [0.0] * len(plans)
    for i, plan in enumerate(plans):
        if plan:
            gain[i] = improvement(unaided(world, examples[i]["story"], chapters[i]), aided[i])
    return gain


def plan_rewards(world, examples, completions):
    """VR-CLI, contrastive (paper Sec. 4): I(true chapter) - 0.5 * I(another's chapter), I in percent; a plan that
    says nothing earns 0."""
    plans = [plan_of(completion) for completion in completions]
    own = gains(world, examples, plans, [example["chapter"] for example in examples])
    other = gains(world, examples, plans, [example["other"] for example in examples])
    return [gain - 0.5 * gain_other for gain, gain_other in zip(own, other)]
