"""Plan the next chapter of a real book: the second of the paper's two tasks (Sec. 4; VR-CLI, arXiv 2503.22828).

The policy reads what came before, reasons, and writes a plan after "In summary:". A frozen LM, the scorer, then reads the
TRUE next chapter y with and without the plan. No gold plan is needed:

    I(y) = 100 * (PPL(y | story) - PPL(y | story, plan)) / PPL(y | story)        percent
    vrcli         R = I(y)
    contrastive   R = I(y) - 0.5 * I(y_other)      y_other: a chapter of another book, drawn once per prompt and step
    thresholded   R = 0 below 0.05, 0.5 up to 1, 0.9 up to 2, 1 above

prepare.py makes the examples; LITEREASON_DATA/next_chapter is looked at first, if that is set. A script sets `settings`.
The scorer sees the plan as ordinary text: no latents, no tags, no special tokens, no headings.
"""
import functools
import hashlib
import json
import math
import os
import random
import re

import torch

from data import OFFER, folder, improvement, read_split
from litereason import Rollout, UserError, load, logprobs

settings = {
    "reward": "contrastive",  # or vrcli, thresholded
    "scorer": None,           # a name or path for litereason.load, or a pair (model, tokenizer): the frozen reader
    "step": 0, "seed": 0,     # of the draw of the other chapter; a script that wants a new one per step sets `step`
    "rows": 16,               # texts that the scorer reads at once; changes memory, not results
}
ANSWER = "In summary:"  # what follows is the plan, the only part that the scorer reads
FIELDS = {"high_level_plan": "The plan of the whole book", "character_sheets": "The characters",  # optional, in the prompt's order
          "prior_summary": "Summary of the earlier chapters"}


def examples(split):
    """[{book, number, story (text before), chapter (the true next one), split, and title and FIELDS where known}]."""
    rows = read_split("next_chapter", split, {"book": str, "story": str, "chapter": str})
    return [{**row, "split": split} for row in rows]


# ---------------------------------------------------------------- prompts
def sources(example):
    """Everything known before the chapter, one heading each; what a book does not have is left out."""
    parts = [(name, example.get(field)) for field, name in FIELDS.items()]
    parts += [("The story so far", example["story"]), ("Synopsis of the next chapter", example.get("next_synopsis")),
              ("Title of the next chapter", example.get("title"))]
    return "\n\n".join(f"# {name}\n\n{text}" for name, text in parts if text)


def prompt(example, latent):
    """What the policy reads, without a chat template; with `latent`, the offer of the tag."""
    return f"""Below is what is known of a book up to a certain chapter. Plan the chapter that comes next.

{sources(example)}

# Your task

Reason step by step about what the next chapter should bring: events, whom they involve and how these people change, tone, and how it \
takes up what came before. Say for each thought which passage of the material it rests on and what follows from it.

{OFFER if latent else ""}Only the last paragraph that you write is passed on to the writer: a detailed plan of the next chapter, \
which begins with "{ANSWER}"."""  # nothing after it: a completion that repeats this prompt holds no plan


PLAN_HEADING, CHAPTER_HEADING = "\n\n# Detailed plan of the next chapter\n\n", "\n\n# The next chapter\n\n"


def chapter_prompt(example, plan=""):
    """What a frozen LM reads before it scores or writes the chapter: the sources, then the plan if there is one."""
    return sources(example) + (PLAN_HEADING + plan if plan else "") + CHAPTER_HEADING


def plan_of(completion):
    """The text after the last "In summary:", as plain words: tags go, and whatever could end the scorer's prompt loses its form.

    Special tokens of the chat templates we know (<|..|>, <s>, [INST], <start_of_turn>, ..) go; a heading becomes a line of text.
    """
    plan = completion.rpartition(ANSWER)[2] if ANSWER in completion else ""
    plan, before = re.sub("[\r\v\f\x1c-\x1e\x85\u2028\u2029]", "\n", re.sub("[\u200b\u2060\ufeff]", "", plan)), None  # all that begins a line
    while before != plan:  # taking one out may join the halves of another
        before = plan
        plan = re.sub(r"<implicit_thought>\s*(?:\w+\s*)?</implicit_thought>|</?implicit_thought>", "", plan)  # also tags that are not valid
        plan = re.sub(r"<\|[^<>|\n]*\|>|</?s>|<(?:bos|eos|pad|unk|start_of_turn|end_of_turn)>|\[/?INST\]|<</?SYS>>", "", plan)
        plan = re.sub(r"(?m)^[^\S\n]*(?:(?:#+|={3,}|-{3,}|\*{3,})[^\S\n]*)+", "", plan)
    plan = re.sub(r"\n{2,}", "\n", plan).strip()
    return plan if re.search(r"\w", plan) else ""


