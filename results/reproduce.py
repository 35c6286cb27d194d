"""Makes the README's comparison from nothing, or the paper's table for a real model: runs what is missing,
then writes the tables and pictures. Stop it when you like; started again, it continues.

A run is one method on one task with one seed, in a process of its own, with its output in
out/results/TASK/METHOD-SEED or, of a real model, out/results/MODEL/TASK/METHOD-SEED (see jobs.py). In the
tiny world each is evaluated three times: on test stories at the paper's sampling and at temperature 1, and on
stories that it was trained on, so that what was only memorised shows.

    python results/reproduce.py                         # all: hours on 2 cores, two runs at once
    python results/reproduce.py --tasks tiny --seeds 0  # some of it
    python results/reproduce.py --tables                # only the tables, from the runs that are there and
                                                        #   from those kept in results/runs-TASK.jsonl

    python results/reproduce.py --model Qwen2.5-1.5B --tasks flawed_fictions next_chapter --plan
                                                        # hours and disk of each run (see paper.py); without
                                                        #   --plan it then runs them
    python results/reproduce.py --model Qwen2.5-1.5B --n 4 --samples 1 --out out/try \\
        --rl-flags="--steps 2 --prompts 2 --group 4"    # is all in place? Minutes instead of days
"""
import argparse
import json
import os
import re
import shlex
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)

import torch

import data
from lib import display, run, checkpoint
from results import plots
from results import evidence, findings, jobs, kept, paper
from results import latents as read_latents
from results.jobs import Job, read_json
from lib import UserError

