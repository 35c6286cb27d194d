"""The paper's table for a real model (reproduce.py --model NAME): which runs it takes, what they will cost,
and where their figures are.

Of each task and seed: the base; stages 1 and 2, made once for all runs that think in latents; RL with and
without latents, both with a length penalty, and with the tag alone; an evaluation of each, and the controls.
RL samples at temperature 1, as released. Every row of the table is sampled as the paper's (eval.PAPER), by
eval.py, so train_rl.py makes no table of its own (--n 0).

The plan is made before anything runs. Hours come from a short measurement on this machine (display.measure),
of this model and these prompts, times what each run has to decode and to read; disk comes from the numbers of
parameters. Left out, since they are small beside that: loading the model, the optimiser's own step, logs,
traces.
"""
import itertools
import math
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import traceback
import types

import torch

import data
from lib import checkpoint, display, memory, run
import eval as evaluation
import train_projector
import train_rl
from litereason import generate, load
from results.jobs import ROOT, Job, is_done, read_json
from lib import UserError

# (name in the table, directory, command): the first are those that the most is asked about.
# The penalty grows from the first token on, to 1 at the length limit. The paper says that it is DAPO's soft
# one and not how long; its 17 tokens an answer cannot come from a penalty that begins later than that.
TRAINED = [
    ("LiteReason", "litereason", "train_rl.py --model {projector} --targets none --overlong-buffer 0"),
    ("RL without latents", "rl", "train_rl.py --model {model} --method grpo --overlong-buffer 0"),
    ("RL with tags, no latents", "tag", "train_rl.py --model {model} --method tag --overlong-buffer 0"),
    ("RL with tags, no latents, after stage 2", "tag-after",
     "train_rl.py --model {projector} --method tag --overlong-buffer 0"),
    ("RL + length penalty", "rl-lp", "train_rl.py --model {model} --method grpo --overlong-buffer {limit}"),
    ("LiteReason + length penalty", "litereason-lp",
     "train_rl.py --model {projector} --targets none --overlong-buffer {limit}"),
]
# What is fed to a policy in its latents' place: (name in the table, directory, the run, --latent).
REPLACED = [("LiteReason before RL, its latents taken away", "projector-text", "projector", "none"),
            ("LiteReason before RL, another story's latents", "projector-other", "projector", "shuffled"),
            ("LiteReason, its latents taken away", "litereason-text", "litereason", "none"),
            ("LiteReason, another story's latents", "litereason-other", "litereason", "shuffled")]
METHODS = [method for _, method, _ in TRAINED]
CHOICES = [*METHODS, "controls"]
ALONE = 8  # answers that are timed alone
NO_PENALTY = ("no length penalty is run on {task}: its reward is no right or wrong that a penalty between 0 "
              "and 1 could be weighed against, and the paper has one for plot holes only")
GB = 1e9


# ============================================================ which runs there are
def short_name(model):
    """Of a model, for directories and files."""
    return os.path.basename(os.path.normpath(model))


def directory(args, task, method, seed):
    return os.path.join(args.out, task, f"{method}-{seed}")


def trained_on(args, task):
    """The entries of TRAINED that are run on a task."""
    has_penalty = hasattr(data.load_task(task), "answer")  # such a task's reward is 0 or 1
    return [own for own in TRAINED if own[1] in args.methods and (has_penalty or "{limit}" not in own[2])]


def all_jobs(args):
    """[Job] of all tasks and seeds, in the order in which they are run."""
    jobs = []
    for task, seed in itertools.product(args.tasks, args.seeds):
        jobs += jobs_of(args, task, seed)
    return jobs


