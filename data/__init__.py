"""What a task is, and what tasks share. To add a task, this page is all that has to be known.

A task is a module with three functions; `--task NAME` is data/NAME/__init__.py (and tiny.next_chapter is
data/tiny/next_chapter.py).

    examples(split)                  the examples of "train", "val" or "test": a list of dicts, the same at
                                     every call
    prompt(example, latent)          what the policy reads, as text without a chat template; with `latent`
                                     it offers the tag
    reward(example, completion)      what a completion (text) earns, a number; above 0 it is good enough to
                                     learn from

Where it has a use for them, it may also have these:

    ANSWER                           the words that an answer begins with, by default \\boxed{. What stands
                                     before the last of them is reasoning, where sentences may become tags
    answer(example)                  the right answer, in the form that `reward` reads: the projector's
                                     refresh trains on it (paper Sec. 3.4), eval.py shows it
    rewards(examples, completions)   in its place: those of many at once, for a scorer that reads batches
    verdict(completion)              what the reward reads in a completion (default: plan_of), or None
    report(examples, completions)    {name: number or [low, high]}: what eval.py prints beside the accuracy
    MEASURE                          what its score is called, by default accuracy
    PENALTY                          the most that train_rl.py's length penalty takes off a reward, by
                                     default 1
    settings                         a dict that scripts fill in: "reward" (its kind), "scorer" (the frozen
                                     model and its tokenizer), "seed", "step" (of the training; 0 in
                                     evaluation)

Examples that a prepare.py has written are read by `read_split`. The smallest task to copy from is
data/tiny/__init__.py."""
import csv
import hashlib
import importlib
import io
import json
import os
import re
from collections import Counter

import numpy as np
import torch

from lib import UserError, kv_cache, memory
from lib.checkpoint import checkpoint_path, encode_text
from lib.run import base_of, read_json
from litereason import Rollout, load, logprobs

HERE = os.path.dirname(os.path.abspath(__file__))
SPLITS = ("train", "val", "test")

# ============================================================ what prompts and rewards are made of
# The offer of the tag, for prompts of real tasks: the paper's content in our words. "number" is not a number,
# so this is no tag.
OFFER = """You may also think without words. Where a sentence of your reasoning would come next, you can \
write <implicit_thought>number</implicit_thought> in its place and leave the sentence out. The number goes \
from 1 to 5: the harder the thought, the higher. This works best in the middle of your reasoning rather than \
at its beginning or its end.

"""


def last_opening(text, opening):
    """(start, end) of the last place where an answer begins; None if there is none. An opening that ends in a
    colon may be written in other capitals, in bold or with a comma, as models do: **In Summary**: .."""
    pattern = re.escape(opening)
    if opening.endswith(":"):
        pattern = rf"(?i)(?<![\w*])[*_]*{re.escape(opening.rstrip(' :'))}[*_]*\s?[:,][*_]*"
    return max((match.span() for match in re.finditer(pattern, text)), default=None)


def boxed(text):
    """What the last \\boxed{..} holds, braces balanced, \\text{..} unwrapped; None without one, or if cut."""
    opening = "\\boxed{"
    content = text.rpartition(opening)[2] if opening in text else ""
    depth = 1
    for i, letter in enumerate(content):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return re.sub(r"\\(?:text|textbf|mathrm)\{([^{}]*)\}", r"\1", content[:i]).strip()
    return None


@torch.no_grad()
def perplexity(model, tokenizer, contexts, continuations, rows=64):
    """Per-token perplexity of each continuation after its context, both lists of texts -> list of floats.

    They are read as plain text, whatever they contain: no special token, no tag. rows: how many are read at
    once. UserError if one of them has no token."""
    no_latents = torch.zeros(0, model.config.hidden_size)
    prompts = [encode_text(tokenizer, context, begins=True) for context in contexts]
    slots = [encode_text(tokenizer, continuation) for continuation in continuations]
    if not all(prompts + slots):
        raise UserError("a perplexity needs a context and a continuation of at least one token each")
    texts = [Rollout(*ids, no_latents) for ids in zip(prompts, slots)]
    perplexities = []
    with kv_cache.autocast(model):
        for i in range(0, len(texts), rows):
            logp, scored = logprobs(model, texts[i : i + rows])  # (B, S) each
            perplexities += torch.exp(-logp.sum(1) / scored.sum(1)).tolist()
    return perplexities


