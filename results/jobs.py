"""Runs as processes: started, watched, continued. A run is one command with a directory of its own, where it
leaves log.txt and what it is there for.

A run is done when it has its results.json, or its finished.json (written here when it ends well). One of
train_rl.py that was stopped is resumed from its last state, one of train_projector.py from its last trace or
step; any other begins again.
"""
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import typing

from lib.run import run_settings, saved_states, write_json
from lib import UserError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Job(typing.NamedTuple):
    name: str  # for people
    out: str  # its directory
    words: list  # the script and its flags, without --out
    needs: list = []  # directories of jobs that must be done before
    states_go: bool = False  # its states are deleted when it is done: all that is needed then is its model


def is_done(out):
    return any(os.path.exists(os.path.join(out, name)) for name in ("results.json", "finished.json"))


def read_json(path, default=None):
    """What is in the file; `default` if there is none."""
    if not os.path.exists(path):
        return default
    with open(path) as file:
        return json.load(file)


def check(todo):
    """UserError if a directory holds a run of another command, say one that was cut short to try things:
    its figures would go into this table."""
    for job in todo:
        before = read_json(os.path.join(job.out, "command.json"), job.words)
        for theirs, ours in itertools.zip_longest(before, job.words, fillvalue=""):
            if theirs != ours:
                raise UserError(f"{job.out} holds a run of another command (it has {theirs!r} where this one "
                                f"has {ours!r}): choose another --out, or delete that directory")


def words_now(job):
    """The command line that begins or continues a job."""
    script, *_ = job.words
    has_state = bool(saved_states(job.out))
    has_settings = run_settings(job.out).get("script") == script
    if (script == "train_rl.py" and has_state) or (script == "train_projector.py" and has_settings):
        return [script, "--resume", job.out]
    return [*job.words, "--out", job.out]


def start(job, threads):
    """-> the process, in the background, its output in log.txt. threads: of a CPU; None is torch's own
    choice."""
    os.makedirs(job.out, exist_ok=True)
    words = words_now(job)
    write_json(os.path.join(job.out, "command.json"), job.words)
    env = {**os.environ}
    if threads:
        env["OMP_NUM_THREADS"] = str(threads)
    with open(os.path.join(job.out, "log.txt"), "a") as log:
        return subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=log, stderr=log, env=env)


def run(jobs, at_once, threads=None):
    """Runs the jobs that are not done, at_once at a time, in their order. UserError that names the logs if
    any failed: the others are run all the same, but for those that need it. Ctrl-C and SIGTERM stop all of
    them; the same jobs given again continue."""
    for job in jobs:
        tidy(job)
    waiting = [job for job in jobs if not is_done(job.out)]
    total = len(waiting)
    running = {}  # process -> (job, when it was started)
    failed = []  # their logs
    try:
        while waiting or running:
            while len(running) < at_once and (job := next_of(waiting)):
                waiting.remove(job)
                running[start(job, threads)] = job, time.time()
            if not running:  # what is left needs what has failed
                break
            time.sleep(1)
            for process in [process for process in running if process.poll() is not None]:
                job, began = running.pop(process)
                if process.returncode:
                    failed.append(f"{job.out}/log.txt")
                note_end(process, job, began, f"{total - len(waiting) - len(running):3d}/{total}")
    except KeyboardInterrupt as e:  # with the signal, if it was another than Ctrl-C
        raise KeyboardInterrupt(*e.args[:1] or [signal.SIGINT], "the same command continues") from e
    finally:  # train_rl.py saves its state
        for process in running:
            process.terminate()
        for process, (job, began) in running.items():
            process.wait()
            add_seconds(job, began)
    if failed:
        left = f"; {len(waiting)} more, which need what they make, were not run" if waiting else ""
        what = "1 run" if len(failed) == 1 else f"{len(failed)} runs"
        raise UserError(f"{what} failed, see {', '.join(failed)}{left}; run this again for what is missing")


def next_of(waiting):
    """The first job that has all it needs; None without one."""
    return next((job for job in waiting if not missing(job)), None)


def missing(job):
    """The first directory that a job needs and that is not done; "" if all are."""
    return next((need for need in job.needs if not is_done(need)), "")


def note_end(process, job, began, done):
    """Marks what ended well, and says how it ended."""
    seconds = add_seconds(job, began)
    failed = ""
    if process.returncode:
        failed = f", failed: {last_line(os.path.join(job.out, 'log.txt'))}"
    elif not is_done(job.out):
        write_json(os.path.join(job.out, "finished.json"), job.words)
    tidy(job)
    print(f"{done} {job.name}: {seconds:.0f}s{failed}", flush=True)


def last_line(path):
    """Of a log, shortened."""
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = [line.strip() for line in file if line.strip()]
    return textwrap.shorten(lines[-1], 300, placeholder=" ..") if lines else "its log is empty"


def add_seconds(job, began):
    """Into seconds.json, a sum over all starts of a job -> the seconds of this one."""
    seconds = time.time() - began
    path = os.path.join(job.out, "seconds.json")
    write_json(path, seconds + read_json(path, 0))
    return seconds


def tidy(job):
    """Deletes the states of a job that is done, if it says so."""
    if job.states_go and is_done(job.out):
        for name in [*(f"state-{step}" for step in saved_states(job.out)), "imitation", "stage-2"]:
            shutil.rmtree(os.path.join(job.out, name), ignore_errors=True)