def jobs_of(args, task, seed):
    """[Job] of one task and seed."""
    projector = directory(args, task, "projector", seed)
    places = {"model": args.model, "projector": projector, "limit": args.max_new_tokens}
    common = shared_flags(args, task, seed)
    jobs = []

    def add(method, command, flags, needs=()):
        words = [word.format(**places) for word in command.split()]
        jobs.append(Job(
            name=f"{task} {method} seed {seed}",
            out=directory(args, task, method, seed),
            words=[*words, *flags, *common],
            needs=list(needs),
            states_go=words[0] != "eval.py" and not args.keep_states))

    def add_evaluation(method, model, needs=(), alone=True):
        flags = ["--alone", str(ALONE)] if alone else []
        places["evaluated"] = model
        add(method, "eval.py --model {evaluated}", [*flags, *evaluation_flags(args)], needs)

    def add_replaced(method):
        out = directory(args, task, method, seed)
        for _, replaced, of, latent in REPLACED:
            if of == method:
                add_evaluation(replaced, out, [out], alone=False)
                jobs[-1].words.extend(["--latent", latent])

    add_evaluation("base", f"{args.model}:plain")
    jobs[-1].words.insert(3, args.model)  # the tag prompt beside the plain one
    trained = trained_on(args, task)
    if any("{projector}" in command for _, _, command in trained):
        add("projector", "train_projector.py --model {model} --targets none", args.projector_flags)
        add_evaluation("projector-eval", projector, [projector])
        add_replaced("projector")
    for _, method, command in trained:
        needs = [projector] if "{projector}" in command else []
        add(method, command, [*args.rl_flags, "--n", "0"], needs)
        out = directory(args, task, method, seed)
        add_evaluation(f"{method}-eval", out, [out])
        add_replaced(method)
        if method == "litereason" and "controls" in args.methods:
            add_evaluation("controls", out, [out], alone=False)
            jobs[-1].words.insert(1, "--controls")
    return jobs


def shared_flags(args, task, seed):
    """What every command has at its end, where nothing overrides it."""
    flags = ["--task", task, "--seed", str(seed), "--max-new-tokens", str(args.max_new_tokens)]
    if hasattr(data.load_task(task), "settings"):
        flags += ["--reward", args.reward] if args.reward else []
        flags += ["--scorer", args.scorer] if args.scorer else []
    return flags + (["--device", args.device] if args.device else [])


def evaluation_flags(args):
    sampling = [[f"--{name.replace('_', '-')}", str(value)] for name, value in evaluation.PAPER.items()]
    flags = [*args.eval_flags, *itertools.chain(*sampling), "--samples", str(args.samples)]
    return flags + (["--n", str(args.n)] if args.n else [])


# ============================================================ what is measured before they start
def measured(args):
    """{task: figures}, from OUT/TASK/measured.json where that is of the same question, else measured now, in
    a process of its own, so that its memory (and the card's) is free again when the runs begin."""
    settings = parsed_settings(args)
    found = {}
    for task in args.tasks:
        counts = {split: len(data.load_task(task).examples(split)) for split in data.SPLITS}
        question = [counts, settings, args.model, args.scorer, args.reward, torch.__version__]
        path = os.path.join(args.out, task, "measured.json")
        known = read_json(path, {})
        if known.get("question") != question:
            print(f"measuring {args.model} on {task}: some steps of decoding and of the update, and answers "
                  f"of the base", flush=True)
            figures = in_a_process(measure_task, args.model, task, counts, settings)
            known = {"question": question, "figures": figures}
            os.makedirs(os.path.dirname(path), exist_ok=True)
            run.write_json(path, known)
        found[task] = known["figures"]
    return found


def parsed_settings(args):
    """{script: its settings, JSON}, as its own command line reads them: a flag that it does not know ends
    here."""
    settings = {}
    for script, module, flags in (("train_rl.py", train_rl, args.rl_flags),
                                  ("train_projector.py", train_projector, args.projector_flags),
                                  ("eval.py", evaluation, evaluation_flags(args))):
        task_flags = shared_flags(args, args.tasks[0], args.seeds[0])
        former, sys.argv = sys.argv, [script, *flags, *task_flags]
        try:
            settings[script] = vars(module.parse_arguments())
        except SystemExit as e:
            raise UserError(f"{script} does not take these flags (see above): {' '.join(flags)}") from e
        finally:
            sys.argv = former
    for own in settings.values():
        for name in ("task", "seed", "out", "model"):
            own.pop(name)
        own.update(reward=args.reward, scorer=args.scorer)
    return settings


