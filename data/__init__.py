"""What tasks share: how a task is found and scored, boxed answers, the perplexity reward, reading files."""
import csv
import functools
import importlib
import io
import json
import os
import re

import torch

from litereason import Rollout, load, logprobs
from runs import UserError, base_of, is_small


def boxed(text):
    """The content of the last \\boxed{..}, braces balanced, \\text{..} unwrapped; None if there is none or it is cut."""
    at = text.rfind("\\boxed{")
    if at < 0:
        return None
    depth, start = 0, at + len("\\boxed")
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return re.sub(r"\\(?:text|textbf|mathrm)\{([^{}]*)\}", r"\1", text[start + 1 : i]).strip()
    return None


@torch.no_grad()
def perplexity(model, tokenizer, contexts, continuations, rows=64):
    """Per-token perplexity of each continuation after its context, both texts -> list of floats. No tag fires here."""
    out = []
    for i in range(0, len(contexts), rows):
        pairs = zip(contexts[i : i + rows], continuations[i : i + rows])
        none = torch.zeros(0, model.config.hidden_size)
        encode = functools.partial(tokenizer.encode, split_special_tokens=True)  # both are text, whatever they contain
        batch = [Rollout(encode(c), encode(y, add_special_tokens=False), none) for c, y in pairs]
        if not all(r.prompt_ids and r.slots for r in batch):
            raise UserError("a perplexity needs a context and a continuation of at least one token each")
        logp, scored = logprobs(model, batch)
        out += torch.exp(-logp.sum(1) / scored.sum(1)).tolist()
    return out


def improvement(before, after):
    """VR-CLI (arXiv 2503.22828): by how many percent a plan lowers the perplexity of a text."""
    return 100.0 * (before - after) / before


def load_task(name):
    """The task module data.<name>; a folder under data/ (or a module in it, as in tiny.next_chapter) is a task."""
    try:
        task = importlib.import_module(f"data.{name}")
        assert all(hasattr(task, f) for f in ("examples", "prompt", "reward"))
        return task
    except (ImportError, AssertionError) as e:
        if isinstance(e, ModuleNotFoundError) and e.name not in (f"data.{name}", f"data.{name.split('.')[0]}"):
            raise
        here = os.path.dirname(os.path.abspath(__file__))
        known = [d for d in sorted(os.listdir(here)) if os.path.exists(os.path.join(here, d, "__init__.py"))]
        raise UserError(f"no task {name!r}; there are {', '.join(known)} (a task is a folder under data/ with examples, "
                        f"prompt and reward; tiny.next_chapter is the tiny world's second)") from e


def task_flags(g):
    """The flags of all scripts that say what is to be done."""
    g.add_argument("--task", default=None, help="a folder under data/, or tiny.next_chapter (default: tiny for a small model, else "
                   "flawed_fictions)")
    g.add_argument("--reward", default=None, choices=["contrastive", "vrcli", "thresholded"], help="of next_chapter (default contrastive)")
    g.add_argument("--scorer", default=None, metavar="NAME", help="the frozen model that reads chapters (default: a copy of the base)")


def start_task(args, model, name):
    """The task module of args.task, by default the one that fits the model's size; --reward, --scorer and the seed go to a task with
    `settings`. The scorer is never the policy itself, but a copy of the base that `name` was trained from."""
    args.task = args.task or ("tiny" if is_small(model) else "flawed_fictions")
    task = load_task(args.task)
    if hasattr(task, "settings"):
        reader, tokenizer = load(args.scorer or base_of(name), args.device)
        task.settings.update(reward=args.reward or task.settings["reward"], seed=args.seed, scorer=(reader.requires_grad_(False), tokenizer))
    elif args.reward or args.scorer:
        raise UserError(f"--reward and --scorer are for tasks with a scorer (next_chapter); {args.task} has none")
    return task


def score(task, examples, completions, step=0):
    """Rewards of completions; a task may offer `rewards`, the same for many at once (a scorer model wants batches).

    step: of the training, 0 in evaluation; a task with `settings` may draw something anew at each step."""
    if hasattr(task, "settings"):
        task.settings["step"] = step
    if hasattr(task, "rewards"):
        return task.rewards(examples, completions)
    return [float(task.reward(e, c)) for e, c in zip(examples, completions)]


SPLITS = ("train", "val", "test")


OFFER = """You may also think without words. Where a sentence of your reasoning would come next, you can write \
<implicit_thought>number</implicit_thought> in its place and leave the sentence out. The number goes from 1 to 5: the harder the \
thought, the higher. This works best in the middle of your reasoning rather than at its beginning or its end.

"""  # "number" is not a number, so this is no tag


def read_text(path):
    """A UTF-8 file as a str with \\n line ends; UserError naming file and line if it is something else."""
    try:
        with open(path, "rb") as f:
            raw = f.read()
        return raw.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as e:
        line = raw.count(b"\n", 0, e.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 (byte 0x{raw[e.start]:02x}); convert it first, "
                        f"for example `iconv -f latin1 -t utf-8`") from e
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from e


def read_rows(path):
    """The objects of a .jsonl, .json (a list, or one object per line) or .csv file: [(where, dict)], where as in "a.jsonl:7"."""
    text = read_text(path)
    if path.endswith(".csv"):
        csv.field_size_limit(10**8)
        reader = csv.DictReader(io.StringIO(text))
        try:
            return [(f"{path}:{reader.line_num}", row) for row in reader]
        except csv.Error as e:
            raise UserError(f"{path}:{reader.line_num}: not CSV ({e})") from e
    if path.endswith(".json"):
        try:
            rows = json.loads(text)
            if isinstance(rows, list) and all(isinstance(r, dict) for r in rows):
                return [(f"{path}, row {i + 1}", r) for i, r in enumerate(rows)]
        except ValueError:
            pass  # hubs call files of one object per line .json too
    rows = []
    for i, line in enumerate(text.split("\n")):  # not splitlines(): a story may hold U+2028
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as e:
                raise UserError(f"{path}:{i + 1}: not JSON ({e}); expected one object per line") from e
            if not isinstance(row, dict):
                raise UserError(f"{path}:{i + 1}: expected a JSON object, found {type(row).__name__}")
            rows.append((f"{path}:{i + 1}", row))
    return rows


def folder(task):
    """Where a task's prepared files are: LITEREASON_DATA/<task> if that is set, else beside the task's code."""
    here = os.path.dirname(os.path.abspath(__file__))
    return os.path.join(os.environ.get("LITEREASON_DATA") or here, task)


def read_split(task, split, expected):
    """Rows of a prepared split. expected: {field: type}. ValueError: no such split; UserError: not prepared, or damaged."""
    if split not in SPLITS:
        raise ValueError(f"the {task} task has the splits {', '.join(SPLITS)}, not {split!r}")
    path = os.path.join(folder(task), f"{split}.jsonl")
    if not os.path.exists(path):
        raise UserError(f"{path} is not there yet; make it with: python data/{task}/prepare.py --help")
    rows = read_rows(path)
    for where, row in rows:
        for field, kind in expected.items():
            if not isinstance(row.get(field), kind):
                raise UserError(f"{where}: {field!r} must be a {kind.__name__}, found {type(row.get(field)).__name__}; "
                                f"run data/{task}/prepare.py again")
    if not rows:
        raise UserError(f"{path} is empty: what was prepared was too little for three splits")
    return [row for _, row in rows]
