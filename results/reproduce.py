"""Makes the README's comparison from nothing, or the paper's table for a real model: runs what is missing,
then writes the tables and pictures. Stop it when you like; started again, it continues.

A run is one method on one task with one seed, in a process of its own, with its output in
out/results/TASK/METHOD-SEED or, of a real model, out/results/MODEL/TASK/METHOD-SEED (see jobs.py).

    python results/reproduce.py                         # all: an hour and a half on 2 cores, two runs at once
    python results/reproduce.py --tasks tiny --seeds 0  # some of it
    python results/reproduce.py --tables                # only the tables, from the runs that are there

    python results/reproduce.py --model Qwen2.5-1.5B --tasks flawed_fictions next_chapter --plan
                                                        # hours and disk of each run (see paper.py); without
                                                        #   --plan it then runs them
    python results/reproduce.py --model Qwen2.5-1.5B --n 4 --samples 1 --out out/try \\
        --rl-flags="--steps 2 --prompts 2 --group 4"    # is all in place? Minutes instead of days
"""
import argparse
import json
import os
import shlex
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)

import torch

import data
import report
import runs
from eval import bootstrap
from results import jobs, paper
from results.jobs import Job, is_done, read_json
from runs import UserError

# (name in the tables, directory, command); the first runs are those the most is asked about
METHODS = [
    ("LiteReason", "litereason", "train_rl.py"),
    ("RL without latents", "rl", "train_rl.py --method grpo"),
    ("RL with tags, no latents", "tag", "train_rl.py --method tag"),
    ("pause tokens", "pause", "train_rl.py --projector pause"),
    ("RL + length penalty", "rl-lp", "train_rl.py --method grpo --overlong-buffer {most}"),
    ("RL + late length penalty", "rl-late", "train_rl.py --method grpo --overlong-buffer {late}"),
    ("LiteReason + length penalty", "litereason-lp", "train_rl.py --overlong-buffer {most}"),
    ("Soft Thinking", "soft-thinking", "baselines.py --method soft-thinking"),
    ("MoI", "moi", "baselines.py --method moi"),
    ("Coconut", "coconut", "baselines.py --method coconut"),
    ("CoLaR", "colar", "baselines.py --method colar"),
    ("projector never refreshed", "no-refresh", "train_rl.py --no-refresh"),
    ("projector from random numbers", "random", "train_rl.py --projector random"),
]
ORDER = ["base, explicit reasoning", "base, tag prompt", "MoI", "Soft Thinking", "Coconut", "CoLaR",
         "RL without latents", "RL + length penalty", "RL + late length penalty", "LiteReason before RL",
         "LiteReason", "LiteReason, its latents taken away", "LiteReason + length penalty",
         "RL with tags, no latents", "pause tokens", "projector never refreshed",
         "projector from random numbers"]
# Of each seed's LiteReason, when that has been trained.
CONTROLS = ("controls", "eval.py --controls --model {litereason}")
# The length penalty grows from the first token to 1 at the limit of 160; the late one begins 60 tokens
# before it. The paper does not give its own. Next chapters earn percents, beside which a penalty of at most
# 1 is nothing: none is run there.
TASKS = {"tiny": {"most": 160, "late": 60}, "tiny.next_chapter": {}}


# ============================================================ the tiny world's runs
def methods_of(task):
    """The METHODS that are run on a task."""
    return [method for method in METHODS if "{" not in method[2] or TASKS[task]]


def directory(task, method, seed):
    return os.path.join(ROOT, "out", "results", task, f"{method}-{seed}")


def all_jobs(tasks, seeds):
    """[Job], in the order in which they are run."""
    found = []
    for task in tasks:
        for seed in seeds:
            places = {"litereason": directory(task, "litereason", seed), **TASKS[task]}
            for method, command in [own[1:] for own in methods_of(task)] + [CONTROLS]:
                words = f"{command.format(**places)} --task {task} --seed {seed}".split()
                needs = [places["litereason"]] if method == CONTROLS[0] else []
                found.append(Job(f"{task} {method} seed {seed}", directory(task, method, seed), words, needs))
    return found


# ============================================================ from runs to rows
def tokens_sampled(out):
    """How many tokens, latents included, a run's RL sampled; None if it had none."""
    if not os.path.exists(os.path.join(out, "metrics.jsonl")):
        return None
    config = read_json(os.path.join(out, "config.json"))
    with open(os.path.join(out, "metrics.jsonl")) as file:
        steps = [json.loads(line) for line in file]
    per_rollout = sum(step["text_tokens"] + step["latent_steps"] for step in steps)
    return per_rollout * config["prompts"] * config["group"]


