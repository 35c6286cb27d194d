"""Makes the README's comparison from nothing: runs what is missing, then writes the tables and pictures.
Stop it when you like; started again, it continues.

A run is one method on one task with one seed, in its own process on one core, with its output in
out/results/TASK/METHOD-SEED. A run that has its results.json is done; one of train_rl.py that was stopped
is resumed from its last state; any other begins again.

    python results/reproduce.py                         # all: an hour and a half on 2 cores, two runs at once
    python results/reproduce.py --tasks tiny --seeds 0  # some of it
    python results/reproduce.py --tables                # only the tables, from the runs that are there
"""
import argparse
import json
import os
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)

import report
import runs
from eval import bootstrap
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


# ============================================================ running what is missing
def methods_of(task):
    """The METHODS that are run on a task."""
    return [method for method in METHODS if "{" not in method[2] or TASKS[task]]


def directory(task, method, seed):
    return os.path.join(ROOT, "out", "results", task, f"{method}-{seed}")


def is_done(task, method, seed):
    return os.path.exists(os.path.join(directory(task, method, seed), "results.json"))


def read_json(path, default=None):
    """What is in the file; `default` if there is none."""
    if not os.path.exists(path):
        return default
    with open(path) as file:
        return json.load(file)


def start(task, method, command, seed):
    """-> the process, in the background on one core, its output in log.txt."""
    out = directory(task, method, seed)
    os.makedirs(out, exist_ok=True)
    command = command.format(litereason=directory(task, "litereason", seed), **TASKS[task])
    words = f"{command} --task {task} --seed {seed} --out {out}".split()
    if command.startswith("train_rl.py") and any(name.startswith("state-") for name in os.listdir(out)):
        words = ["train_rl.py", "--resume", out]
    log = open(os.path.join(out, "log.txt"), "a")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=log, stderr=log, env=env)


def missing_jobs(tasks, seeds):
    """[(task, method, command, seed)] of the runs that are not done, in their order."""
    jobs = []
    for task in tasks:
        for seed in seeds:
            for method, command in [own[1:] for own in methods_of(task)] + [CONTROLS]:
                if not is_done(task, method, seed):
                    jobs.append((task, method, command, seed))
    return jobs


def note_end(process, job, began, done):
    """Adds the seconds to seconds.json, a sum over all its starts, and says how it ended."""
    task, method, _, seed = job
    seconds = time.time() - began
    path = os.path.join(directory(task, method, seed), "seconds.json")
    runs.write_json(path, seconds + read_json(path, 0))
    failed = ", failed" if process.returncode else ""
    print(f"{done} {task} {method} seed {seed}: {seconds:.0f}s{failed}", flush=True)


def run_missing(tasks, seeds, n_jobs):
    """Runs what is not done, n_jobs at a time; UserError that names the logs if any failed."""
    waiting = missing_jobs(tasks, seeds)
    total = len(waiting)
    running = {}  # process -> (job, when it was started)
    failed = []
    try:
        while waiting or running:
            while waiting and len(running) < n_jobs:
                job = waiting.pop(0)
                task, method, _, seed = job
                if method == CONTROLS[0] and not is_done(task, "litereason", seed):
                    failed.append(f"{task} controls of seed {seed}: there is no finished LiteReason run")
                    continue
                running[start(*job)] = job, time.time()
            time.sleep(1)
            for process in [process for process in running if process.poll() is not None]:
                job, began = running.pop(process)
                task, method, _, seed = job
                if process.returncode:
                    failed.append(f"{directory(task, method, seed)}/log.txt")
                note_end(process, job, began, f"{total - len(waiting) - len(running):3d}/{total}")
    finally:  # Ctrl-C: train_rl.py saves its state
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
    if failed:
        raise UserError(f"{len(failed)} runs failed, see {', '.join(failed)}; run this again for what is "
                        f"missing")


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
            if not is_done(task, method, seed):
                continue
            out = directory(task, method, seed)
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
             "seconds_each", "seconds_alone", "sampled", "run_seconds")
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


def controls_of(task, seeds):
    """The control runs of all seeds -> {control: [row, one per seed]}"""
    found = {}
    for seed in seeds:
        path = os.path.join(directory(task, CONTROLS[0], seed), "results.json")
        for row in read_json(path, []):
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
    digits = 3 if task == "tiny" else 1
    score = "accuracy" if task == "tiny" else "reward, %"
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


# ============================================================ the script
def draw(task, seed, table):
    """The two pictures of a task: the methods' accuracy over tokens, and the training of some of them."""
    folders = [directory(task, method, seed) for method in ("litereason", "rl", "tag", "pause")]
    trained = [path for path in folders if os.path.exists(os.path.join(path, "metrics.jsonl"))]
    trained = [os.path.relpath(path) for path in trained]
    try:  # matplotlib is not among the requirements
        report.curve(report.collect([table]), os.path.join(HERE, f"curve-{task}.svg"))
        report.training(trained, os.path.join(HERE, f"training-{task}.svg"))
    except UserError as e:
        print(f"no pictures: {e}")


def write_tables(tasks, seeds):
    """Tables and pictures of what is done, into results/ and the README."""
    for task in tasks:
        found = {name: summary(rows) for name, rows in rows_of(task, seeds).items()}
        if not found:
            continue
        path = os.path.join(HERE, f"methods-{task}.json")
        runs.write_json(path, found)
        into_readme(f"methods-{task}", table_of(task, found))
        controls = controls_of(task, seeds)
        if controls:
            runs.write_json(os.path.join(HERE, f"controls-{task}.json"), controls)
            into_readme(f"controls-{task}", controls_table(controls))
        if task == "tiny":
            into_readme("headline", headline(found))
        print(table_of(task, found) + "\n")
        draw(task, seeds[0], path)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--tables", action="store_true", help="run nothing")
    args = parser.parse_args()
    if args.jobs < 1:
        raise UserError(f"--jobs is {args.jobs}; it must be at least 1")
    return args


def main():
    args = parse_arguments()
    if not args.tables:
        run_missing(args.tasks, args.seeds, args.jobs)
    write_tables(args.tasks, args.seeds)


if __name__ == "__main__":
    runs.run_script(main)