# ---------------------------------------------------------------- the scorer
def scorer():
    """(model, tokenizer) that reads chapters; frozen, and the same object for the same name."""
    chosen = settings["scorer"]
    if chosen is None:
        raise UserError("the next_chapter reward needs a frozen model that reads the chapters: set its scorer (a model name or directory)")
    return chosen if isinstance(chosen, tuple) else _load(str(chosen))


@functools.lru_cache(maxsize=1)
def _load(name):
    model, tokenizer = load(name)
    return model.requires_grad_(False), tokenizer


def perplexities(batch):
    """Per-token perplexity of chapters under the scorer. batch: [(example, plan, chapter)] -> floats.

    The sources are the shared prompt of all rows of one example, so that logprobs reads them once; plan and chapter are
    the rows' own slots, of which the chapter's are counted. Everything is encoded as text: a <|im_end|> in a story or a plan
    is eight ordinary characters' worth of tokens.
    """
    model, tokenizer = scorer()
    encode = lambda text, first=False: tokenizer.encode(text, add_special_tokens=first, split_special_tokens=True)
    none, limit, out = torch.zeros(0, model.config.hidden_size), model.config.max_position_embeddings, []
    for i in range(0, len(batch), settings["rows"]):
        rows, sizes = [], []
        for example, plan, chapter in batch[i : i + settings["rows"]]:
            known, opening, y = encode(sources(example), True), encode(CHAPTER_HEADING), encode(chapter)
            room = limit - len(known) - len(opening) - len(y)
            if room < 0 or not known or not y:
                raise UserError(f"{example['book']}, chapter {example.get('number', '?')}: {len(known)} tokens of story and {len(y)} of "
                                f"chapter (neither may be 0) do not fit the scorer's {limit} positions; prepare with smaller "
                                f"--story-tokens and --chapter-tokens")
            between = (encode(PLAN_HEADING + plan)[:room] if plan else []) + opening  # a plan too long for the scorer loses its end
            rows.append(Rollout(known, between + y, none))
            sizes.append(len(y))
        with torch.no_grad():
            logp, _ = logprobs(model, rows)
        out += [math.exp(-float(lp[len(r.slots) - n : len(r.slots)].double().mean())) for lp, r, n in zip(logp, rows, sizes)]
    return out


