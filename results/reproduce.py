"""Makes the README's comparison from nothing: runs what is missing, then writes the tables and pictures. Stop it when you like; it goes on.

A run is one method on one task with one seed, in its own process on one core, with its output in out/results/TASK/METHOD-SEED. A run that has its
results.json is done; one of train_rl.py that was stopped is resumed from its last state; any other begins again.

    python results/reproduce.py                            # all: an hour and a half on 2 cores, two runs at a time
    python results/reproduce.py --tasks tiny --seeds 0     # some of it
    python results/reproduce.py --tables                   # only the tables, from the runs that are there
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

from eval import bootstrap
from report import collect, curve, training
from runs import UserError, run_script, write_json

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
ORDER = ["base, explicit reasoning", "base, tag prompt", "MoI", "Soft Thinking", "Coconut", "CoLaR", "RL without latents", "RL + length penalty",
         "RL + late length penalty", "LiteReason before RL", "LiteReason", "LiteReason, its latents taken away", "LiteReason + length penalty", "RL with tags, no latents", "pause tokens", "projector never refreshed",
         "projector from random numbers"]
CONTROLS = ("controls", "eval.py --controls --model {litereason}")  # of each seed's LiteReason, when that has been trained
# The length penalty grows from the first token to 1 at the limit of 160; the late one begins 60 tokens before it. The paper does not give its own.
# Next chapters earn percents, beside which a penalty of at most 1 is nothing: none is run there.
TASKS = {"tiny": {"most": 160, "late": 60}, "tiny.next_chapter": {}}


def methods_of(task):
    return [m for m in METHODS if "{" not in m[2] or TASKS[task]]


def directory(task, method, seed):
    return os.path.join(ROOT, "out", "results", task, f"{method}-{seed}")


def start(task, method, command, seed):
    """-> the process, in the background on one core, its output in log.txt."""
    out = directory(task, method, seed)
    os.makedirs(out, exist_ok=True)
    words = f"{command.format(litereason=directory(task, 'litereason', seed), **TASKS[task])} --task {task} --seed {seed} --out {out}".split()
    if command.startswith("train_rl.py") and any(name.startswith("state-") for name in os.listdir(out)):
        words = ["train_rl.py", "--resume", out]
    log = open(os.path.join(out, "log.txt"), "a")
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})


def run_missing(tasks, seeds, jobs):
    waiting = [(task, method, command, seed) for task in tasks for seed in seeds for method, command in [m[1:] for m in methods_of(task)] + [CONTROLS]
               if not os.path.exists(os.path.join(directory(task, method, seed), "results.json"))]
    total, failed, running = len(waiting), [], {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                job = waiting.pop(0)
                if job[1] == CONTROLS[0] and not os.path.exists(os.path.join(directory(job[0], "litereason", job[3]), "results.json")):
                    failed.append(f"{job[0]} controls of seed {job[3]}: there is no finished LiteReason run")
                    continue
                running[start(*job)] = job, time.time()
            time.sleep(1)
            for process in [p for p in running if p.poll() is not None]:
                (task, method, _, seed), began = running.pop(process)
                spent = os.path.join(directory(task, method, seed), "seconds.json")  # over all the times it was started
                write_json(spent, time.time() - began + (json.load(open(spent)) if os.path.exists(spent) else 0))
                failed += [f"{directory(task, method, seed)}/log.txt"] if process.returncode else []
                print(f"{total - len(waiting) - len(running):3d}/{total} {task} {method} seed {seed}: {time.time() - began:.0f}s"
                      f"{', failed' if process.returncode else ''}", flush=True)
    finally:  # Ctrl-C: train_rl.py saves its state
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
    if failed:
        raise UserError(f"{len(failed)} runs failed, see {', '.join(failed)}; run this again for what is missing")


def rows_of(task, seeds):
    """{name in the table: {seed: row}}; a row is evaluate's result, with what the training took."""
    found = {}
    for seed in seeds:
        for name, method, command in methods_of(task):
            out = directory(task, method, seed)
            if not os.path.exists(os.path.join(out, "results.json")):
                continue
            rows, sampled = json.load(open(os.path.join(out, "results.json"))), None
            if os.path.exists(os.path.join(out, "metrics.jsonl")):
                config = json.load(open(os.path.join(out, "config.json")))
                lines = [json.loads(line) for line in open(os.path.join(out, "metrics.jsonl"))]
                sampled = sum(m["text_tokens"] + m["latent_steps"] for m in lines) * config["prompts"] * config["group"]
            own = [r for r in rows if not r["model"].startswith((" ", "base", "LiteReason before")) and not r["model"].endswith("SFT")][-1]
            seconds = json.load(open(os.path.join(out, "seconds.json"))) if os.path.exists(os.path.join(out, "seconds.json")) else None
            found.setdefault(name, {})[seed] = {**own, "sampled": sampled, "run_seconds": seconds, "command": f"python {command.format(**TASKS[task])}"}
            for r in rows if method == "litereason" else []:  # its other rows, which cost no run of their own
                if r["model"] != own["model"]:
                    row = f"LiteReason, {r['model'].strip()}" if r["model"].startswith(" ") else r["model"]
                    found.setdefault(row, {})[seed] = {**r, "sampled": None, "run_seconds": None, "command": ""}
    return {name: found[name] for name in sorted(found, key=ORDER.index)}