def improvement(before, after):
    """VR-CLI (arXiv 2503.22828): by how many percent a plan lowers the perplexity of a text."""
    return 100.0 * (before - after) / before


# ============================================================ finding a task and scoring with it
def load_task(name):
    """The task module data.NAME; UserError that lists the tasks if there is none."""
    try:
        task = importlib.import_module(f"data.{name}")
        if hasattr(task, "reward") or hasattr(task, "rewards"):
            return task
    except ModuleNotFoundError as e:
        if not f"data.{name}".startswith(e.name):  # the task is there, but not something that it imports
            raise
    known = [d for d in sorted(os.listdir(HERE)) if os.path.exists(os.path.join(HERE, d, "__init__.py"))]
    raise UserError(f"no task {name!r}; there are {', '.join(known)} (a task is a folder under data/ with "
                    f"examples, prompt and reward), tiny.next_chapter and next_chapter.short")


def choose_task(name, model, reward=None, scorer=None):
    """-> (name, task module) of --task; by default the tiny world for a checkpoint that has its vocabulary,
    else flawed_fictions. Reads no weights: what is wrong with a task is said before a model is fetched."""
    if not name:
        tokenizer = read_json(os.path.join(checkpoint_path(model), "tokenizer.json"), {"model": {}})["model"]
        knows_words = tokenizer.get("type") == "WordLevel" and "halves" in tokenizer["vocab"]
        name = "tiny" if knows_words else "flawed_fictions"
    task = load_task(name)
    if (reward or scorer) and not hasattr(task, "settings"):
        raise UserError(f"--reward and --scorer are for tasks with a scorer (next_chapter); {name} has none")
    return name, task


def start_task(task, model, reward, scorer, seed, device):
    """Fills in a task's `settings`, if it has them: --reward, the seed and the reader, which is never the
    policy itself but --scorer or a copy of the base that `model` was trained from."""
    if hasattr(task, "settings"):
        reader, tokenizer = load(scorer or base_of(model), device)
        task.settings.update(reward=reward or task.settings["reward"], seed=seed,
                             scorer=(memory.freeze(reader), tokenizer))


def score(task, examples, completions, step=0):
    """The rewards of completions, each for the example at the same place -> list of floats.

    step: of the training, 0 in evaluation; a task with `settings` may draw something again at each step."""
    if hasattr(task, "settings"):
        task.settings["step"] = step
    if hasattr(task, "rewards"):
        return list(map(float, task.rewards(examples, completions)))
    return [float(task.reward(example, completion)) for example, completion in zip(examples, completions)]


def measure_of(task):  # what its scores are called
    return getattr(task, "MEASURE", "accuracy")


def opening_of(task):  # the words that an answer begins with
    return getattr(task, "ANSWER", "\\boxed{")


def has_verdict(task, completion):
    """Whether a completion holds anything that the task's reward can read, right or wrong."""
    read = getattr(task, "verdict", None) or getattr(task, "plan_of", None)
    said = read(completion) if read else last_opening(completion, opening_of(task))
    return said not in (None, "")


# ============================================================ prepared examples, a .jsonl per split
def folder(task):  # where its prepared files are
    return os.path.join(os.environ.get("LITEREASON_DATA") or HERE, task)


def read_split(task, split):
    """The examples of a prepared split, dicts. UserError: it is not prepared yet, or damaged."""
    path = os.path.join(folder(task), f"{split}.jsonl")
    if not os.path.exists(path):
        raise UserError(f"{path} is not there yet; make it with: python data/{task}/prepare.py (see --help)")
    rows = [row for _, row in read_rows(path)]
    if not rows:
        raise UserError(f"{path} is empty: what was prepared was too little for three splits")
    return rows