TASKS = ("tiny", "tiny.next_chapter")
# (name in the tables, directory, command), in the order of the tables and of the runs. {NAME} is the
# directory of another row, which is run before. An eval.py row trains nothing.
PROJECTOR = "train_projector.py --prompts 6000"
BASE_LEARNS = "--lr 2e-3 --train-base 5e-4"
FROZEN = f"{PROJECTOR} --steps 1200"
STAGES = f"{FROZEN} {BASE_LEARNS}"
LONG_STAGES = f"{PROJECTOR} --steps 2400 {BASE_LEARNS}"
# Stages 1 and 2 of a model that RL without latents has made: its traces are nearly all right.
AFTER_RL = STAGES.replace("train_projector.py", "train_projector.py --model {rl}")
RL = "--steps 96 --lr-schedule cosine"
# The length penalty grows from the first token to the length limit; the late one begins 60 tokens before it.
# The paper does not give its own.
PENALTY = f"{RL} --overlong-buffer {checkpoint.SLOTS_SMALL}"
LATE = f"{RL} --overlong-buffer 60"
NO_PENALTY = f"{RL} --overlong-buffer 0"
# The paper's refresh; 6 rollout batches were an epoch of its 290 stories.
PAPERS = "--targets none --refresh-every 6"
METHODS = [
    ("base, explicit reasoning", "base", "eval.py --model tiny:plain"),
    ("base, tag prompt", "base-tag", "eval.py --model tiny"),
    ("LiteReason before RL", "projector", STAGES),
    ("LiteReason + length penalty", "litereason-lp", f"train_rl.py --model {{projector}} {PENALTY}"),
    ("LiteReason + length penalty, its latents taken away", "litereason-lp-text",
     "eval.py --model {litereason-lp} --latent none"),
    ("RL with tags + length penalty", "tag-lp", f"train_rl.py --method tag {PENALTY}"),
    ("RL without latents", "rl", f"train_rl.py --method grpo {NO_PENALTY}"),
    ("RL + length penalty", "rl-lp", f"train_rl.py --method grpo {PENALTY}"),
    ("LiteReason", "litereason", f"train_rl.py --model {{projector}} {NO_PENALTY}"),
    ("LiteReason, its latents taken away", "litereason-text", "eval.py --model {litereason} --latent none"),
    ("RL with tags, no latents", "tag", f"train_rl.py --method tag {NO_PENALTY}"),
    ("RL + late length penalty", "rl-late", f"train_rl.py --method grpo {LATE}"),
    ("the paper's recipe, before RL", "paper-stages", f"{FROZEN} --targets none --lr 1e-3"),
    ("the paper's recipe + length penalty", "paper-lp",
     f"train_rl.py --model {{paper-stages}} {PENALTY} {PAPERS}"),
    ("the paper's recipe", "paper",
     f"train_rl.py --model {{paper-stages}} {NO_PENALTY} {PAPERS}"),
    ("base frozen, before RL", "frozen", FROZEN),
    ("base frozen + length penalty", "frozen-lp", f"train_rl.py --model {{frozen}} {PENALTY}"),
    ("no anchor + length penalty", "adrift-lp",
     f"train_rl.py --model {{projector}} --anchor 0 {PENALTY}"),
    ("stage 2 twice as long, before RL", "longer", LONG_STAGES),
    ("stage 2 twice as long + length penalty", "longer-lp", f"train_rl.py --model {{longer}} {PENALTY}"),
    ("LiteReason after RL, before its own RL", "after-rl", AFTER_RL),
    ("LiteReason after RL + length penalty", "after-rl-lp",
     f"train_rl.py --model {{after-rl}} {PENALTY}"),
    ("LiteReason after RL + length penalty, another story's latents", "after-rl-lp-other",
     "eval.py --model {after-rl-lp} --latent shuffled"),
    ("RL with tags after RL + length penalty", "after-rl-tag",
     f"train_rl.py --model {{rl}} --method tag {PENALTY}"),
    ("RL with tags + length penalty, after stage 2", "written-lp",
     f"train_rl.py --model {{projector}} --method tag {PENALTY}"),
    ("no noise, before RL", "clean", f"{STAGES} --noise 0"),
    ("no noise + length penalty", "clean-lp", f"train_rl.py --model {{clean}} {PENALTY}"),
    ("pause tokens + length penalty", "pause-lp",
     f"train_rl.py --projector pause {PENALTY} {PAPERS}"),
    ("answer at once", "answer", "results/baselines.py --method answer"),
    ("MoI", "moi", "results/baselines.py --method moi"),
    ("Soft Thinking", "soft-thinking", "results/baselines.py --method soft-thinking"),
    ("Coconut", "coconut", "results/baselines.py --method coconut"),
    ("CoLaR", "colar", "results/baselines.py --method colar --steps 96"),
    ("CoLaR after RL", "colar-rl",
     "results/baselines.py --method colar --model {rl} --lr 1e-3 --epochs 4 --r 2 --rl-lr 1.2e-5 --steps 96"),
]
NOT_RUN = {"tiny.next_chapter": ["answer"]}  # it learns gold answers, which that task has not
CONTROLLED = "litereason-lp"  # the run of each seed whose latents are replaced when it has been trained
# Of each run: (directory behind the method's name, more flags for eval.py). results/baselines.py decodes in its own
# ways, so its runs evaluate themselves: a row of theirs says "sampling" and "split" as eval.py's do, and is
# of temperature 1 and of test stories where it says neither.
EVALUATIONS = [("test", "--sampling paper trained --alone 8"), ("train", "--split train --n 200")]
KINDS = ("paper", "trained", "train")  # of rows: test stories at two samplings, and train stories
# task: [(length of the chain, flags of eval.py that make it so)]: these methods are evaluated at each length.
LENGTHS = {"tiny": [(hops, f"--hops {hops}") for hops in (2, 3, 4, 5, 6)]}
# task: the runs whose latents latents.py reads
READ = {"tiny": ("litereason-lp", "adrift-lp", "frozen-lp", "longer-lp", "after-rl-lp")}
DRAWN = ("litereason-lp", "rl", "tag-lp", "paper-lp")  # in the picture of the training
ON_LENGTHS = ["RL without latents", "LiteReason + length penalty",
              "LiteReason + length penalty, its latents taken away", "RL with tags + length penalty"]


# ============================================================ the tiny world's runs
def directory(task, method, seed):
    return os.path.join(ROOT, "out", "results", task, f"{method}-{seed}")


def words_in_braces(command):
    return re.findall(r"\{(.+?)\}", command)