def summary(rows):
    """{seed: row} -> means over seeds; accuracy_ci95: bootstrap over the test examples of the seeds' mean score."""
    seeds = list(rows.values())
    mean = lambda key: None if seeds[0].get(key) is None else sum(r[key] for r in seeds) / len(seeds)
    per_example = [sum(s) / len(s) for s in zip(*(r["per_example"]["score"] for r in seeds))]
    scores = [r["accuracy"] for r in seeds]
    return {"seeds": sorted(rows), "runs": len(rows), "accuracy": mean("accuracy"), "accuracy_ci95": bootstrap(per_example), "by_seed": scores,
            "spread": [min(scores), max(scores)],
            "tokens_by_seed": [r["tokens"] for r in seeds], "command": seeds[0]["command"],
            **{k: mean(k) for k in ("tokens", "text_tokens", "latent_steps", "tags", "truncated", "forward_positions", "flops", "seconds_each",
                                    "seconds_alone", "sampled", "run_seconds")}}


def table_of(task, found):
    """-> Markdown. Differences that are too small to be any are for the reader to see: the interval is in the same line."""
    form = (lambda v: f"{v:.3f}") if task == "tiny" else (lambda v: f"{v:.1f}")
    say = lambda v, f, unit=1: "" if v is None else f.format(v / unit)
    out = [f"| {task}, test split | {'accuracy' if task == 'tiny' else 'reward, %'} | 95 % interval | by seed | tokens | text | latent | GFLOP an answer | "
           "s alone | M tokens sampled in RL | s in all | command |", "|---|---|---|---|---|---|---|---|---|---|---|---|"]
    for name, r in found.items():
        out.append(f"| {name} | {form(r['accuracy'])} | {form(r['accuracy_ci95'][0])} to {form(r['accuracy_ci95'][1])} | {', '.join(map(form, r['by_seed']))} | "
                   f"{r['tokens']:.1f} | {r['text_tokens']:.1f} | {r['latent_steps']:.1f} | {say(r['flops'], '{:.3f}', 1e9)} | {say(r['seconds_alone'], '{:.2f}')} | "
                   f"{say(r['sampled'], '{:.2f}', 1e6)} | {say(r['run_seconds'], '{:.0f}')} | {r['command'] and '`' + r['command'] + '`'} |")
    return "\n".join(out)