def is_own(row):
    """Whether a row of results.json is the method itself, not what it began with or a control under it."""
    name = row["model"]
    return not name.startswith((" ", "base", "LiteReason before")) and not name.endswith("SFT")


def rows_of(task, seeds):
    """{name in the table: {seed: row}}; a row is evaluate's result, with what the training took."""
    found = {}
    for seed in seeds:
        for name, method, command in methods_of(task):
            out = directory(task, method, seed)
            if not is_done(out):
                continue
            rows = read_json(os.path.join(out, "results.json"))
            own = [row for row in rows if is_own(row)][-1]
            found.setdefault(name, {})[seed] = {
                **own,
                "sampled": tokens_sampled(out),
                "run_seconds": read_json(os.path.join(out, "seconds.json")),
                "command": f"python {command.format(**TASKS[task])}",
            }
            if method != "litereason":
                continue
            for row in rows:  # its other rows, which cost no run of their own
                if row["model"] != own["model"]:
                    is_control = row["model"].startswith(" ")
                    other = f"LiteReason, {row['model'].strip()}" if is_control else row["model"]
                    free = {"sampled": None, "run_seconds": None, "command": ""}
                    found.setdefault(other, {})[seed] = {**row, **free}
    return {name: found[name] for name in sorted(found, key=ORDER.index)}


def summary(rows):
    """{seed: row} -> means over seeds; accuracy_ci95: bootstrap over test examples, of the mean of seeds."""
    seeds = list(rows.values())

    def mean(key):
        return None if seeds[0].get(key) is None else sum(row[key] for row in seeds) / len(seeds)

    by_example = zip(*(row["per_example"]["score"] for row in seeds))
    accuracies = [row["accuracy"] for row in seeds]
    means = ("tokens", "text_tokens", "latent_steps", "tags", "truncated", "forward_positions", "flops",
             "seconds_each", "seconds_alone", "sampled", "run_seconds", "n_examples", "samples")
    return {
        "seeds": sorted(rows),
        "runs": len(rows),
        "accuracy": mean("accuracy"),
        "accuracy_ci95": bootstrap([sum(scores) / len(scores) for scores in by_example]),
        "by_seed": accuracies,
        "spread": [min(accuracies), max(accuracies)],
        "tokens_by_seed": [row["tokens"] for row in seeds],
        "command": seeds[0]["command"],
        **{key: mean(key) for key in means},
    }


def controls_of(folders):
    """The control runs of all seeds -> {control: [row, one per seed]}"""
    found = {}
    for folder in folders:
        for row in read_json(os.path.join(folder, "results.json"), []):
            kept = {key: value for key, value in row.items() if key != "per_example"}
            found.setdefault(row["control"], []).append(kept)
    return found


# ============================================================ from rows to Markdown
def in_cell(value, digits, unit=1):
    """A number for a cell of the table, in units of `unit`; "" for None."""
    return "" if value is None else f"{value / unit:.{digits}f}"


def table_of(task, found):
    """-> Markdown. Differences that are too small to mean anything are for the reader to see: the interval
    stands beside them."""
    digits = 1 if task == "tiny.next_chapter" else 3
    score = "reward, %" if task.endswith("next_chapter") else "accuracy"
    lines = [f"| {task}, test split | {score} | 95 % interval | by seed | tokens | text | latent | "
             "GFLOP an answer | s alone | M tokens sampled in RL | s in all | command |",
             "|---|---|---|---|---|---|---|---|---|---|---|---|"]
    for name, row in found.items():
        low, high = row["accuracy_ci95"]
        lines.append("| " + " | ".join([
            name,
            in_cell(row["accuracy"], digits),
            f"{in_cell(low, digits)} to {in_cell(high, digits)}",
            ", ".join(in_cell(accuracy, digits) for accuracy in row["by_seed"]),
            in_cell(row["tokens"], 1),
            in_cell(row["text_tokens"], 1),
            in_cell(row["latent_steps"], 1),
            in_cell(row["flops"], 3, 1e9),
            in_cell(row["seconds_alone"], 2),
            in_cell(row["sampled"], 2, 1e6),
            in_cell(row["run_seconds"], 0),
            row["command"] and f"`{row['command']}`",
        ]) + " |")
    return "\n".join(lines)


def headline(found):
    """The README's first table: the claim, and beside it the row that it has to be read with."""
    lines = ["| plot holes, tiny world | accuracy | tokens |", "|---|---|---|"]
    for name in ("base, explicit reasoning", "LiteReason before RL", "LiteReason", "RL without latents",
                 "RL with tags, no latents"):
        if name in found:
            lines.append(f"| {name} | {found[name]['accuracy']:.3f} | {found[name]['tokens']:.1f} |")
    return "\n".join(lines)