def jobs_of(task, seed):
    """[Job] of one task and seed, in the order in which they are run."""
    places = {method: directory(task, method, seed) for _, method, _ in METHODS}
    found = []

    def add(method, command, needs=()):
        needs = [*needs, *(places[word] for word in words_in_braces(command))]
        words = [word.format(**places) for word in f"{command} --task {task} --seed {seed}".split()]
        found.append(Job(f"{task} {method} seed {seed}", directory(task, method, seed), words, needs))

    for name, method, command in METHODS:
        if method in NOT_RUN.get(task, []):
            continue
        trained = []  # the run that is evaluated
        evaluation = command
        if not command.startswith("eval.py"):
            trained = [places[method]]
            evaluation = f"eval.py --model {places[method]}"
            add(method, f"{command} --n 0" if command.startswith("train_rl.py") else command)
        if command.startswith("results/baselines.py"):
            continue
        for kind, flags in EVALUATIONS:
            add(f"{method}-{kind}", f"{evaluation} {flags}", trained)
        for length, flags in LENGTHS.get(task, []) if name in ON_LENGTHS else []:
            add(f"{method}-length-{length}", f"{evaluation} {flags}", trained)
        if method in READ.get(task, ()):
            add(f"{method}-read", f"results/latents.py --model {places[method]}", trained)
        if method == CONTROLLED:
            add("controls", f"eval.py --controls --model {places[method]} --sampling paper trained", trained)
    return found


def all_jobs(tasks, seeds):
    return [job for task in tasks for seed in seeds for job in jobs_of(task, seed)]


# ============================================================ from runs to rows
def tokens_sampled(out):
    """How many tokens, latents included, a run's RL sampled; None if it had none."""
    if not os.path.exists(os.path.join(out, "metrics.jsonl")):
        return None
    config = read_json(os.path.join(out, "config.json"))
    with open(os.path.join(out, "metrics.jsonl")) as file:
        steps = [json.loads(line) for line in file]
    batches = steps[:: config.get("minibatches", 1)]  # each step of a batch says the same of its rollouts
    per_rollout = sum(step["text_tokens"] + step["latent_steps"] for step in batches)
    return per_rollout * config["prompts"] * config["group"]


def records_of(task, seeds):
    """{directory: record} of the runs that the tables have: of each a record, as kept.py makes it."""
    path = os.path.join(HERE, f"runs-{task}.jsonl")
    return kept.gather(path, all_jobs([task], seeds), [ROOT], tokens_sampled)


def rows_in(records, task, method, seed):
    """Those of one run; [] if it is not there."""
    return records.get(directory(task, method, seed), {"rows": []})["rows"]


def rows_of(records, task, seeds):
    """{name in the table: {kind: {seed: row}}}; a row is evaluate's result, with what the training took."""
    found = {}
    for name, method, command in METHODS:
        for seed in seeds:
            training = {}
            if not command.startswith("eval.py"):
                training = records.get(directory(task, method, seed), {})
            cost = {
                "sampled": training.get("sampled"),
                "run_seconds": training.get("run_seconds"),
                "command": shown_command(task, command) if training else ""}
            of_runs = [f"{method}-{kind}" for kind, _ in EVALUATIONS]
            if command.startswith("results/baselines.py"):
                of_runs = [method]
            for own in of_runs:
                for row in rows_in(records, task, own, seed):  # the last of CoLaR's is its own
                    by_kind = found.setdefault(name, {})
                    by_kind.setdefault(kind_of(row), {})[seed] = {**row, **cost}
    return found


def shown_command(task, command):
    """For the table."""
    places = {method: f"out/results/{task}/{method}-SEED" for _, method, _ in METHODS}
    return f"python {command.format(**places)}"


def kind_of(row):
    """One of KINDS, or something else that no table has."""
    split = row.get("split", "test")
    return row.get("sampling", "trained") if split == "test" else split


def at(found, kind):
    """{name: {kind: {seed: row}}} -> {name: {seed: row}} of the methods that have rows of the kind."""
    return {name: kinds[kind] for name, kinds in found.items() if kind in kinds}


