"""What the tables need of each run, kept in results/runs-TASK.jsonl (of a real model runs-MODEL.TASK.jsonl),
a line each: its rows with the score and the tokens of every story, and what its training took. So tables can
be made again, and rows added to them, on a machine that does not have the runs in out/.

A run that is in out/ counts before one that is kept. A kept record whose commands are not today's stops
everything: nothing is dropped in silence. Where only words have changed, say so in RENAMED; where the run itself
has, delete its line. Code is not compared: after a change of what a run computes, delete the file.
"""
import itertools
import json
import os
import re
import time

from lib import UserError, run
from results import jobs, paper

# Words of commands that have changed since a record was kept, and mean the same: (pattern, what stands there now).
RENAMED = [(r"(?<![\w/])baselines\.py", "results/baselines.py"),
           (r"--latent other", "--latent shuffled")]


def gather(path, todo, places, tokens_sampled):
    """{directory: record} of the jobs in `todo` that are done here or whose record is in the file at `path`;
    the file then has all of these, beside its records of other jobs. todo: has passed jobs.check; places:
    directories of this machine, which names and commands leave out."""
    kept = read(path)
    commands = {}  # directory -> the commands that make what is in it, from the first
    found = {}
    for job in todo:
        before = [command for need in job.needs for command in commands[need]]
        own = without(places, " ".join(job.words))
        commands[job.out] = [*dict.fromkeys(before), own]
        name = without(places, job.out)
        record = kept.pop(name, None)
        if jobs.is_done(job.out):
            measured = record_of(job.out, places, tokens_sampled)
            record = {"run": name, "commands": commands[job.out], **measured}
        if record is not None:
            check_commands(path, record, commands[job.out])
            found[job.out] = record
    lines = [*found.values(), *kept.values()]
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
    run.write_text(path, text)
    return found


def read(path):
    """{name of the directory: record}, {} without a file."""
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    for record in records:
        record["commands"] = [renamed(command) for command in record["commands"]]
    return {record["run"]: record for record in records}


def renamed(command):
    for pattern, now in RENAMED:
        command = re.sub(pattern, now, command)
    return command


def check_commands(path, record, commands):
    """UserError if a record was made with other commands than these: its figures belong to another run."""
    for then, now in itertools.zip_longest(record["commands"], commands, fillvalue="nothing"):
        if then != now:
            raise UserError(f"{path}: the record {record['run']!r} was made with {then!r}, not with {now!r}. Only "
                            f"words changed: name them in results/kept.py, RENAMED. Another run: delete its line")


def without(places, text):
    for place in places:
        text = text.replace(place + os.sep, "")
    return text


def record_of(out, places, tokens_sampled):
    """Of the run in directory `out`. tokens_sampled: its RL's, a function of the directory."""
    rows = []
    for row in paper.results_in(out):
        if "per_example" in row:
            by_story = row["per_example"]
            row["per_example"] = {what: list(map(whole, values)) for what, values in by_story.items()}
        for key in ("name", "model"):
            if key in row:
                row[key] = without(places, row[key])
        rows.append(row)
    return {
        "made": time.strftime("%Y-%m-%d", time.gmtime(os.path.getmtime(out))),
        "sampled": tokens_sampled(out),
        "run_seconds": jobs.read_json(os.path.join(out, "seconds.json")),
        "rows": rows}


def whole(number):
    """A float as an int if it is one: it takes less room in the file."""
    return int(number) if isinstance(number, float) and number == int(number) else number
