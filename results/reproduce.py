"""Makes the tables and pictures of the README and of results/: runs what is missing, then writes them.

A run is one command with one seed, in a process of its own, with its output in out/results/TABLE/METHOD-SEED.
Runs in the tiny world are evaluated at two samplings, and on stories that they were trained on, so that what
was only memorised shows. What the tables need of a run is kept in results/runs-TABLE.jsonl, so that they can
be made again where the runs are gone. Stop it when you like; started again, it continues.

    python results/reproduce.py                         # the tiny world: a day on one core
    python results/reproduce.py --only tiny --seeds 0   # some of it: seeds can run beside each other
    python results/reproduce.py --tables                # only the tables, of the runs that are there or kept
"""
import glob
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import time
import typing

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)

from lib import UserError, display, run
from results import latents, plots, starts, stats

# ============================================================ what is run
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
PENALTY = f"{RL} --overlong-buffer 240"
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
    ("the paper's recipe", "paper", f"train_rl.py --model {{paper-stages}} {NO_PENALTY} {PAPERS}"),
    ("base frozen, before RL", "frozen", FROZEN),
    ("base frozen + length penalty", "frozen-lp", f"train_rl.py --model {{frozen}} {PENALTY}"),
    ("no anchor + length penalty", "adrift-lp", f"train_rl.py --model {{projector}} --anchor 0 {PENALTY}"),
    ("stage 2 twice as long, before RL", "longer", LONG_STAGES),
    ("stage 2 twice as long + length penalty", "longer-lp", f"train_rl.py --model {{longer}} {PENALTY}"),
    ("LiteReason after RL, before its own RL", "after-rl", AFTER_RL),
    ("LiteReason after RL + length penalty", "after-rl-lp", f"train_rl.py --model {{after-rl}} {PENALTY}"),
    ("LiteReason after RL + length penalty, shuffled latents", "after-rl-lp-shuffled",
     "eval.py --model {after-rl-lp} --latent shuffled"),
    ("RL with tags after RL + length penalty", "after-rl-tag",
     f"train_rl.py --model {{rl}} --method tag {PENALTY}"),
    ("RL with tags + length penalty, after stage 2", "written-lp",
     f"train_rl.py --model {{projector}} --method tag {PENALTY}"),
    ("no noise, before RL", "clean", f"{STAGES} --noise 0"),
    ("no noise + length penalty", "clean-lp", f"train_rl.py --model {{clean}} {PENALTY}"),
    ("pause tokens + length penalty", "pause-lp", f"train_rl.py --projector pause {PENALTY} {PAPERS}"),
    ("answer at once", "answer", "results/baselines.py --method answer"),
    ("MoI", "moi", "results/baselines.py --method moi"),
    ("Soft Thinking", "soft-thinking", "results/baselines.py --method soft-thinking"),
    ("Coconut", "coconut", "results/baselines.py --method coconut"),
    ("CoLaR", "colar", "results/baselines.py --method colar --steps 96"),
    ("CoLaR after RL", "colar-rl",
     "results/baselines.py --method colar --model {rl} --lr 1e-3 --epochs 4 --r 2 --rl-lr 1.2e-5 --steps 96"),
]
# Real weights, see real_models.md: --model is a directory of that name, or a link to one, beside README.md.
SMALL_RL = ("--overlong-buffer 0 --steps 18 --prompts 4 --num-generations 6 --minibatches 1 --lr 2e-5 "
            "--val 0 --refresh-every 6 --save-every 4")
SMOLLM2 = [
    ("base, explicit reasoning", "base", "eval.py --model SmolLM2-135M-Instruct:plain"),
    ("base, tag prompt", "base-tag", "eval.py --model SmolLM2-135M-Instruct"),
    ("LiteReason before RL", "projector", "train_projector.py --model SmolLM2-135M-Instruct --targets none "
     "--traces out/chapter-traces.jsonl --imitate 24 --steps 40 --batch 4 --n 12"),
    ("LiteReason before RL, its latents taken away", "projector-text",
     "eval.py --model {projector} --latent none"),
    ("LiteReason before RL, shuffled latents", "projector-shuffled",
     "eval.py --model {projector} --latent shuffled"),
    ("LiteReason", "litereason", f"train_rl.py --model {{projector}} --targets none {SMALL_RL}"),
    ("LiteReason, its latents taken away", "litereason-text", "eval.py --model {litereason} --latent none"),
    ("LiteReason, shuffled latents", "litereason-shuffled", "eval.py --model {litereason} --latent shuffled"),
    ("RL without latents", "rl", f"train_rl.py --model SmolLM2-135M-Instruct --method grpo {SMALL_RL}"),
    ("RL with tags, no latents, after stage 2", "tag-after",
     f"train_rl.py --model {{projector}} --method tag {SMALL_RL}"),
]