def in_a_process(function, *arguments):
    """What the function returns, or the UserError that it raises, from a process of its own."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(there, function, arguments))
    process.start()
    there.close()
    try:
        answer = here.recv()
    except EOFError as e:
        raise UserError("the measurement ended without a result (see above)") from e
    finally:
        process.terminate()
        process.join()
    if isinstance(answer, UserError):
        raise answer
    return answer


def _answer(there, function, arguments):
    try:
        there.send(function(*arguments))
    except UserError as e:
        there.send(e)
    except torch.OutOfMemoryError as e:
        there.send(UserError(f"out of memory while measuring ({str(e).partition(chr(10))[0][:120]}): give "
                             f"train_rl.py less by --rl-flags, such as --rows, --tokens-per-forward"))
    except Exception:
        traceback.print_exc()


def measure_task(name, task_name, counts, settings):
    """-> figures, a dict of JSON: what `seconds_of` and `bytes_of` need."""
    began = time.time()
    model, tokenizer = load(name, settings["train_rl.py"]["device"])
    small = checkpoint.is_small(model)
    rl = with_defaults(settings["train_rl.py"], train_rl.SMALL if small else train_rl.RELEASED)
    stages = with_defaults(settings["train_projector.py"],
                           train_projector.SMALL if small else train_projector.RELEASED)
    args = types.SimpleNamespace(**{**rl, "task": task_name, "seed": 0})
    if not memory.has_fixed_numbers(model):  # card.py decides what no flag says
        vars(args).update({key: settings["train_rl.py"][key] for key in train_rl.PLANNED})
    task = data.load_task(task_name)
    data.start_task(task, name, args.reward, args.scorer, args.seed, args.device)

    examples = task.examples("train")[: rl["train_prompts"]]
    rl["minibatches"] = min(rl["minibatches"], rl["prompts"], len(examples))  # as in train_rl.py
    prompts = train_rl.encode_prompts(args, model, tokenizer, task, examples)
    checkpoint.check_lengths(model, prompts, rl["max_new_tokens"])
    for line in train_rl.fit_to_memory(args, model, task, prompts):
        print(line, flush=True)
    parameters = sum(p.numel() for p in model.parameters())
    if args.offload:
        memory.offload(model, memory.base_parameters(model))
    mean = sum(map(len, prompts)) / len(prompts)
    pace = display.measure(model, tokenizer, prompts, args)
    # The prompts that it measured are the longest.
    pace = pace._replace(prompts=pace.prompts * mean / max(map(len, prompts)))
    return {
        "pace": list(pace),
        "score": seconds_to_score(model, task, max(examples, key=lambda e: len(task.prompt(e, True)))),
        "lengths": lengths_of_the_base(model, tokenizer, task, examples, rl["max_new_tokens"]),
        "prompts": len(prompts),
        "prompt": mean,
        "examples": counts,
        "rl": {key: rl[key] for key in ("prompts", "group", "steps", "minibatches", "max_new_tokens", "val",
                                        "refresh_share")},
        "stages": {key: stages[key] for key in ("prompts", "k", "steps", "batch", "n")},
        "parameters": parameters,
        "projector": sum(p.numel() for p in model.reasoning_projector.parameters()),
        "tokenizer_bytes": bytes_of_tokenizer(tokenizer),
        "device": device_name(model.device),
        "seconds": time.time() - began}


def with_defaults(settings, defaults):
    """Where the command line leaves something open, the defaults of the model's size."""
    settings = dict(settings)
    settings["k"] = settings.get("samples")
    for name, value in defaults.items():
        if settings.get(name) is None:
            settings[name] = value
    return settings


def seconds_to_score(model, task, example, n=8):
    """Of one answer. Without a scorer model it is next to nothing."""
    answer = data.opening_of(task) + " " + task.prompt(example, False)[:1000]

    def score():
        data.score(task, [example] * n, [answer] * n)

    score()  # the first call is slow, and computes what later ones know
    return display.seconds_of(model, score) / n