@functools.lru_cache(maxsize=2)
def fingerprint(model):
    """16 digits that change with the weights or their precision: a cached perplexity of another scorer is never taken. Taken
    once per model object: a scorer is frozen."""
    digest = hashlib.sha256(str(model.dtype).encode())
    for name, p in model.named_parameters():
        if "reasoning_projector" not in name:
            digest.update(name.encode() + p.detach().flatten()[:: max(1, p.numel() // 256)].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


_known = {}  # file -> {key: perplexity}


def unaided(pairs):
    """Perplexities without a plan of [(example, chapter)] -> floats; each is computed once, on disk in perplexities.jsonl.

    The key is a hash of the scorer's weights, what it reads and the chapter. A line cut by a stop is computed again.
    """
    path, mark = os.path.join(folder("next_chapter"), "perplexities.jsonl"), fingerprint(scorer()[0])
    if path not in _known:
        _known[path] = {}
        if os.path.exists(path):
            with open(path, encoding="utf-8", errors="replace") as f:
                for line in f:
                    try:
                        key, value = json.loads(line)
                        _known[path][key] = float(value)
                    except (ValueError, TypeError):
                        pass
    known = _known[path]
    keys = [hashlib.sha256("\0".join([mark, chapter_prompt(e), y]).encode("utf-8", "replace")).hexdigest()[:32] for e, y in pairs]
    missing = {k: (e, "", y) for k, (e, y) in zip(keys, pairs) if k not in known}
    if missing:
        new = dict(zip(missing, perplexities(list(missing.values()))))
        known.update(new)
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "a", encoding="utf-8") as f:
                f.write("\n" + "".join(json.dumps([k, v]) + "\n" for k, v in new.items()))  # a line end first: the last line may be cut
        except OSError as e:
            print(f"warning: perplexities are not kept in {path} ({e.strerror}); they will be computed again next time")
    return [known[k] for k in keys]


# ---------------------------------------------------------------- rewards
@functools.lru_cache(maxsize=8)
def _chapters(directory, split):
    return [(e["book"], e["chapter"]) for e in examples(split)]


def draw(example, step):
    """A chapter of another book, the same for all rollouts of a prompt in a step. From the example's own split, so that training
    never sees val or test text; if that split has no other book, from train's."""
    rng = random.Random(f"{settings['seed']}/{step}/{example['book']}/{example.get('number')}")
    for split in (example.get("split", "train"), "train"):
        others = [chapter for book, chapter in _chapters(folder("next_chapter"), split) if book != example["book"]]
        if others:
            return rng.choice(others)
    raise UserError(f"the contrastive reward needs a second book beside {example['book']!r}: prepare more, or choose the reward vrcli")


def gains(examples, plans, chapters):
    """I in percent, of each plan for each chapter; 0.0 for an empty plan."""
    wanted = [i for i, p in enumerate(plans) if p]
    before = unaided([(examples[i], chapters[i]) for i in wanted])
    after = perplexities([(examples[i], plans[i], chapters[i]) for i in wanted])
    out = [0.0] * len(plans)
    for i, b, a in zip(wanted, before, after):
        out[i] = improvement(b, a)
    return out


def rewards(examples, completions):
    """The reward of each completion, as chosen in `settings`; no plan or an empty one earns 0."""
    kind, plans = settings["reward"], [plan_of(c) for c in completions]
    if kind not in ("vrcli", "contrastive", "thresholded"):
        raise UserError(f"the next_chapter reward is vrcli, contrastive or thresholded, not {kind!r}")
    gain = gains(examples, plans, [e["chapter"] for e in examples])
    if kind == "thresholded":
        return [threshold(g) for g in gain]
    if kind == "vrcli":
        return gain
    return [g - 0.5 * o for g, o in zip(gain, gains(examples, plans, [draw(e, settings["step"]) for e in examples]))]


def threshold(gain):
    """Percent -> 0, 0.5, 0.9 or 1 (the original's steps, as others report them)."""
    return 0.0 if gain < 0.05 else 0.5 if gain < 1 else 0.9 if gain < 2 else 1.0


def reward(example, completion):
    """The same for one completion."""
    return rewards([example], [completion])[0]


def report(examples, completions):
    """Optional hook of eval: mean improvement in percent with its 95 % interval (over examples), share of prompts improved, words per
    plan, share without a plan, and the control: the mean improvement with the plan of another example (an empty plan's is 0)."""
    plans, truth = [plan_of(c) for c in completions], [e["chapter"] for e in examples]
    name = lambda e: (e["book"], e.get("number"), e["chapter"])
    other = [next((plans[(i + k) % len(plans)] for k in range(1, len(plans)) if name(examples[(i + k) % len(plans)]) != name(e)), "")
             for i, e in enumerate(examples)]
    by_example = {}
    for e, g in zip(examples, gains(examples, plans, truth)):
        by_example.setdefault(name(e), []).append(g)
    means = [sum(g) / len(g) for g in by_example.values()]
    mean = sum(means) / len(means)
    half = 1.96 * math.sqrt(sum((m - mean) ** 2 for m in means) / max(1, len(means) - 1) / len(means))
    share = lambda xs: sum(xs) / len(xs)
    return {"improvement": mean, "improvement_ci95": [mean - half, mean + half], "improved": share([m > 0 for m in means]),
            "plan_words": share([len(p.split()) for p in plans]), "no_plan": share([not p for p in plans]),
            "improvement_other_plan": share(gains(examples, other, truth))}
