"""Plan the next chapter of a book: the second of the paper's two tasks (Sec. 4; VR-CLI, arXiv 2503.22828).

The policy reads what came before, reasons, and writes a plan after "In summary:". A frozen LM, the scorer,
then reads the TRUE next chapter y with and without the plan. No gold plan is needed:

    I(y) = 100 * (PPL(y | story) - PPL(y | story, plan)) / PPL(y | story)        percent
    vrcli         R = I(y)
    contrastive   R = I(y) - 0.5 * I(y_other)      y_other: a chapter of another book, one per prompt and step
    thresholded   R = 0 below 0.05, 0.5 up to 1, 0.9 up to 2, 1 above

prepare.py makes the examples, a script sets `settings`. The scorer sees the plan as ordinary text: no
latents, no tags, no special tokens, no headings."""
import bisect
import functools
import math
import random
import re
from statistics import fmean as mean

import torch

from data import OFFER, folder, improvement, last_opening, read_split
from lib import UserError, checkpoint, decoder, memory, scoring
from litereason import Rollout, logprobs

settings = {
    "reward": "contrastive",  # or vrcli, thresholded
    "scorer": None,           # the frozen reader: (model, tokenizer)
    "step": 0, "seed": 0}     # of the draw of the other chapter
POSITIONS = 2**15  # that the scorer reads at once, at most; changes memory, not results
MEASURE = "reward"  # what a score of this task is called
ANSWER = "In summary:"  # what follows is the plan, the only part that the scorer reads
FIELDS = {  # field of an example -> its heading in the prompt, in this order; all but the story are optional
    "high_level_plan": "The plan of the whole book",
    "character_sheets": "The characters",
    "prior_summary": "Summary of the earlier chapters",
    "story": "The story so far",
    "next_synopsis": "Synopsis of the next chapter",
    "title": "Title of the next chapter"}
PLAN_HEADING = "\n\n# Detailed plan of the next chapter\n\n"
CHAPTER_HEADING = "\n\n# The next chapter\n\n"


def examples(split):
    """[{book, number, story (before), chapter (the true next one), split, other FIELDS where known}]."""
    return [{**row, "split": split} for row in read_split("next_chapter", split)]


# ============================================================ prompts
def sources(example):
    """Everything known before the chapter, one heading each; what a book does not have is left out."""
    return "\n\n".join(f"# {heading}\n\n{example[field]}" for field, heading in FIELDS.items()
                       if example.get(field))


def prompt(example, latent):
    """What the policy reads, without a chat template; with `latent`, the offer of the tag."""
    return f"""Below is what is known of a book up to a certain chapter. Plan the chapter that comes next.

{sources(example)}

# Your task

Reason step by step about what the next chapter should bring: events, whom they involve and how these people \
change, tone, and how it takes up what came before. Say for each thought which passage of the material it \
rests on and what follows from it.

{OFFER if latent else ""}Only the last paragraph that you write is passed on to the writer: a detailed plan \
of the next chapter, which begins with "{ANSWER}"."""  # nothing after it: repeating this prompt makes no plan


def chapter_prompt(example, plan=""):
    """What a frozen LM reads before it scores or writes the chapter: the sources, a plan if there is one."""
    return sources(example) + (PLAN_HEADING + plan if plan else "") + CHAPTER_HEADING


# What a plan must not hold: it could end the structure of the scorer's prompt.
INVISIBLE = re.compile("[\u200b\u2060\ufeff]")
LINE_ENDS = re.compile("[\r\v\f\x1c-\x1e\x85\u2028\u2029]")  # all that begins a line
NOT_PLAIN = [
    re.compile(r"<implicit_thought>\s*(?:\w+\s*)?</implicit_thought>|</?implicit_thought>"),  # valid or not
    re.compile(r"<\|[^<>|\n]*\|>|</?s>|<(?:bos|eos|pad|unk|start_of_turn|end_of_turn)>|\[/?INST\]|<</?SYS>>"),
    re.compile(r"(?m)^[^\S\n]*(?:(?:#+|={3,}|-{3,}|\*{3,})[^\S\n]*)+"),  # a heading becomes a line of text
]


def plan_of(completion):
    """The text after the last "In summary:", as plain words; "" if there is none, or none with a word in it.

    Ours: the paper's code takes the whole answer where there is no plan, reasoning and all: no thought could
    be left to latents. Tags go, and so do the special tokens of the chat templates we know."""
    place = last_opening(completion, ANSWER)
    plan = LINE_ENDS.sub("\n", INVISIBLE.sub("", completion[place[1]:] if place else ""))
    before = None
    while before != plan:  # taking one out may join the halves of another
        before = plan
        for pattern in NOT_PLAIN:
            plan = pattern.sub("", plan)
    plan = re.sub(r"\n{2,}", "\n", plan).strip()
    return plan if re.search(r"\w", plan) else ""