def lengths_of_the_base(model, tokenizer, task, examples, max_new_tokens, n=8):
    """{prompt: mean slots of an answer}: with RL answers get shorter, if anything."""
    lengths = {}
    for kind in ("plain", "tag"):
        prompts = [checkpoint.encode_prompt(model, tokenizer, task.prompt(e, kind == "tag")) for e in examples[:n]]
        generator = torch.Generator().manual_seed(0)
        rollouts = generate(model, tokenizer, prompts, 1, max_new_tokens, latent="none", generator=generator,
                            **evaluation.PAPER)
        lengths[kind] = sum(len(r.slots) for r in rollouts) / len(rollouts)
    return lengths


def bytes_of_tokenizer(tokenizer):
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return bytes_in(folder)


def bytes_in(folder):
    """Of all files in a folder and those below it."""
    total = 0
    for path, _, files in os.walk(folder):
        total += sum(os.path.getsize(os.path.join(path, file)) for file in files)
    return total


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"a CPU, {torch.get_num_threads()} threads"


# ============================================================ what each run will take
def seconds_of(job, figures, length_of, args):
    """Of a whole run. length_of: {prompt: slots of an answer}."""
    pace = display.Pace(*figures["pace"])
    script, *words = job.words
    if script == "train_rl.py":
        return seconds_of_rl(words, figures, pace, length_of)
    if script == "train_projector.py":
        return seconds_of_stages_1_and_2(figures, pace, length_of["tag"])
    n = min(args.n or math.inf, figures["examples"]["test"])
    alone = min(ALONE, n) if "--alone" in words else 0

    def evaluation_of(kind, n=n):
        length = length_of[kind]
        # The task's own report scores once more.
        scoring = 2 * figures["score"] * n * args.samples
        return pace.decoding(n * args.samples, length) + scoring + alone * pace.alone * length

    if "--controls" in words:
        elsewhere = min(args.n or 200, figures["examples"]["val"])
        return evaluation_of("tag", elsewhere) + len(evaluation.CONTROLS) * evaluation_of("tag")
    if f"{args.model}:plain" in words:
        return evaluation_of("plain") + evaluation_of("tag")
    return evaluation_of("plain" if job.out.split(os.sep)[-1].startswith("rl") else "tag")


def seconds_of_rl(words, figures, pace, length_of):
    """Sampling, rewards and updates of all rollout batches, and what comes at the end of each epoch."""
    rl = figures["rl"]
    thinks_in_latents = "--method" not in words
    length = length_of["plain" if "grpo" in words else "tag"]
    rollouts = rl["prompts"] * rl["group"]
    batches = math.ceil(rl["steps"] / rl["minibatches"])
    update = pace.updating(rl["prompts"], figures["prompt"], rollouts, length)
    if thinks_in_latents:  # the refresh, by batches: a share of the rollouts, once per ratio
        traces = len(train_projector.RATIOS) * rl["refresh_share"] * rollouts
        update += seconds_of_projector(traces, figures, pace, length)
    a_batch = pace.decoding(rollouts, length) + figures["score"] * rollouts + update
    epochs = batches // max(1, figures["prompts"] // rl["prompts"])
    vals = min(rl["val"], figures["examples"]["val"])
    return batches * a_batch + epochs * (pace.decoding(vals, length) + 2 * figures["score"] * vals)


def seconds_of_stages_1_and_2(figures, pace, length):
    """If every trace is kept, and masked in all versions."""
    stages = figures["stages"]
    prompts = min(stages["prompts"] or math.inf, figures["examples"]["train"])
    traces = stages["k"] * prompts
    rows = traces * len(train_projector.RATIOS) * train_projector.VERSIONS
    if stages["steps"] is not None:
        rows = min(rows, stages["steps"] * stages["batch"])
    vals = 2 * min(stages["n"], figures["examples"]["val"])  # before and after
    decoding = pace.decoding(traces, length) + pace.decoding(vals, length)
    scoring = figures["score"] * (traces + 2 * vals)
    return decoding + scoring + seconds_of_projector(rows, figures, pace, length)