def write_splits(out, splits):
    """{split: examples} -> out/SPLIT.jsonl, all complete before the first takes its name, and a line that
    says so. UserError if that fails; files that were there before are then unchanged."""
    texts = ("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) for rows in splits.values())
    contents = {os.path.join(out, f"{split}.jsonl"): text.encode("utf-8", "replace")
                for split, text in zip(splits, texts)}
    try:
        os.makedirs(out, exist_ok=True)
        for path, content in contents.items():
            with open(path + ".tmp", "wb") as file:
                file.write(content)
        for path in contents:
            os.replace(path + ".tmp", path)
    except OSError as e:
        raise UserError(f"cannot write to {out}: {e.strerror}; what was there before is unchanged") from e
    print(f"wrote {out}; content {hashlib.sha256(b''.join(contents.values())).hexdigest()[:16]}")


# ============================================================ reading other people's files
def some(names):  # the first three, for a message
    return ", ".join(names[:3]) + (" .." if len(names) > 3 else "")


def line_ends(text):  # \n for every \r\n and \r
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_text(path):
    """A UTF-8 file as a str with \\n line ends; UserError naming file and line if it is something else."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except UnicodeDecodeError as e:
        line = e.object.count(b"\n", 0, e.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 (byte {e.object[e.start]:#x}); convert it first, for "
                        f"example `iconv -f cp1252 -t utf-8`") from e
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from e


def read_rows(path):
    """The rows of a .jsonl, .json (a list, or one object per line), .csv or .parquet file (which needs
    pyarrow) -> [(where, dict)].

    where: for messages, as in "a.jsonl:7". UserError naming it if a row is something else."""
    kind = os.path.splitext(path)[1].lower()
    text = "" if kind == ".parquet" else read_text(path)
    where, rows, found = path, [], []
    try:
        if kind == ".parquet":
            import pyarrow.parquet
            rows = pyarrow.parquet.read_table(path).to_pylist()
        elif kind == ".csv":
            csv.field_size_limit(10**8)
            rows = csv.DictReader(io.StringIO(text))
        elif kind == ".json" and text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            for number, line in enumerate(text.split("\n"), 1):  # not splitlines(): a story may hold U+2028
                where = f"{path}:{number}"
                if line.strip():
                    found.append((where, json.loads(line)))
        found += [(f"{path}, row {number}", row) for number, row in enumerate(rows, 1)]
    except ImportError as e:
        raise UserError(f"{path} is parquet: `pip install pyarrow` and run this again") from e
    except json.JSONDecodeError as e:
        raise UserError(f"{where}: not JSON ({e})") from e
    for where, row in found:
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}")
    return found


# ============================================================ which texts are versions of one another
def find_clusters(texts, n=8, share=0.0):
    """Cluster numbers, one per text, each the place of the cluster's first text: texts that have runs of n
    words in common, directly or through others, are in one cluster. No split divides one.

    share: it takes more than this share of the runs of the text that has fewer; with 0 a single one does."""
    numbers = {}  # word -> its number
    weights = np.random.default_rng(0).integers(2**63, size=n, dtype=np.uint64)
    runs = []  # per text, a hash of 64 bits per run of n words
    for text in texts:
        ids = [numbers.setdefault(word, len(numbers) + 1) for word in re.findall(r"\w+", text.lower())]
        ids = np.array(ids + [0] * (n - len(ids)), dtype=np.uint64)  # a short text is one run of its own
        runs.append(np.unique(np.lib.stride_tricks.sliding_window_view(ids, n) @ weights))

    owner = np.repeat(np.arange(len(runs)), [len(own) for own in runs])
    every = np.concatenate(runs)
    order = np.argsort(every, kind="stable")
    same = np.flatnonzero(every[order][1:] == every[order][:-1])
    common = Counter(zip(owner[order[same]].tolist(), owner[order[same + 1]].tolist()))
    cluster = list(range(len(runs)))
    for (i, j), count in common.items():
        if count > share * min(len(runs[i]), len(runs[j])):
            a, b = sorted((cluster[i], cluster[j]))
            cluster = [a if own == b else own for own in cluster]
    return cluster