class Table(typing.NamedTuple):
    task: str
    methods: list
    seeds: list = [0, 1, 2]
    # Of each run: (directory behind its name, more flags for eval.py). Baselines evaluate themselves.
    evaluations: list = [("test", "--sampling paper trained --alone 8"), ("train", "--split train --n 200")]
    flags: str = ""  # of every command
    score: str = "accuracy"
    digits: int = 3  # of scores
    points: float = 1  # how many points of a claim a score of 1 is; 0: no claims are tested


TABLES = {
    "tiny": Table("tiny", METHODS),
    # It has no gold answers to learn; there, next chapters earn hundreds of percent.
    "tiny.next_chapter": Table("tiny.next_chapter", [own for own in METHODS if own[1] != "answer"],
                               score="reward, %", digits=1, points=0.01),
    "SmolLM2-135M-Instruct.next_chapter.short": Table(
        "next_chapter.short", SMOLLM2, [0], [("test", "--alone 0")], "--max-new-tokens 72", "reward",
        points=0),
}
CONTROLLED = "litereason-lp"  # the run of each seed whose latents are replaced when it has been trained
# In the table "tiny" alone: runs at each length of the chain, and those whose latents latents.py reads.
LENGTHS = (2, 3, 4, 5, 6)
AT_LENGTHS = ("rl", "litereason-lp", "litereason-lp-text", "tag-lp")
READ = ("litereason-lp", "adrift-lp", "frozen-lp", "longer-lp", "after-rl-lp")
# In the README's first table, and in the picture of scores against tokens.
HEADLINE = [stats.BASE, stats.RL, stats.OURS, "RL with tags + length penalty",
            "the paper's recipe + length penalty"]


class Job(typing.NamedTuple):
    out: str  # its directory
    words: list  # the script and its flags, without --out
    needs: list  # directories of jobs that must be done before


def directory(table, method, seed):
    return os.path.join(ROOT, "out", "results", table, f"{method}-{seed}")


def without_root(text):
    return text.replace(ROOT + os.sep, "")


def jobs_of(table, seed):
    """[Job] of one table and seed, in the order in which they are run."""
    task, methods, _, evaluations, flags, *_ = TABLES[table]
    places = {method: directory(table, method, seed) for _, method, _ in methods}
    found = []

    def add(method, command):
        needs = [places[word] for word in re.findall(r"\{(.+?)\}", command)]
        words = [word.format(**places) for word in f"{command} {flags} --task {task} --seed {seed}".split()]
        found.append(Job(directory(table, method, seed), words, needs))

    for _, method, command in methods:
        trained = f"{{{method}}}"
        evaluation = command if command.startswith("eval.py") else f"eval.py --model {trained}"
        if evaluation != command:
            add(method, f"{command} --n 0" if command.startswith("train_rl.py") else command)
        if command.startswith("results/baselines.py"):
            continue
        for kind, more in evaluations:
            add(f"{method}-{kind}", f"{evaluation} {more}")
        for length in LENGTHS if table == "tiny" and method in AT_LENGTHS else ():
            add(f"{method}-length-{length}", f"{evaluation} --hops {length}")
        if table == "tiny" and method in READ:
            add(f"{method}-read", f"results/latents.py --model {trained}")
        if method == CONTROLLED:
            add("controls", f"eval.py --controls --model {trained} --sampling paper trained")
    return found


# ============================================================ runs as processes
def is_done(out):
    return any(os.path.exists(os.path.join(out, name)) for name in ("results.json", "finished.json"))


def check_same(ours, theirs, what, way):
    """UserError that names the first word, or command, in which two lists differ."""
    for now, then in itertools.zip_longest(ours, theirs, fillvalue="nothing"):
        if now != then:
            raise UserError(f"{what} was made with {then!r}, not with {now!r}: {way}")