def seconds_of_projector(traces, figures, pace, length):
    """Of its training. Prompts have no gradient there, which leaves a third of their time."""
    return pace.updating(traces, figures["prompt"] / 3, traces, length)


def bytes_of(job, figures, keep_states):
    """-> (what a run leaves on the disk, what it takes at most while it runs)

    A model is fp32 weights; a state, too, with AdamW's two moments of what is trained. Two states are kept,
    and a third is written before the oldest goes; so is a second model before the first."""
    script = job.words[0]
    if script == "eval.py":
        return 0, 0
    model = 4 * figures["parameters"] + figures["tokenizer_bytes"]
    base = figures["parameters"] - figures["projector"]
    if script == "train_rl.py":
        state = 12 * base + 4 * figures["projector"]
    else:
        state = 12 * figures["projector"]
    left = model + (2 * state if keep_states else 0)
    return left, max(model + 3 * state, 2 * model + 2 * state)


def share_left(job, figures):
    """0 to 1, of a run that is not done."""
    states = run.saved_states(job.out)
    return 1 - states[-1] / max(1, figures["rl"]["steps"]) if states else 1.0


def plan(args, jobs, figures):
    """-> (the plan as text, GB that have to be free). figures: of each task."""
    lines = ["| run | time | at most | GB it leaves | GB while it runs |", "|---|---|---|---|---|"]
    expected, at_most = 0.0, 0.0  # seconds
    left, there = 0, 0  # bytes: what the runs that are not done will leave, and what they have now
    beside = []  # bytes that a run needs beside what it leaves
    for job in jobs:
        own = figures[job.name.split()[0]]
        full = dict.fromkeys(("plain", "tag"), own["rl"]["max_new_tokens"])
        share = share_left(job, own)
        if is_done(job.out):
            lines.append(f"| {job.name} | done |  |  |  |")
            continue
        usual = share * seconds_of(job, own, own["lengths"], args)
        most = share * seconds_of(job, own, full, args)
        leaves, takes = bytes_of(job, own, args.keep_states)
        begun = f", from step {run.saved_states(job.out)[-1]}" if share < 1 else ""
        disk = f"{leaves / GB:.2f} | {takes / GB:.2f}" if takes else " | "
        lines.append(f"| {job.name}{begun} | {as_time(usual)} | {as_time(most)} | {disk} |")
        expected += usual
        at_most += most
        left += leaves
        there += bytes_in(job.out)
        beside.append(takes - leaves)
    peak = max(0, left + sum(sorted(beside)[-args.jobs :]) - there)
    lines.append(f"| **in all** | {as_time(expected)} | {as_time(at_most)} | {left / GB:.2f} | "
                 f"{peak / GB:.2f} |")
    return "\n".join(lines), peak