def summary(kinds):
    """{kind: {seed: row}} -> means over seeds: those of the paper's sampling (of temperature 1 without any;
    "sampling" says which), and under "trained" and "train" those."""
    first = next(kind for kind in KINDS if kind in kinds)
    others = {kind: mean_of(kinds[kind]) for kind in KINDS if kind in kinds and kind != first}
    return {"sampling": first, **mean_of(kinds[first]), **others}


def mean_of(rows):
    """{seed: row} -> means over seeds, with intervals that count seeds and stories."""
    seeds = sorted(rows)

    def mean(key):
        values = [rows[seed].get(key) for seed in seeds]
        return None if None in values else sum(values) / len(values)

    accuracies = [rows[seed]["accuracy"] for seed in seeds]
    means = ("accuracy", "tokens", "text_tokens", "latent_steps", "tags", "truncated",
             "forward_positions", "flops", "seconds_each", "seconds_alone", "sampled", "run_seconds",
             "n_examples", "samples")
    by_example = [rows[seed]["per_example"] for seed in seeds]
    books = by_example[0].get("book")
    newer = {"z_size": mean("z_size")} if "z_size" in rows[seeds[0]] else {}  # earlier records have none
    if books:
        scores = [sum(of_seeds) / len(seeds) for of_seeds in zip(*(own["score"] for own in by_example))]
        newer |= {"books_ci95": evidence.interval_by_book(scores, books), "books": len(set(books))}
    return {
        **newer,
        "seeds": seeds,
        "runs": len(seeds),
        "accuracy_ci95": evidence.interval(evidence.observed(rows, "score", seeds)),
        "by_seed": accuracies,
        "spread": [min(accuracies), max(accuracies)],
        "tokens_ci95": evidence.interval(evidence.observed(rows, "tokens", seeds)),
        "tokens_by_seed": [rows[seed]["tokens"] for seed in seeds],
        "command": rows[seeds[0]].get("command", ""),
        **{key: mean(key) for key in means},
    }


def controls_of(rows):
    """rows: {seed: [row]} of the control runs -> {sampling: {control: {seed: row}}}"""
    found = {}
    for seed, own in rows.items():
        for row in own:
            controls = found.setdefault(row["sampling"], {})
            controls.setdefault(row["control"], {})[seed] = row
    return found


def controls_summary(controls):
    """{control: {seed: row}} -> {control: its rows without single stories, and the comparison over seeds, {}
    for "plain" itself}"""
    against = {**evidence.against_plain(controls), "plain": {}}
    found = {}
    for control, rows in controls.items():
        kept = [{key: value for key, value in rows[seed].items() if key != "per_example"}
                for seed in sorted(rows)]
        found[control] = {"by_seed": kept, "against_plain": against[control]}
    return found


def lengths_of(records, task, seeds):
    """-> [row for the picture]: methods at each length of the chain, at the paper's sampling."""
    found = []
    for name, method, _ in METHODS:
        for length, _ in LENGTHS.get(task, []):
            rows = {}
            for seed in seeds:
                for row in rows_in(records, task, f"{method}-length-{length}", seed):
                    rows[seed] = row
            if rows:
                found.append({"method": name, "length": length, **mean_of(rows)})
    return found


def latents_of(records, task, seeds):
    """{name in the table: [what latents.py found in each seed's run]}"""
    found = {}
    for name, method, _ in METHODS:
        rows = [row for seed in seeds for row in rows_in(records, task, f"{method}-read", seed)]
        if rows:
            found[name] = rows
    return found


# ============================================================ from rows to Markdown
def in_cell(value, digits, unit=1):
    """A number for a cell of the table, in units of `unit`; "" for None."""
    return "" if value is None else f"{value / unit:.{digits}f}"


def measure_of(task):
    """What its scores are."""
    return data.measure_of(data.load_task(task))


def score_of(task):
    """The same, with its unit where it is known: the real task's depends on its --reward."""
    return "reward, %" if task == "tiny.next_chapter" else measure_of(task)


def digits_of(task):
    """Of its scores: the tiny world's next chapters earn hundreds of percent, real ones less than one."""
    return 1 if task == "tiny.next_chapter" else 3