def start(job):
    """-> the process, in the background, on one thread, its output in log.txt. A training goes on where it
    was stopped, any other script begins again."""
    script = job.words[0]
    is_begun = script.startswith("train_") and run.run_settings(job.out).get("script") == script
    words = [script, "--resume", job.out] if is_begun else [*job.words, "--out", job.out]
    os.makedirs(job.out, exist_ok=True)
    run.write_json(os.path.join(job.out, "command.json"), job.words)
    with open(os.path.join(job.out, "log.txt"), "a") as log:
        # In a session of its own, Ctrl-C does not reach it twice: a second signal would lose its state.
        return subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=log, stderr=log,
                                start_new_session=True, env={"OMP_NUM_THREADS": "1", **os.environ})


def run_jobs(todo):
    """Runs the jobs that are not done, in their order. UserError that names the logs of those that failed:
    the others are run all the same, but for those that need them."""
    waiting = [job for job in todo if not is_done(job.out)]
    failed = []  # logs
    for number, job in enumerate(waiting, 1):
        if not all(map(is_done, job.needs)):  # what it needs has failed
            continue
        began, process = time.time(), start(job)
        try:
            while process.poll() is None:
                time.sleep(1)
        finally:  # also if this is stopped: a training then saves its state
            process.terminate()
            process.wait()
            seconds, path = time.time() - began, os.path.join(job.out, "seconds.json")
            run.write_json(path, seconds + run.read_json(path, 0))  # the sum over all starts
        if process.returncode:
            failed.append(f"{job.out}/log.txt")
        elif not is_done(job.out):
            run.write_json(os.path.join(job.out, "finished.json"), job.words)
        print(f"{number:3d}/{len(waiting)} {without_root(job.out)}: {seconds:.0f}s"
              f"{', failed' if process.returncode else ''}", flush=True)
    if failed:
        raise UserError(f"{len(failed)} failed, see {', '.join(failed)}; run this again for the rest")


# ============================================================ what is kept of runs
RENAMED = {"baselines.py": "results/baselines.py", "--group": "--num-generations",
           "--rows": "--gen-batch-size", "--tokens-per-forward": "--micro-batch-tokens",
           "--latent other": "--latent shuffled"}


def kept_records(table):
    """{name of the directory: record} of results/runs-TABLE.jsonl, in today's words; {} without that file."""
    path = pathlib.Path(HERE, f"runs-{table}.jsonl")
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    for old, new in RENAMED.items():
        text = re.sub(rf"(?<=[ \"]){old}(?=[ \"])", new, text)
    return {record["run"]: record for record in map(json.loads, text.splitlines())}


def records_of(table, seeds):
    """{directory: record} of the runs that the table has: those that are done here, else those that are kept.

    A kept record whose commands are not today's stops everything: nothing is dropped in silence. Code is not
    compared: after a change of what a run computes, delete the records."""
    kept = kept_records(table)
    commands = {}  # directory -> the commands that make what is in it, from the first
    found = {}
    for job in (job for seed in seeds for job in jobs_of(table, seed)):
        before = [command for need in job.needs for command in commands[need]]
        commands[job.out] = [*dict.fromkeys(before), without_root(" ".join(job.words))]
        name = without_root(job.out)
        if is_done(job.out):
            found[job.out] = {"run": name, "commands": commands[job.out], **measured(job.out)}
        elif name in kept:
            check_same(commands[job.out], kept[name]["commands"], f"record {name!r} of runs-{table}.jsonl",
                       "name words that changed in RENAMED, or delete the line of another run")
            found[job.out] = kept[name]
    return found


def keep(table, records):
    """Writes them into results/runs-TABLE.jsonl, beside those of other seeds."""
    own = {record["run"]: record for record in records.values()}
    records = own | kept_records(table) | own  # a run that is here replaces its kept record
    lines = [json.dumps(record, separators=(",", ":")) + "\n" for record in records.values()]
    run.write_text(os.path.join(HERE, f"runs-{table}.jsonl"), "".join(lines))