def as_time(seconds):
    for unit, name in ((3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1g} s"


def say_plan(args, jobs, figures):
    """Prints the plan; UserError if the disk has too little room for it."""
    for task, own in figures.items():
        counts = ", ".join(f"{n} {split}" for split, n in own["examples"].items())
        lengths = own["lengths"]
        print(f"{args.model} on {task} ({counts} examples), {own['device']}: measured in "
              f"{own['seconds']:.0f} s; the base writes {lengths['plain']:.0f} tokens an answer, "
              f"{lengths['tag']:.0f} with the tag prompt, the limit is {own['rl']['max_new_tokens']}")
        if len(trained_on(args, task)) < len(args.methods):
            print(NO_PENALTY.format(task=task))
    text, needed = plan(args, jobs, figures)
    free = shutil.disk_usage(args.out).free
    states = "kept" if args.keep_states else "deleted (--keep-states keeps them)"
    print(f"""
{text}

time: with answers as long as the base's, and at most, with every answer as long as allowed; loading and the
optimiser's own step come on top. A run can be stopped at any time (Ctrl-C): the same command continues.
disk: the states of a finished run are {states}; {free / GB:.1f} GB are free for {args.out}
""", flush=True)
    if needed > free:
        ways = ["choose an --out on another disk", "fewer --methods, --tasks or --seeds"]
        ways += ["fewer --jobs"] if args.jobs > 1 else []
        ways += ["or leave --keep-states out"] if args.keep_states else []
        raise UserError(f"the disk is too small: {needed / GB:.1f} GB are needed at most and {free / GB:.1f} "
                        f"GB are free; {', '.join(ways)}")


# ============================================================ what came of them
# The rows of the table, in its order.
BEFORE_RL = ["base, explicit reasoning", "base, tag prompt", "LiteReason before RL"]
ROWS = [*BEFORE_RL, *(name for name, _, run, _ in REPLACED if run == "projector"), "LiteReason",
        *(name for name, _, run, _ in REPLACED if run == "litereason"),
        *(name for name, method, _ in TRAINED if method != "litereason")]


def rows_of(args, task, records):
    """{name in the table: {seed: row}}; a row is evaluate's result, with what its training took. records: of
    the jobs, as kept.gather makes them."""
    found = {}
    for seed in args.seeds:
        def rows_in(method, seed=seed):
            return records.get(directory(args, task, method, seed), {"rows": []})["rows"]

        def add(name, rows, training=(), seed=seed):
            for row in rows:
                found.setdefault(name, {})[seed] = {**row, **cost_of(args, task, seed, records, training)}

        add(ROWS[0], [row for row in rows_in("base") if row["prompt"] == "plain"])
        add(ROWS[1], [row for row in rows_in("base") if row["prompt"] == "tag"])
        add(ROWS[2], rows_in("projector-eval"), ["projector"])
        for name, method, command in TRAINED:
            training = ["projector", method] if "{projector}" in command else [method]
            add(name, rows_in(f"{method}-eval"), training)
        for name, method, _, _ in REPLACED:
            add(name, rows_in(method))
    return {name: found[name] for name in ROWS if name in found}


def results_in(folder):
    """The rows that eval.py left there; [] without any."""
    rows = read_json(os.path.join(folder, "results.json"), [])
    return rows if isinstance(rows, list) else [rows]


def cost_of(args, task, seed, records, training):
    """What one row's training took. training: the methods whose runs it needed, its own the last."""
    own = [records.get(directory(args, task, method, seed), {}) for method in training]
    seconds = [record.get("run_seconds") for record in own]
    return {
        "sampled": own[-1].get("sampled") if own else None,
        "run_seconds": None if None in seconds or not own else sum(seconds),
        "command": shown_command(own[-1].get("commands", [""])[-1].split()) if own else ""}


def shown_command(words):
    """For the table: without what is the same for all its rows."""
    shown = []
    skip = 0
    for word in words:
        if word in ("--model", "--task", "--seed", "--n", "--max-new-tokens", "--device"):
            skip = 2
        if not skip:
            shown.append(word)
        skip = max(0, skip - 1)
    return f"python {' '.join(shown)}" if shown else ""


def caption(args, task, found):
    """What a table belongs to, under it."""
    row = next(iter(found.values()))
    figures = read_json(os.path.join(args.out, task, "measured.json"), {}).get("figures", {})
    numbers = [f"{row['n_examples']:.0f} test examples"]
    sampling = display.sampling_in_words(evaluation.PAPER)
    numbers.append(f"{row['samples']:.0f} answers each, sampled at {sampling}, up to {args.max_new_tokens} "
                   f"tokens")
    numbers.append("RL at temperature 1")
    numbers.append(f"seeds {' '.join(map(str, args.seeds))}")
    for flags, of in ((args.rl_flags, "train_rl.py"), (args.projector_flags, "train_projector.py"),
                      (args.eval_flags, "eval.py")):
        if flags:
            numbers.append(f"{of} with `{' '.join(flags)}`")
    if hasattr(data.load_task(task), "settings"):
        numbers.append(f"reward {args.reward or data.load_task(task).settings['reward']}, scorer "
                       f"{args.scorer or 'the base'}")
    if figures:
        numbers.append(figures["device"])
    return f"{short_name(args.model)} on {task}: {'; '.join(numbers)}."


def default_out(model):
    return os.path.join(ROOT, "out", "results", short_name(model))