def points_of(task):
    """How many points of a claim a score of 1 is; None where claims in points mean nothing."""
    return {"next_chapter": None, "next_chapter.short": None, "tiny.next_chapter": 0.01}.get(task, 1)


def words_of_interval(ci95, digits):
    return "" if ci95 is None else f"{in_cell(ci95[0], digits)} to {in_cell(ci95[1], digits)}"


def listed(values, digits):
    return ", ".join(in_cell(value, digits) for value in values)


def markdown(columns, found):
    """columns: {heading: function of a row -> its cell}, the first of them of the names alone -> Markdown.
    Columns in which no row has anything are left out."""
    names, *headings = columns
    cells = {heading: [columns[heading](row) for row in found.values()] for heading in headings}
    headings = [heading for heading in headings if any(cells[heading])]
    lines = [f"| {' | '.join([names, *headings])} |", "|" + "---|" * (1 + len(headings))]
    for i, name in enumerate(found):
        lines.append(f"| {' | '.join([name, *(cells[heading][i] for heading in headings)])} |")
    return "\n".join(lines)


SAMPLED = {"paper": "the paper's sampling", "trained": "temperature 1"}


def table_of(task, found):
    """Scores and tokens -> Markdown. Differences that are too small to mean anything are for the reader to
    see: the interval stands beside them."""
    digits = digits_of(task)
    score = score_of(task)
    first = next(kind for kind in KINDS if kind in {row["sampling"] for row in found.values()})

    def column(kind, key, form, *details):
        """The function of a column: of the row's part of that kind, if it has it."""

        def cell(row):
            part = row if row["sampling"] == kind else row.get(kind, {})
            return "" if part.get(key) is None else form(part[key], *details)

        return cell

    columns = {
        f"{task}, test split, {SAMPLED[first]}": None,
        score: column(first, "accuracy", in_cell, digits),
        "95 % interval": column(first, "accuracy_ci95", words_of_interval, digits),
        "95 % interval by book": column(first, "books_ci95", words_of_interval, digits),
        "by seed": column(first, "by_seed", listed, digits),
        "tokens": column(first, "tokens", in_cell, 1),
        "95 % interval of tokens": column(first, "tokens_ci95", words_of_interval, 1),
        "text": column(first, "text_tokens", in_cell, 1),
        "latent": column(first, "latent_steps", in_cell, 1),
        "z size": column(first, "z_size", in_cell, 2),
        f"{score}, train stories": column("train", "accuracy", in_cell, digits)}
    if first != "trained":
        columns |= {
            f"{score}, temperature 1": column("trained", "accuracy", in_cell, digits),
            "95 % interval, temperature 1": column("trained", "accuracy_ci95", words_of_interval, digits),
            "tokens, temperature 1": column("trained", "tokens", in_cell, 1)}
    return markdown(columns, found)


def costs_of(task, found):
    """What an answer and a training cost -> Markdown."""
    return markdown({
        f"{task}, what it took": None,
        "tokens by seed": lambda row: listed(row["tokens_by_seed"], 1),
        "GFLOP an answer": lambda row: in_cell(row["flops"], 3, 1e9),
        "s alone": lambda row: in_cell(row["seconds_alone"], 2),
        "M tokens sampled in RL": lambda row: in_cell(row["sampled"], 2, 1e6),
        "s in all": lambda row: in_cell(row["run_seconds"], 0),
        "command": lambda row: row["command"] and f"`{row['command']}`"}, found)


PLAINLY = {
    "plain": "as trained",
    "latents: zeros": "zeros for latents",
    "latents: noise": "noise of the same length",
    "latents: mean": "one vector, the mean latent",
    "latents: shuffled": "another story's latents",
    "latents: warm": "the warm start's latents",
    "latents: none": "no latents",
}