PLAINLY = {
    "plain": "as trained",
    "latents: zeros": "zeros for latents",
    "latents: noise": "noise of the same length",
    "latents: mean": "one vector, the mean latent",
    "latents: other": "another story's latents",
    "latents: warm": "the warm start's latents",
    "latents: none": "no latents",
}


def controls_table(found):
    """-> Markdown, with each seed's figures in a cell.

    p is McNemar's against the same model as trained, without a correction for the many tests."""
    lines = ["| control | accuracy by seed | gained, mean | tokens by seed | p by seed |",
             "|---|---|---|---|---|"]
    for name, rows in found.items():
        against = [row["against_plain"] for row in rows]
        gained = f" {sum(own['accuracy'] for own in against) / len(against):+.3f} "
        p = ", ".join(f"{own['mcnemar_p']:.2g}" for own in against)
        if name == "plain":  # against itself
            gained = " "
            p = ""
        accuracies = ", ".join(f"{row['accuracy']:.3f}" for row in rows)
        tokens = ", ".join(f"{row['tokens']:.1f}" for row in rows)
        lines.append(f"| {PLAINLY.get(name, name)} | {accuracies} |{gained}| {tokens} | {p} |")
    return "\n".join(lines)


def into_readme(name, text):
    """Puts text between the README's marks <!-- NAME --> and <!-- /NAME -->."""
    path = os.path.join(ROOT, "README.md")
    with open(path, encoding="utf-8") as file:
        readme = file.read()
    begin = f"<!-- {name} -->\n"
    end = f"\n<!-- /{name} -->"
    if begin in readme and end in readme:
        before, _, rest = readme.partition(begin)
        _, _, after = rest.partition(end)
        runs.write_text(path, before + begin + text + end + after)


# ============================================================ files
def write_tables(tasks, seeds):
    """Tables and pictures of the tiny world's runs that are done, into results/ and the README."""
    for task in tasks:
        found = {name: summary(rows) for name, rows in rows_of(task, seeds).items()}
        if not found:
            continue
        path = os.path.join(HERE, f"methods-{task}.json")
        runs.write_json(path, found)
        into_readme(f"methods-{task}", table_of(task, found))
        controls = controls_of([directory(task, CONTROLS[0], seed) for seed in seeds])
        if controls:
            runs.write_json(os.path.join(HERE, f"controls-{task}.json"), controls)
            into_readme(f"controls-{task}", controls_table(controls))
        if task == "tiny":
            into_readme("headline", headline(found))
        print(table_of(task, found) + "\n")
        folders = [directory(task, method, seeds[0]) for method in ("litereason", "rl", "tag", "pause")]
        draw(folders, HERE, task, path)


def write_tables_of_model(args):
    """The same of a real model's runs, into files of their own: JSON, Markdown, pictures."""
    for task in args.tasks:
        rows = paper.rows_of(args, task, tokens_sampled)
        found = {name: summary(rows[name]) for name in sorted(rows, key=ORDER.index)}
        if not found:
            continue
        name = f"{paper.short_name(args.model)}.{task}"
        path = os.path.join(args.tables_in, f"methods-{name}.json")
        runs.write_json(path, found)
        text = f"{table_of(task, found)}\n\n{paper.caption(args, task, found)}\n"
        controls = controls_of([paper.directory(args, task, CONTROLS[0], seed) for seed in args.seeds])
        if controls:
            runs.write_json(os.path.join(args.tables_in, f"controls-{name}.json"), controls)
            text += f"\n{controls_table(controls)}\n"
        runs.write_text(path.removesuffix("json") + "md", text)
        print(f"\n{text}\nin {path} and .md")
        folders = [paper.directory(args, task, method, args.seeds[0]) for method in paper.METHODS]
        draw(folders, args.tables_in, name, path)


def draw(folders, where, name, table):
    """The two pictures of a task: the methods' scores over tokens, and the training of the runs in some
    folders."""
    trained = [path for path in folders if os.path.exists(os.path.join(path, "metrics.jsonl"))]
    trained = [os.path.relpath(path) for path in trained]
    try:  # matplotlib is not among the requirements
        report.curve(report.collect([table]), os.path.join(where, f"curve-{name}.svg"))
        if trained:
            report.training(trained, os.path.join(where, f"training-{name}.svg"))
    except UserError as e:
        print(f"no pictures: {e}")