def measured(out):
    """Of the run in directory `out`: its rows with the score and the tokens of every story, what it took."""
    rows = run.read_json(os.path.join(out, "results.json"), [])
    rows = rows if isinstance(rows, list) else [rows]
    for row in rows:
        for numbers in row.get("per_example", {}).values():  # 1 takes less room in the file than 1.0
            numbers[:] = [int(x) if isinstance(x, float) and x == int(x) else x for x in numbers]
        row.update({key: without_root(row[key]) for key in ("name", "model") if key in row})
    made = time.strftime("%Y-%m-%d", time.gmtime(os.path.getmtime(out)))
    seconds = run.read_json(os.path.join(out, "seconds.json"))
    return {"made": made, "sampled": tokens_sampled(out), "run_seconds": seconds, "rows": rows}


def tokens_sampled(out):
    """How many tokens, latents included, a run's RL sampled; None if it had none."""
    metrics = pathlib.Path(out, "metrics.jsonl")
    if not metrics.exists():
        return None
    config = run.read_json(os.path.join(out, "config.json"))
    steps = list(map(json.loads, metrics.read_text().splitlines()))
    steps = steps[:: config.get("minibatches", 1)]  # all of a batch say the same
    per_rollout = sum(step["text_tokens"] + step["latent_steps"] for step in steps)
    return per_rollout * config["prompts"] * config["num_generations"]


# ============================================================ from records to means
SAMPLED = {"paper": "the paper's sampling", "trained": "temperature 1"}


def rows_in(records, table, source, seeds):
    """[(seed, row)] of the runs of that name that are there."""
    return [(seed, row) for seed in seeds
            for row in records.get(directory(table, source, seed), {"rows": []})["rows"]]


def rows_of(records, table, seeds):
    """{name in the table: {kind: {seed: row}}}; a row is evaluate's result, with what the training took.
    Kinds: paper and trained, test stories at two samplings; train, stories that it was trained on."""
    found = {}
    methods = TABLES[table].methods
    places = {method: f"out/results/{table}/{method}-SEED" for _, method, _ in methods}
    for name, method, command in methods:
        is_baseline = command.startswith("results/baselines.py")
        sources = [method] if is_baseline else [f"{method}-{kind}" for kind, _ in TABLES[table].evaluations]
        for seed, row in (own for source in sources for own in rows_in(records, table, source, seeds)):
            training = records.get(directory(table, method, seed), {})  # none of eval.py's
            cost = {"sampled": training.get("sampled"), "run_seconds": training.get("run_seconds"),
                    "command": f"python {command.format(**places)}" if training else ""}
            kind = row["sampling"] if row["split"] == "test" else "train"
            # Of CoLaR's rows the last stays: the others are those before its RL.
            found.setdefault(name, {}).setdefault(kind, {})[seed] = {**row, **cost}
    return found


MEANS = ("accuracy", "tokens", "latent_steps", "z_size", "flops", "seconds_alone", "sampled", "run_seconds")


def mean_of(rows):
    """{seed: row} -> means over seeds, with intervals that count seeds and stories."""
    seeds = sorted(rows)
    by_seed = {key: [rows[seed].get(key) for seed in seeds] for key in MEANS}
    scores = stats.observed(rows, "score", seeds)
    books = rows[seeds[0]]["per_example"].get("book")
    return {
        **{key: None if None in values else sum(values) / len(values) for key, values in by_seed.items()},
        "accuracy_ci95": stats.interval(scores),
        "tokens_ci95": stats.interval(stats.observed(rows, "tokens", seeds)),
        "books_ci95": stats.interval_by_book(scores.mean(0), books) if books else None,
        "accuracy_by_seed": by_seed["accuracy"],
        "tokens_by_seed": by_seed["tokens"],
        "command": rows[seeds[0]].get("command")}


def controls_of(records, table, seeds):
    """-> {sampling: {control: {seed: row}}}"""
    found = {}
    for seed, row in rows_in(records, table, "controls", seeds):
        found.setdefault(row["sampling"], {}).setdefault(row["control"], {})[seed] = row
    return found


def lengths_of(records, seeds):
    """-> {name: [means at each length of the chain]}, at the paper's sampling."""
    found = {}
    for (name, method, _), length in itertools.product(METHODS, LENGTHS):
        if rows := rows_in(records, "tiny", f"{method}-length-{length}", seeds):
            found.setdefault(name, []).append({"length": length, **mean_of(dict(rows))})
    return found