def controls_table(task, found, kind):
    """found: from controls_summary, of that sampling -> Markdown, with each seed's figures in a cell. What is
    gained is gained over the same models as trained."""
    digits = digits_of(task)

    def by_seed(what, digits):
        return lambda row: listed([own[what] for own in row["by_seed"]], digits)

    def tested(key, form):
        """The function of a column of what is compared with the run as trained; "" where that was not."""
        return lambda row: form(row["against_plain"][key]) if key in row["against_plain"] else ""

    def gained(what, digits):
        form = f"+.{digits}f"
        return {
            f"{what} gained": tested(what, lambda value: format(value, form)),
            f"95 % interval, {what}": tested(f"{what}_ci95", lambda ci95: evidence.in_words(ci95, form)),
            f"Holm's p, {what}": tested(f"{what}_holm", lambda p: f"{p:.2g}")}

    def differs_in(row):
        comparison = row["against_plain"]
        return display.what_differs(comparison) if "accuracy_differs" in comparison else ""

    columns = {
        f"control, {SAMPLED[kind]}": None,
        "accuracy by seed": by_seed("accuracy", digits),
        **gained("accuracy", digits),
        "tokens by seed": by_seed("tokens", 1),
        **gained("tokens", 1),
        "differs in": differs_in}
    table = markdown(columns, {PLAINLY.get(name, name): row for name, row in found.items()})
    return table.replace("accuracy", measure_of(task))


def into_readme(name, text):
    """Puts text between the marks <!-- NAME --> and <!-- /NAME --> of README.md and results/README.md."""
    for path in (os.path.join(ROOT, "README.md"), os.path.join(HERE, "README.md")):
        if not os.path.exists(path):
            continue
        with open(path, encoding="utf-8") as file:
            readme = file.read()
        begin = f"<!-- {name} -->\n"
        end = f"<!-- /{name} -->"
        before, mark, rest = readme.partition(begin)
        _, end_mark, after = rest.partition(end)
        if mark and end_mark:
            run.write_text(path, f"{before}{begin}{text}\n{end}{after}")


# ============================================================ files
def write_tables(tasks, seeds):
    """Tables and pictures of the tiny world's runs, into results/ and the README."""
    if measured := read_json(os.path.join(HERE, "gpu.json")):
        into_readme("gpu", findings.gpu_table(measured))
    for task in tasks:
        records = records_of(task, seeds)
        rows = rows_of(records, task, seeds)
        found = {name: summary(kinds) for name, kinds in rows.items()}
        if not found:
            continue
        texts = {f"methods-{task}": table_of(task, found), f"costs-{task}": costs_of(task, found)}
        controls = controls_of({seed: rows_in(records, task, "controls", seed) for seed in seeds})
        of_evidence, tested, compared = write_evidence(HERE, task, task, rows, controls)
        texts |= of_evidence
        lengths = lengths_of(records, task, seeds)
        latents = latents_of(records, task, seeds)
        if latents:
            texts[f"latents-{task}"] = read_latents.table(latents)
            run.write_json(os.path.join(HERE, f"latents-{task}.json"), latents)
        tested = tested.get("paper", {})
        if task == "tiny":
            sampled = SAMPLED[next(iter(found.values()))["sampling"]]
            texts["headline"] = findings.headline(found, tested, sampled)
            texts["findings"] = findings.findings(found, tested, lengths, latents, compared)
        else:
            texts["chapters"] = findings.next_chapters(found, tested)
        for name, text in texts.items():
            into_readme(name, text)
            print(f"{text}\n")
        path = os.path.join(HERE, f"methods-{task}.json")
        run.write_json(path, found)
        folders = {method: directory(task, method, seeds[0]) for method in DRAWN}
        if not all(map(os.path.exists, folders.values())):
            folders = {}  # of runs that are only kept there is no curve of the training
        draw(folders, HERE, task, task, {name: found[name] for name in findings.HEADLINE if name in found})
        if lengths:
            run.write_json(os.path.join(HERE, f"lengths-{task}.json"), lengths)
            path = os.path.join(HERE, f"lengths-{task}.svg")
            without_matplotlib(plots.by_length, lengths, path, score=score_of(task))