# ============================================================ the script
OF_A_MODEL = ("plan", "out", "methods", "n", "samples", "max_new_tokens", "reward", "scorer", "device",
              "rl_flags", "projector_flags", "eval_flags", "keep_states")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="tiny (the README's comparison), a directory, or a "
                        "hub name such as Qwen2.5-1.5B (the paper's table)")
    parser.add_argument("--tasks", nargs="+",
                        help=f"default: {' '.join(TASKS)}; of a real model flawed_fictions")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 0 1 2; of a real model 0")
    parser.add_argument("--jobs", type=int, help="runs at a time (default: 1 on a GPU, else 2, one core each "
                        "in the tiny world)")
    parser.add_argument("--tables", action="store_true", help="run nothing")
    g = parser.add_argument_group("of a real model")
    g.add_argument("--plan", "--dry-run", action="store_true", help="say what will be run, the hours and the "
                   "disk; start nothing")
    g.add_argument("--out", metavar="DIR", help="runs and tables go there (default: runs into "
                   "out/results/MODEL, tables into results/)")
    g.add_argument("--methods", nargs="+", default=paper.METHODS, choices=paper.METHODS,
                   help="beside the base (default all)")
    g.add_argument("--n", type=int, help="test examples (default all)")
    g.add_argument("--samples", type=int, default=10, help="answers to each (default 10, as released)")
    g.add_argument("--max-new-tokens", type=int, default=2048, help="per answer, everywhere (default 2048)")
    g.add_argument("--reward", choices=["contrastive", "vrcli", "thresholded"],
                   help="of next_chapter (default contrastive)")
    g.add_argument("--scorer", metavar="NAME", help="of next_chapter: the frozen model that reads chapters "
                   "(default: a copy of the base)")
    g.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    for script, name in (("train_rl.py", "rl"), ("train_projector.py", "projector"), ("eval.py", "eval")):
        g.add_argument(f"--{name}-flags", default="", metavar="FLAGS", help=f"more for each {script}, as in "
                       f"--{name}-flags=\"--device cpu\"; the tables say them")
    g.add_argument("--keep-states", action="store_true", help="leave the states of finished runs on the "
                   "disk: they can be continued with more --steps")
    args = parser.parse_args()
    is_tiny = args.model == "tiny"
    for name in OF_A_MODEL:
        if is_tiny and getattr(args, name) != parser.get_default(name):
            raise UserError(f"--{name.replace('_', '-')} is for a real --model; the tiny world's comparison "
                            f"is the README's")
    args.tasks = args.tasks or (list(TASKS) if is_tiny else ["flawed_fictions"])
    args.seeds = args.seeds or ([0, 1, 2] if is_tiny else [0])
    on_gpu = not is_tiny and torch.cuda.is_available() and args.device != "cpu"
    args.jobs = (1 if on_gpu else 2) if args.jobs is None else args.jobs
    args.threads = 1 if is_tiny else None if on_gpu else max(1, (os.cpu_count() or 1) // max(1, args.jobs))
    return args


def check_arguments(args):
    """UserError for a wrong word."""
    runs.check_arguments(argparse.Namespace(**{**vars(args), "out": None}))
    for task in args.tasks:
        if args.model == "tiny" and task not in TASKS:
            raise UserError(f"--tasks {task} takes a --model: the tiny world's are {', '.join(TASKS)}")


def settle(args):
    """Directories from wherever the script was started, and flags as lists of words."""
    if os.path.isdir(args.model):
        args.model = os.path.abspath(args.model)
    if args.scorer and os.path.isdir(args.scorer):
        args.scorer = os.path.abspath(args.scorer)
    args.tables_in = os.path.abspath(args.out) if args.out else HERE
    args.out = args.tables_in if args.out else paper.default_out(args.model)
    for name in ("rl_flags", "projector_flags", "eval_flags"):
        setattr(args, name, shlex.split(getattr(args, name)))


def run_model(args):
    """The plan, then the runs, then the tables; of what is there if some have failed."""
    todo = paper.all_jobs(args)
    for task in args.tasks:  # what is missing is said before a model is fetched
        for split in data.SPLITS:
            data.load_task(task).examples(split)
    jobs.check(todo)
    runs.make_directory(args.out)
    figures = paper.measured(args)
    paper.say_plan(args, todo, figures)
    if args.plan:
        return
    lock_file = runs.lock(args.out)  # noqa: F841  a second command would start the same runs
    try:
        jobs.run(todo, args.jobs, args.threads)
    finally:
        write_tables_of_model(args)


def main():
    args = parse_arguments()
    check_arguments(args)
    if args.model == "tiny":
        if not args.tables:
            todo = all_jobs(args.tasks, args.seeds)
            jobs.check(todo)
            jobs.run(todo, args.jobs, args.threads)
        write_tables(args.tasks, args.seeds)
        return
    settle(args)
    if args.tables:
        write_tables_of_model(args)
    else:
        run_model(args)


if __name__ == "__main__":
    runs.run_script(main)