def headline(found):
    """The README's first table: the claim, and beside it the row that it has to be read with."""
    names = ["base, explicit reasoning", "LiteReason before RL", "LiteReason", "RL without latents", "RL with tags, no latents"]
    return "\n".join(["| plot holes, tiny world | accuracy | tokens |", "|---|---|---|"] +
                     [f"| {name} | {found[name]['accuracy']:.3f} | {found[name]['tokens']:.1f} |" for name in names if name in found])


def controls_of(task, seeds):
    """The control runs of all seeds -> {control: [row, one per seed]}"""
    found = {}
    for seed in seeds:
        path = os.path.join(directory(task, CONTROLS[0], seed), "results.json")
        for row in json.load(open(path)) if os.path.exists(path) else []:
            found.setdefault(row["control"], []).append({k: v for k, v in row.items() if k != "per_example"})
    return found


PLAINLY = {"plain": "as trained", "latents: zeros": "zeros for latents", "latents: noise": "noise of the same length", "latents: mean": "one vector, the mean latent",
           "latents: other": "another story's latents", "latents: warm": "the warm start's latents", "latents: none": "no latents"}


def controls_table(found):
    """-> Markdown, a column for each seed's figures; p is McNemar's against the same model as trained, without a correction for the many tests."""
    out = ["| control | accuracy by seed | gained, mean | tokens by seed | p by seed |", "|---|---|---|---|---|"]
    say = lambda values, f: ", ".join(f"{v:{f}}" for v in values)
    for name, rows in found.items():
        d = [r["against_plain"] for r in rows]
        more = " | | " if name == "plain" else f" | {sum(x['accuracy'] for x in d) / len(d):+.3f} | "
        out.append(f"| {PLAINLY.get(name, name)} | {say([r['accuracy'] for r in rows], '.3f')}{more}"
                   f"{say([r['tokens'] for r in rows], '.1f')} | {'' if name == 'plain' else say([x['mcnemar_p'] for x in d], '.2g')} |")
    return "\n".join(out)


def into_readme(name, text):
    """Puts text between the README's marks <!-- NAME --> and <!-- /NAME -->."""
    path = os.path.join(ROOT, "README.md")
    readme = open(path, encoding="utf-8").read()
    begin, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
    if begin in readme and end in readme:
        head, _, rest = readme.partition(begin)
        with open(path + ".tmp", "w", encoding="utf-8") as f:
            f.write(head + begin + text + end + rest.partition(end)[2])
        os.replace(path + ".tmp", path)


def write_tables(tasks, seeds):
    for task in tasks:
        found = {name: summary(rows) for name, rows in rows_of(task, seeds).items()}
        if not found:
            continue
        path = os.path.join(HERE, f"methods-{task}.json")
        write_json(path, found)
        into_readme(f"methods-{task}", table_of(task, found))
        controls = controls_of(task, seeds)
        if controls:
            write_json(os.path.join(HERE, f"controls-{task}.json"), controls)
            into_readme(f"controls-{task}", controls_table(controls))
        if task == "tiny":
            into_readme("headline", headline(found))
        print(table_of(task, found) + "\n")
        try:  # matplotlib is not among the requirements
            curve(collect([path]), os.path.join(HERE, f"curve-{task}.svg"))
            runs = [directory(task, method, seeds[0]) for method in ("litereason", "rl", "tag", "pause")]
            training([os.path.relpath(d) for d in runs if os.path.exists(os.path.join(d, "metrics.jsonl"))], os.path.join(HERE, f"training-{task}.svg"))
        except UserError as e:
            print(f"no pictures: {e}")


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    ap.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    ap.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    ap.add_argument("--tables", action="store_true", help="run nothing")
    args = ap.parse_args()
    if args.jobs < 1:
        raise UserError(f"--jobs is {args.jobs}; it must be at least 1")
    if not args.tables:
        run_missing(args.tasks, args.seeds, args.jobs)
    write_tables(args.tasks, args.seeds)


if __name__ == "__main__":
    run_script(main)