def write_evidence(where, name, task, rows, controls):
    """Controls and differences at each sampling, as JSON -> ({mark in the README: Markdown}, {sampling:
    controls_summary}, {sampling: {"differences", "claims"}}).

    name: of files and marks, the task's or a model's and the task's. rows: {method: {kind: {seed: row}}}."""
    texts = {}
    tested = {}
    compared = {}
    for kind in ("paper", "trained"):
        mark = mark_of(name, kind)
        methods = at(rows, kind)
        if kind in controls:
            tested[kind] = controls_summary(controls[kind])
            texts[f"controls-{mark}"] = controls_table(task, tested[kind], kind)
            methods |= {f"control {control}": by_seed for control, by_seed in controls[kind].items()}
        own = {
            "differences": evidence.differences(methods),
            "claims": evidence.claims(methods, points_of(task))}
        if text := evidence.page(own, SAMPLED[kind], digits_of(task), measure_of(task)):
            compared[kind] = own
            texts[f"differences-{mark}"] = text
    for what, found in (("controls", tested), ("differences", compared)):
        if found:
            run.write_json(os.path.join(where, f"{what}-{name}.json"), found)
    return texts, tested, compared


def mark_of(name, kind):
    """What stands at the paper's sampling has the plain mark."""
    return name if kind == "paper" else f"{name}-{kind}"


def write_tables_of_model(args):
    """The same of a real model's runs, into files of their own: JSON, Markdown, pictures."""
    for task in args.tasks:
        name = f"{paper.short_name(args.model)}.{task}"
        places = [args.out, ROOT, os.path.dirname(args.model)]
        records = kept.gather(os.path.join(args.tables_in, f"runs-{name}.jsonl"),
                              [job for job in paper.all_jobs(args) if job.name.split()[0] == task], places,
                              tokens_sampled)
        rows = {own: {"paper": row} for own, row in paper.rows_of(args, task, records).items()}
        found = {own: summary(kinds) for own, kinds in rows.items()}
        if not found:
            continue
        path = os.path.join(args.tables_in, f"methods-{name}.json")
        run.write_json(path, found)
        folders = {seed: paper.directory(args, task, "controls", seed) for seed in args.seeds}
        controls = {seed: records[folder]["rows"] for seed, folder in folders.items() if folder in records}
        evidence_texts, _, _ = write_evidence(args.tables_in, name, task, rows, controls_of(controls))
        parts = [table_of(task, found), costs_of(task, found), paper.caption(args, task, found),
                 *evidence_texts.values()]
        text = "\n\n".join(parts) + "\n"
        run.write_text(path.removesuffix("json") + "md", text)
        print(f"\n{text}\nin {path} and .md")
        folders = {method: paper.directory(args, task, method, args.seeds[0]) for method in paper.METHODS}
        draw(folders, args.tables_in, name, task, found)


def draw(folders, where, name, task, rows):
    """The two pictures of a task: the scores over tokens of {method in the table: means}, and the training of
    the runs in {method: folder}. name: as in write_evidence."""
    names = {method: title for title, method, _ in [*METHODS, *paper.TRAINED]}
    trained = {names[method]: path for method, path in folders.items()
               if os.path.exists(os.path.join(path, "metrics.jsonl"))}
    without_matplotlib(plots.curve, rows, os.path.join(where, f"curve-{name}.svg"), score=score_of(task))
    if trained:
        without_matplotlib(plots.training, trained, os.path.join(where, f"training-{name}.svg"))


def without_matplotlib(function, *arguments, **more):
    """Draws; a line says so where matplotlib, which is not among the requirements, is missing."""
    try:
        function(*arguments, **more)
    except UserError as e:
        print(f"no picture: {e}")


# ============================================================ the script
OF_A_MODEL = ("plan", "out", "methods", "n", "samples", "max_new_tokens", "reward", "scorer", "device",
              "rl_flags", "projector_flags", "eval_flags", "keep_states")