# ============================================================ from means to Markdown
def in_cell(value, digits, unit=1, between=", "):
    """A number, or a list of them, for a cell of the table, in units of `unit`; "" for None."""
    if isinstance(value, list):
        return between.join(in_cell(own, digits, unit) for own in value)
    return "" if value is None else f"{value / unit:.{digits}f}"


def markdown(title, rows):
    """rows: {name: {heading: cell}} -> Markdown, with the columns in which any row has something."""
    headings = [heading for heading in max(rows.values(), key=len, default={})
                if any(cells.get(heading) for cells in rows.values())]
    return stats.markdown([title, *headings], [[name, *(cells.get(heading, "") for heading in headings)]
                                               for name, cells in rows.items()])


def methods_table(table, found):
    score, digits = TABLES[table].score, TABLES[table].digits
    rows = {}
    for name, kinds in found.items():
        paper, trained, train = (kinds.get(kind, {}) for kind in ("paper", "trained", "train"))
        rows[name] = {
            score: in_cell(paper["accuracy"], digits),
            "95 % interval": in_cell(paper["accuracy_ci95"], digits, between=" to "),
            "95 % interval by book": in_cell(paper["books_ci95"], digits, between=" to "),
            "by seed": in_cell(paper["accuracy_by_seed"], digits),
            "tokens": in_cell(paper["tokens"], 1),
            "latent": in_cell(paper["latent_steps"], 1),
            "z size": in_cell(paper["z_size"], 2),
            f"{score}, train stories": in_cell(train.get("accuracy"), digits),
            f"{score}, temperature 1": in_cell(trained.get("accuracy"), digits),
            "tokens, temperature 1": in_cell(trained.get("tokens"), 1)}
    return markdown(f"{TABLES[table].task}, test split, {SAMPLED['paper']}", rows)


def costs_table(table, found):
    return markdown(f"{TABLES[table].task}, what it took", {name: {
        "tokens by seed": in_cell(row["tokens_by_seed"], 1),
        "GFLOP an answer": in_cell(row["flops"], 3, 1e9),
        "s alone": in_cell(row["seconds_alone"], 2),
        "M tokens sampled in RL": in_cell(row["sampled"], 2, 1e6),
        "s in all": in_cell(row["run_seconds"], 0),
        "command": row["command"] and f"`{row['command']}`"}
        for name, row in ((name, kinds["paper"]) for name, kinds in found.items())})


PLAINLY = {
    "plain": "as trained", "latents: zeros": "zeros for latents",
    "latents: noise": "noise of the same length", "latents: mean": "one vector, the mean latent",
    "latents: shuffled": "shuffled latents", "latents: warm": "the warm start's latents",
    "latents: none": "no latents"}


def controls_table(table, controls, kind):
    """controls: {control: {seed: row}} -> Markdown, with each seed's figures in a cell. What is gained is
    gained over the same models as trained, whose own row has no such cells."""
    rows = {}
    for name, gained in stats.against_plain(controls).items():
        own = [controls[name][seed] for seed in sorted(controls[name])]
        cells = rows[PLAINLY.get(name, name)] = {}
        for what, digits in (("accuracy", TABLES[table].digits), ("tokens", 1)):
            cells[f"{what} by seed"] = in_cell([row[what] for row in own], digits)
            if gained:
                form = f"+.{digits}f"
                cells[f"{what} gained"] = stats.with_interval(gained[what], gained[f"{what}_ci95"], form)
        cells["differs in"] = display.what_differs(gained) if gained else ""
    text = markdown(f"control, {SAMPLED[kind]}", rows)
    return text.replace("accuracy", TABLES[table].score.removesuffix(", %"))


def headline(found, controls):
    """The README's first table: the claim, and beside it the rows that it has to be read with."""
    rows = {}
    for name in (name for name in HEADLINE if name in found):
        rows[name] = found[name]["paper"]
        if name == stats.OURS and "latents: shuffled" in controls:
            rows[".. with shuffled latents"] = mean_of(controls["latents: shuffled"])
    return markdown(f"plot holes, tiny world, {SAMPLED['paper']}", {
        name: {"accuracy": in_cell(row["accuracy"], 3), "tokens": in_cell(row["tokens"], 1)}
        for name, row in rows.items()})