# ============================================================ the scorer
def scoring_row(model, tokenizer, example, plan, chapter):
    """What the scorer reads, as (Rollout, tokens of the chapter, its last slots).

    The sources are the prompt, which all rows of one example share, so that logprobs reads them once.
    Everything is encoded as text: a <|im_end|> in a story or a plan is ten ordinary characters."""
    encode = functools.partial(checkpoint.encode_text, tokenizer)
    known = encode(sources(example), begins=True)
    heading = encode(CHAPTER_HEADING)
    own = encode(chapter)
    limit = model.config.max_position_embeddings
    room = limit - len(known) - len(heading) - len(own)
    if room < 0 or not known or not own:
        raise UserError(f"{example['book']}, chapter {example.get('number', '?')}: {len(known)} tokens of "
                        f"story and {len(own)} of chapter (neither may be 0) do not fit the scorer's {limit} "
                        f"positions; prepare with smaller --story-tokens and --chapter-tokens")
    planned = encode(PLAN_HEADING + plan)[:room] if plan else []  # a plan that is too long loses its end
    no_latents = torch.zeros(0, model.config.hidden_size)
    return Rollout(known, planned + heading + own, no_latents), len(own)


@torch.no_grad()
def perplexities(batch):
    """Per-token perplexity of chapters under the scorer. batch: [(example, plan, chapter)] -> floats."""
    if not batch:
        return []
    model, tokenizer = settings["scorer"]
    rollouts, lengths = zip(*(scoring_row(model, tokenizer, *one) for one in batch))

    def read(positions):
        results = []
        for part in scoring.pack(rollouts, positions):
            logp, _ = logprobs(model, [rollouts[i] for i in part])  # (B, S)
            for own, i in zip(logp, part):
                end = len(rollouts[i].slots)
                results.append(math.exp(-float(own[end - lengths[i] : end].double().mean())))
        return results

    longest = max(len(rollout.prompt_ids) + len(rollout.slots) for rollout in rollouts)
    positions = min(POSITIONS, memory.positions_that_fit(model, longest))
    return decoder.once_more_in_halves(model, read, positions, "positions", longest)


def unaided(pairs):
    """Perplexities without a plan of [(example, chapter)] -> floats. A step's rollouts share their prompts:
    each pair is read once."""
    keys = [(sources(example), chapter) for example, chapter in pairs]
    different = {key: (example, "", chapter) for key, (example, chapter) in zip(keys, pairs)}
    known = dict(zip(different, perplexities(list(different.values()))))
    return [known[key] for key in keys]


# ============================================================ rewards
@functools.lru_cache(maxsize=8)
def _chapters(folder, split):
    """[(work, chapter)] of a split. folder: where it was read from, for the cache."""
    return [(work_of(example), example["chapter"]) for example in examples(split)]


def work_of(example):  # the book's name; of an edition, that of the first one
    return example.get("work", example["book"])


def draw(example, step):
    """A chapter of another book, the same for all rollouts of a prompt in a step.

    From the example's own split, so that training never sees val or test text; if that split has no other
    book, from train's."""
    rng = random.Random(f"{settings['seed']}/{step}/{example['book']}/{example.get('number')}")
    for split in (example.get("split", "train"), "train"):
        chapters = _chapters(folder("next_chapter"), split)
        if others := [chapter for work, chapter in chapters if work != work_of(example)]:
            return rng.choice(others)
    raise UserError(f"the contrastive reward needs a second book beside {example['book']!r}: prepare more, "
                    "or choose the reward vrcli")


def gains(examples, plans, chapters):
    """I in percent, of each plan for each chapter; 0.0 for an empty plan."""
    planned = [one for one in zip(examples, plans, chapters) if one[1]]
    before = unaided([(example, chapter) for example, _, chapter in planned])
    gained = map(improvement, before, perplexities(planned))
    return [next(gained) if plan else 0.0 for plan in plans]


def rewards(examples, completions):
    """The reward of each completion, as chosen in `settings`; no plan or an empty one earns 0."""
    kind = settings["reward"]
    plans = [plan_of(completion) for completion in completions]
    own = gains(examples, plans, [example["chapter"] for example in examples])
    if kind == "vrcli":
        return own
    if kind == "thresholded":
        return [(0.0, 0.5, 0.9, 1.0)[bisect.bisect_right((0.05, 1, 2), gain)] for gain in own]
    other = gains(examples, plans, [draw(example, settings["step"]) for example in examples])
    return [gain - 0.5 * gain_other for gain, gain_other in zip(own, other)]


# ============================================================ what eval.py prints beside the reward
def plans_of_others(prompts, plans):
    """For each plan that of the next one in the list that has another prompt; "" if there is none."""
    pairs = list(zip(prompts, plans))
    return [next((plan for prompt, plan in pairs[i:] + pairs[:i] if prompt != own), "")
            for i, own in enumerate(prompts)]


def report(examples, completions):
    """Mean improvement in percent with its 95 % interval (over prompts), share of prompts improved, words
    per plan, share without a plan, and the control: the mean improvement with the plan of another prompt."""
    plans = [plan_of(completion) for completion in completions]
    chapters = [example["chapter"] for example in examples]
    prompts = [chapter_prompt(example) + example["chapter"] for example in examples]
    by_prompt = {}  # an example's gains, one per sample
    for own, gain in zip(prompts, gains(examples, plans, chapters)):
        by_prompt.setdefault(own, []).append(gain)
    means = list(map(mean, by_prompt.values()))
    center = mean(means)
    variance = sum((m - center) ** 2 for m in means) / max(1, len(means) - 1)
    half = 1.96 * math.sqrt(variance / len(means))
    return {
        "improvement": center, "improvement_ci95": [center - half, center + half],
        "improved": mean([m > 0 for m in means]),
        "plan_words": mean([len(plan.split()) for plan in plans]),
        "no_plan": mean([not plan for plan in plans]),
        "improvement_other_plan": mean(gains(examples, plans_of_others(prompts, plans), chapters))}