def parse_arguments():
    parser = run.parser(__doc__)
    g = parser.add_argument_group("what")
    g.add_argument("--model", default="tiny", help="tiny (the README's comparison), a directory, or a hub "
                   "name such as Qwen2.5-1.5B (the paper's table) (default tiny)")
    g.add_argument("--tasks", nargs="+", metavar="TASK",
                   help=f"default {' '.join(TASKS)}; of a real model flawed_fictions")
    g.add_argument("--seeds", nargs="+", type=int, metavar="N", help="default 0 1 2; of a real model 0")
    g.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default 1 on a GPU, else 2, one "
                   "core each in the tiny world)")
    g.add_argument("--tables", action="store_true",
                   help="run nothing, write the tables of what is there (default: run what is missing)")
    g = parser.add_argument_group("of a real model")
    g.add_argument("--plan", "--dry-run", action="store_true",
                   help="say what will be run, the hours and the disk, and start nothing (default: say it, "
                   "then start)")
    g.add_argument("--out", metavar="DIR", help="runs and tables go there (default: runs into "
                   "out/results/MODEL, tables into results/)")
    g.add_argument("--methods", nargs="+", default=paper.CHOICES, choices=paper.CHOICES,
                   help="beside the base (default all)")
    g.add_argument("--n", type=int, help="test examples (default all)")
    g.add_argument("--samples", type=int, metavar="N", default=10,
                   help="answers to each (default 10, as released)")
    g.add_argument("--max-new-tokens", type=int, metavar="N", default=2048,
                   help="per answer, everywhere (default 2048)")
    g.add_argument("--reward", choices=["contrastive", "vrcli", "thresholded"],
                   help="of next_chapter (default contrastive)")
    g.add_argument("--scorer", metavar="NAME", help="of next_chapter: the frozen model that reads chapters "
                   "(default: a copy of the base)")
    g.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    for script, name in (("train_rl.py", "rl"), ("train_projector.py", "projector"), ("eval.py", "eval")):
        g.add_argument(f"--{name}-flags", default="", metavar="FLAGS", help=f"more for each {script}, as in "
                       f"--{name}-flags=\"--device cpu\"; the tables say them (default none)")
    g.add_argument("--keep-states", action="store_true", help="leave the states of finished runs on the "
                   "disk: they can be continued with more --steps (default: delete them)")
    args = parser.parse_args()
    is_tiny = args.model == "tiny"
    for name in OF_A_MODEL:
        if is_tiny and getattr(args, name) != parser.get_default(name):
            raise UserError(f"--{name.replace('_', '-')} is for a real --model; the tiny world's comparison "
                            f"is the README's: leave it out, or name a --model")
    args.tasks = args.tasks or (list(TASKS) if is_tiny else ["flawed_fictions"])
    args.seeds = args.seeds or ([0, 1, 2] if is_tiny else [0])
    on_gpu = not is_tiny and torch.cuda.is_available() and args.device != "cpu"
    args.jobs = (1 if on_gpu else 2) if args.jobs is None else args.jobs
    args.threads = 1 if is_tiny else None
    if not is_tiny and not on_gpu and "OMP_NUM_THREADS" not in os.environ:
        args.threads = max(1, (os.cpu_count() or 1) // max(1, args.jobs))
    return args


def check_arguments(args):
    """UserError for a wrong word."""
    run.check_arguments(argparse.Namespace(**{**vars(args), "out": None}))
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
        try:
            setattr(args, name, shlex.split(getattr(args, name)))
        except ValueError as e:
            raise UserError(f"--{name.replace('_', '-')}: {e}") from e


def run_model(args):
    """The plan, then the runs, then the tables; of what is there if some have failed."""
    todo = paper.all_jobs(args)
    for task in args.tasks:  # what is missing is said before a model is fetched
        for split in data.SPLITS:
            data.load_task(task).examples(split)
    jobs.check(todo)
    run.make_directory(args.out)
    figures = paper.measured(args)
    paper.say_plan(args, todo, figures)
    if args.plan:
        return
    lock_file = run.lock(args.out)  # noqa: F841  a second command would start the same runs
    try:
        jobs.run(todo, args.jobs, args.threads)
    finally:
        write_tables_of_model(args)


def main():
    args = parse_arguments()
    check_arguments(args)
    if args.model == "tiny":
        todo = all_jobs(args.tasks, args.seeds)
        jobs.check(todo)
        if not args.tables:
            jobs.run(todo, args.jobs, args.threads)
        write_tables(args.tasks, args.seeds)
        return
    settle(args)
    if args.tables:
        jobs.check(paper.all_jobs(args))
        write_tables_of_model(args)
    else:
        run_model(args)


if __name__ == "__main__":
    run.run_script(main)