# ============================================================ tables and pictures
def tables_of(table, records, seeds):
    """-> ({mark on a page: Markdown}, {method: {kind: its means}})"""
    *_, score, digits, points = TABLES[table]
    rows = rows_of(records, table, seeds)
    found = {name: {kind: mean_of(own) for kind, own in kinds.items()} for name, kinds in rows.items()}
    controls = controls_of(records, table, seeds)
    texts = {f"methods-{table}": methods_table(table, found), f"costs-{table}": costs_table(table, found)}
    measure, claims = score.removesuffix(", %"), {}
    for kind, mark in (("paper", table), ("trained", f"{table}-trained")):
        methods = {name: kinds[kind] for name, kinds in rows.items() if kind in kinds}
        if kind in controls:
            texts[f"controls-{mark}"] = controls_table(table, controls[kind], kind)
            methods |= {f"control {control}": by_seed for control, by_seed in controls[kind].items()}
        compared = stats.differences(methods)  # what a claim tests stands in the table of claims
        if points:
            compared = [own for own in compared if (own["ours"], own["theirs"]) not in stats.CLAIMED]
        if compared:
            text = stats.differences_table(compared, SAMPLED[kind], digits)
            texts[f"differences-{mark}"] = text.replace("accuracy", measure)
        claims[SAMPLED[kind]] = stats.claims(methods, points) if points else []
    if any(claims.values()):
        texts[f"claims-{table}"] = stats.claims_table(claims).replace("accuracy", measure)
    if table == "tiny":
        texts["headline"] = headline(found, controls.get("paper", {}))
        read = {name: rows_in(records, table, f"{method}-read", seeds) for name, method, _ in METHODS}
        if any(read.values()):
            texts["latents-tiny"] = latents.table({name: own for name, own in read.items() if own})
    return {mark: text for mark, text in texts.items() if text}, found


def into_pages(texts):
    """Puts each text between its marks <!-- NAME --> and <!-- /NAME --> wherever they stand."""
    for path in (os.path.join(ROOT, "README.md"), *glob.glob(os.path.join(HERE, "*.md"))):
        page = pathlib.Path(path).read_text(encoding="utf-8")
        for name, text in texts.items():
            block = rf"(?s)(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)"
            page = re.sub(block, lambda marks: f"{marks[1]}{text}\n{marks[2]}", page)
        run.write_text(path, page)


def write_tables(table, seeds):
    """Tables and pictures of one table's runs, into results/ and the pages."""
    records = records_of(table, seeds)
    texts, found = tables_of(table, records, seeds)
    if not found:
        return
    keep(table, records)
    into_pages(texts)
    print(*texts.values(), sep="\n\n", end="\n\n")
    names = [name for name in HEADLINE if name in found] if table.startswith("tiny") else found
    drawn = {name: [found[name]["paper"]] for name in names}
    draw(plots.curve, drawn, f"curve-{table}", TABLES[table].score)
    if table == "tiny" and (lengths := lengths_of(records, seeds)):
        draw(plots.curve, lengths, "lengths-tiny")


def draw(function, rows, name, *more):
    try:
        function(rows, os.path.join(HERE, f"{name}.svg"), *more)
    except ImportError as e:  # matplotlib is not among the requirements
        print(f"no picture {name}: {e}")


# ============================================================ the script
def main():
    ap = run.parser(__doc__)
    ap.add_argument("--only", nargs="+", metavar="TABLE", choices=list(TABLES),
                    help=f"of {', '.join(TABLES)} [with --tables all, else the tiny world's]")
    ap.add_argument("--seeds", nargs="+", type=int, metavar="N", help="[0 1 2, of real weights 0]")
    ap.add_argument("--tables", action="store_true", help="run nothing, write the tables of what is there")
    args = ap.parse_args()
    names = args.only or [name for name in TABLES if args.tables or name.startswith("tiny")]
    seeds = {name: args.seeds or TABLES[name].seeds for name in names}
    todo = [job for name in names for seed in seeds[name] for job in jobs_of(name, seed)]
    for job in todo:
        check_same(job.words, run.read_json(os.path.join(job.out, "command.json"), job.words), job.out,
                   "delete that directory, or move it away")
    if not args.tables:
        run_jobs(todo)
    for name in names:
        write_tables(name, seeds[name])
    if rows := run.read_json(os.path.join(HERE, "starts-real.json")):
        into_pages({"starts-real": starts.table(rows)})
        draw(plots.chains, rows, "starts-real")


if __name__ == "__main__":
    run.run_script(main)
