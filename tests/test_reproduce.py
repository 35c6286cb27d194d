"""The README's tables are made by scripts from results/*.json; nobody has typed a number there."""
import importlib
import json
import os
import shutil
import signal

import pytest
from conftest import tag
from test_real_runs import EOS, data_folder, force, random_model  # noqa: F401  two of them are fixtures
from test_real_tasks import one_line, run, shared
from test_scripts import script

import data
import eval as evaluation
from lib import UserError, run as runs
import train_projector
import train_rl
from data.flawed_fictions import prepare as ff_prepare
from data.next_chapter import prepare as nc_prepare
from results import evidence, findings, jobs, paper, reproduce
from results import latents as read_latents

PAGES = ["README.md", os.path.join("results", "README.md")]
README = "".join(open(os.path.join(reproduce.ROOT, name), encoding="utf-8").read() for name in PAGES)


def block(name):
    return README.split(f"<!-- {name} -->\n")[1].split(f"\n<!-- /{name} -->")[0]


def is_there(name):
    return os.path.exists(os.path.join(reproduce.HERE, f"{name}.json"))


def figures(name):
    with open(os.path.join(reproduce.HERE, f"{name}.json")) as f:
        return json.load(f)


@pytest.mark.parametrize("task", list(reproduce.TASKS))
def test_the_tables_and_the_numbers_in_sentences_are_those_in_results(task):
    if not is_there(f"methods-{task}"):
        pytest.skip("no runs of it yet")
    rows = figures(f"methods-{task}")
    made = {f"methods-{task}": reproduce.table_of(task, rows),
            f"costs-{task}": reproduce.costs_of(task, rows)}
    controls = figures(f"controls-{task}")
    if task == "tiny":
        made["gpu"] = findings.gpu_table(figures("gpu"))
        made["headline"] = findings.headline(rows, controls["paper"], "the paper's sampling")
        lengths = figures(f"lengths-{task}")
        latents = figures(f"latents-{task}") if is_there(f"latents-{task}") else {}
        made["findings"] = findings.findings(rows, controls["paper"], lengths, latents,
                                             figures(f"differences-{task}"))
        made |= {f"latents-{task}": read_latents.table(latents)} if latents else {}
    else:
        made["chapters"] = findings.next_chapters(rows, controls["paper"])
    made |= {f"controls-{reproduce.mark_of(task, kind)}": reproduce.controls_table(task, own, kind)
             for kind, own in controls.items()}
    for kind, own in figures(f"differences-{task}").items():
        name = f"differences-{reproduce.mark_of(task, kind)}"
        made[name] = evidence.page(own, reproduce.SAMPLED[kind], reproduce.digits_of(task),
                                   reproduce.measure_of(task))
    for name, text in made.items():
        assert f"<!-- {name} -->" not in README or block(name) == text, name


def test_the_readme_says_how_the_quick_run_differs_from_the_tables():
    stages, rl = train_projector.SMALL, train_rl.SMALL
    flags = f"{reproduce.FROZEN} {reproduce.PENALTY}".split()

    def of_the_tables(flag, last=False):
        places = [i for i, word in enumerate(flags) if word == flag]
        return float(flags[places[-1 if last else 0] + 1])

    said = " ".join(README.split())
    for words in (
            f"{stages['prompts']:,} stories instead of {of_the_tables('--prompts'):,.0f} in stage 1",
            f"{stages['steps']} steps instead of {of_the_tables('--steps'):,.0f} in stage 2",
            f"{rl['steps']} RL steps instead of {of_the_tables('--steps', last=True):.0f}"):
        assert words in said, words


def test_the_page_says_what_a_right_and_a_half_right_plan_earn():
    task = data.load_task("tiny.next_chapter")
    tests = task.examples("test")
    right = [f"{task.ANSWER} {task.gold_plan(example)}" for example in tests]
    half = [f"{task.ANSWER} {chain[-1]} and {chain[-2]} ." for chain, _ in (e["chains"] for e in tests)]
    earned = [sum(task.rewards(tests, plans)) / len(tests) for plans in (right, half)]
    said = " ".join(README.split())
    assert "earns {:.0f} on average, one with one of them {:.0f}.".format(*earned) in said


def test_a_table_is_put_between_its_marks_and_nowhere_else(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "ROOT", str(tmp_path))
    (tmp_path / "README.md").write_text("a\n<!-- t -->\n<!-- /t -->\nb\n")  # none yet
    for text in ("new", "| x |\n|---|"):
        reproduce.into_readme("t", text)
        assert (tmp_path / "README.md").read_text() == f"a\n<!-- t -->\n{text}\n<!-- /t -->\nb\n"
    reproduce.into_readme("unknown", "x")
    assert "x\n" not in (tmp_path / "README.md").read_text().replace("| x |", "")


def leave(folder, *rows, **files):
    """A run's directory with its results.json, if there are rows, and other files."""
    folder.mkdir(parents=True, exist_ok=True)
    if rows:
        (folder / "results.json").write_text(json.dumps(rows[0] if len(rows) == 1 else rows))
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)


def row_of(accuracy, tokens=10.0, **more):
    """As eval.py leaves it, of four stories."""
    right = [1.0] * round(4 * accuracy) + [0.0] * (4 - round(4 * accuracy))
    return {"accuracy": accuracy, "accuracy_ci95": [0, 1], "tokens": tokens, "text_tokens": tokens - 2,
            "latent_steps": 2.0, "tags": 1.0, "truncated": 0.0, "forward_positions": 5.0, "flops": 1e9,
            "seconds_each": 0.1, "seconds_alone": 0.2, "n_examples": 4, "samples": 1, "split": "test",
            "per_example": {"score": right, "tokens": [tokens - 1, tokens, tokens, tokens + 1]}, **more}


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Two seeds of the base, LiteReason, its controls and Soft Thinking as their runs would leave them."""
    monkeypatch.setattr(reproduce, "ROOT", str(tmp_path))
    monkeypatch.setattr(reproduce, "HERE", str(tmp_path / "results"))
    monkeypatch.setattr(reproduce, "LENGTHS", {"tiny": [(3, "--hops 3"), (5, "--hops 5")]})
    monkeypatch.setattr(reproduce, "ON_LENGTHS", ["LiteReason"])
    (tmp_path / "results").mkdir()
    (tmp_path / "README.md").write_text("<!-- methods-tiny -->\n\n<!-- /methods-tiny -->\n")
    at = tmp_path / "out" / "results" / "tiny"
    for seed in (0, 1):
        both = {"paper": (0.5, 40.0), "trained": (0.25, 44.0)}
        leave(at / f"base-test-{seed}", *(row_of(*of, sampling=kind) for kind, of in both.items()))
        leave(at / f"litereason-{seed}", config_json=json.dumps({"prompts": 2, "group": 4}),
              seconds_json="30", finished_json="[]",
              metrics_jsonl=json.dumps({"text_tokens": 8, "latent_steps": 2}) + "\n")
        both = {"paper": (1.0 - seed / 4, 10.0 + seed), "trained": (0.75, 12.0)}
        leave(at / f"litereason-test-{seed}", *(row_of(*of, sampling=kind) for kind, of in both.items()))
        leave(at / f"litereason-train-{seed}", row_of(1.0, sampling="paper", split="train"))
        for length in (3, 5):
            leave(at / f"litereason-length-{length}-{seed}", row_of(0.75, sampling="paper"))
        leave(at / f"soft-thinking-{seed}", row_of(0.25, model="soft-thinking", split="test"))
        leave(at / f"controls-{seed}", *(
            row_of(accuracy, control=control, sampling="paper", against_plain={})
            for control, accuracy in (("plain", 1.0), ("latents: shuffled", 0.25))))
    return tmp_path


def rows_of(task, seeds):
    return reproduce.rows_of(reproduce.records_of(task, seeds), task, seeds)


def test_runs_are_found_named_and_averaged(world):
    rows = rows_of("tiny", [0, 1, 2])
    means = {name: reproduce.summary(kinds) for name, kinds in rows.items()}
    assert list(means) == ["base, explicit reasoning", "LiteReason", "Soft Thinking"]
    own = means["LiteReason"]
    expected = {"sampling": "paper", "accuracy": 0.875, "by_seed": [1.0, 0.75], "runs": 2, "sampled": 80.0,
                "run_seconds": 30.0, "tokens_by_seed": [10.0, 11.0]}
    assert {name: own[name] for name in expected} == expected
    assert own["trained"]["accuracy"] == 0.75 and own["train"]["accuracy"] == 1.0
    assert own["accuracy_ci95"][0] < 0.875 < own["accuracy_ci95"][1]
    assert means["base, explicit reasoning"]["sampled"] is None
    assert means["Soft Thinking"]["sampling"] == "trained"  # its row says no sampling


def test_a_row_of_one_sampling_never_stands_in_the_column_of_the_other(world):
    means = {name: reproduce.summary(kinds) for name, kinds in rows_of("tiny", [0, 1]).items()}
    lines = [line.strip("| ").split(" | ") for line in reproduce.table_of("tiny", means).splitlines()]
    table = {line[0]: dict(zip(lines[0], [cell.strip() for cell in line])) for line in lines[2:]}
    own = table["LiteReason"]
    assert (own["accuracy"], own["accuracy, train stories"], own["accuracy, temperature 1"]) == (
        "0.875", "1.000", "0.750")
    assert own["by seed"] == "1.000, 0.750" and own["tokens, temperature 1"] == "12.0"
    soft = table["Soft Thinking"]
    assert soft["accuracy"] == "" == soft["tokens"] and soft["accuracy, temperature 1"] == "0.250"
    costs = reproduce.costs_of("tiny", means)
    assert ("`python train_rl.py --model out/results/tiny/projector-SEED --steps" in costs
            and "10.0, 11.0" in costs)
    only = {"Soft Thinking": means["Soft Thinking"]}
    assert reproduce.table_of("tiny", only).startswith(
        "| tiny, test split, temperature 1 | accuracy | 95 % interval | by seed | tokens")


def test_the_tables_the_differences_and_the_claims_are_written_from_the_runs(world, capsys):
    reproduce.write_tables(["tiny"], [0, 1])
    said = capsys.readouterr().out
    found = {name: json.load(open(world / "results" / f"{name}-tiny.json"))
             for name in ("methods", "controls", "differences", "lengths")}
    assert found["controls"]["paper"]["plain"]["against_plain"] == {}
    assert found["controls"]["paper"]["latents: shuffled"]["against_plain"]["accuracy"] == -0.75
    assert "| another story's latents | 0.250, 0.250 | -0.750 |" in said
    pair, = found["differences"]["paper"]["differences"]
    assert (pair["ours"], pair["theirs"]) == ("LiteReason", "base, explicit reasoning")
    assert pair["tokens_saved"] == pytest.approx(1 - 10.5 / 40)
    assert [own["claim"] for own in found["differences"]["paper"]["claims"]] == [
        "LiteReason is shorter than the base",
        "latents matter: another story's latents in their place cost 10 points or 30 % more tokens"]
    assert "**not met**" in said and "sampling |" in said and "compared with, temperature 1" in said
    assert ([(row["method"], row["length"]) for row in found["lengths"]]
            == [("LiteReason", 3), ("LiteReason", 5)])
    assert "| base, explicit reasoning | 0.500 |" in (world / "README.md").read_text()


def test_a_table_is_made_again_and_gets_rows_where_its_runs_are_gone(world, capsys):
    reproduce.write_tables(["tiny"], [0, 1])
    names = [f"{name}-tiny.json" for name in ("methods", "controls", "differences", "lengths")]
    before = {name: (world / "results" / name).read_bytes() for name in names}
    at = world / "out" / "results" / "tiny"
    shutil.rmtree(at)
    reproduce.write_tables(["tiny"], [0, 1])
    assert before == {name: (world / "results" / name).read_bytes() for name in names}
    leave(at / "moi-0", row_of(0.25, model="moi", split="test"))
    leave(at / "base-test-1", row_of(0.0, sampling="paper"))
    reproduce.write_tables(["tiny"], [0, 1])
    found = json.loads((world / "results" / "methods-tiny.json").read_text())
    assert found["MoI"]["seeds"] == [0] and found["LiteReason"]["by_seed"] == [1.0, 0.75]
    assert found["base, explicit reasoning"]["by_seed"] == [0.5, 0.0]  # what is there counts first
    assert found["LiteReason"]["sampled"] == 80.0 and found["LiteReason"]["run_seconds"] == 30


def test_a_kept_run_of_another_seed_is_in_no_table_and_one_of_another_command_is_never_dropped(world, monkeypatch):
    reproduce.write_tables(["tiny"], [0, 1])
    shutil.rmtree(world / "out")
    kept = world / "results" / "runs-tiny.jsonl"
    assert str(world) not in kept.read_text()
    only = rows_of("tiny", [1])
    assert {seed for kinds in only.values() for rows in kinds.values() for seed in rows} == {1}
    before = kept.read_text()
    methods = [(name, method, command.replace(reproduce.RL, "--steps 97"))
               for name, method, command in reproduce.METHODS]
    monkeypatch.setattr(reproduce, "METHODS", methods)
    with pytest.raises(UserError, match="was made with '.*--steps 96.*', not with '.*--steps 97"):
        rows_of("tiny", [0])
    assert kept.read_text() == before


def test_a_kept_run_whose_words_have_been_renamed_counts(world, monkeypatch):
    reproduce.write_tables(["tiny"], [0, 1])
    shutil.rmtree(world / "out")
    kept_at = world / "results" / "runs-tiny.jsonl"
    text = kept_at.read_text()
    kept_at.write_text(text.replace("results/baselines.py", "baselines.py"))
    rows_of("tiny", [0, 1])
    assert kept_at.read_text() == text


def test_every_run_is_evaluated_after_it_at_both_samplings_and_on_train_stories(monkeypatch):
    monkeypatch.setattr(reproduce, "LENGTHS", {"tiny": [(3, "--hops 3")]})
    todo = {job.name.split()[1]: job for job in reproduce.jobs_of("tiny", 1)}
    at = lambda method: reproduce.directory("tiny", method, 1)
    assert " ".join(todo["rl-lp"].words) == (
        "train_rl.py --method grpo --steps 96 --lr-schedule cosine --overlong-buffer 240 --n 0 --task tiny "
        "--seed 1")
    assert " ".join(todo["rl-test"].words) == (
        f"eval.py --model {at('rl')} --sampling paper trained --alone 8 --task tiny --seed 1")
    assert (" ".join(todo["rl-train"].words)
            == f"eval.py --model {at('rl')} --split train --n 200 --task tiny --seed 1")
    assert todo["rl-test"].needs == [at("rl")] and not todo["base-test"].needs and "base" not in todo
    text = todo["litereason-lp-text-length-3"]
    assert text.needs == [at("litereason-lp")] and "--latent none --hops 3" in " ".join(text.words)
    assert todo["controls"].needs == [at("litereason-lp")] and "coconut-test" not in todo
    of_chapters = {job.name.split()[1] for job in reproduce.jobs_of("tiny.next_chapter", 0)}
    assert "controls" in of_chapters and "answer" in todo and "answer" not in of_chapters
    before = set()
    for job in todo.values():  # what a job needs stands before it
        assert before.issuperset(job.needs)
        before.add(job.out)


def test_every_job_of_the_tiny_world_is_a_command_line_that_its_script_takes(monkeypatch):
    for job in reproduce.all_jobs(list(reproduce.TASKS), [0]):
        module = importlib.import_module(job.words[0].removesuffix(".py").replace("/", "."))
        monkeypatch.setattr("sys.argv", [*job.words, "--out", "x"])
        args = module.parse_arguments()
        if job.words[0] == "eval.py":
            evaluation.check_flags(args)


def test_a_real_next_chapters_table_has_no_claims_on_points(tmp_path):
    """Whatever the model's name is."""
    rows = {method: {"paper": {seed: row_of(0.5, tokens) for seed in (0, 1)}}
            for method, tokens in (("LiteReason", 5.0), ("RL without latents", 20.0),
                                   ("LiteReason, its latents taken away", 9.0))}
    for task, has_points in (("next_chapter", False), ("flawed_fictions", True)):
        _, _, compared = reproduce.write_evidence(str(tmp_path), f"Rnd-1B.{task}", task, rows, {})
        units = {test["unit"] for claim in compared["paper"]["claims"] for test in claim["tests"]}
        assert units == ({"%", "points"} if has_points else {"%"})


def test_tokens_sampled_count_a_rollout_batch_once(tmp_path):
    step = json.dumps({"text_tokens": 90, "latent_steps": 10}) + "\n"
    leave(tmp_path / "run", config_json=json.dumps({"prompts": 3, "group": 2, "minibatches": 4}),
          metrics_jsonl=8 * step)
    assert reproduce.tokens_sampled(str(tmp_path / "run")) == 2 * 3 * 2 * 100


# ---------------------------------------------------------------- a real model
# The scripts run in this process, one after the other, on a random model that is made to write;
# see test_real_runs.py.
SHORT = ("--device", "cpu", "--jobs", 1, "--max-new-tokens", 50, "--n", 2, "--samples", 2,
         "--rl-flags=--steps 2 --prompts 2 --group 2 --minibatches 1 --val 1 --train-prompts 2 "
         "--save-every 1 --show-every 0",
         "--projector-flags=--steps 1 --prompts 4 --samples 3 --n 1")


class Process:
    """In the place of subprocess.Popen: done when it has begun."""
    started = []  # the command lines

    def __init__(self, words, stdout, **_):
        self.started.append(words[1:])
        done = script(*words[1:])
        stdout.write(done.stdout + done.stderr)
        self.returncode = done.returncode

    def poll(self):
        return self.returncode


@pytest.fixture
def here(tmp_path, data_folder, real_tok, force, monkeypatch):
    """Nothing is measured or run in other processes -> the command line of reproduce.py, as a function."""
    base = random_model(tmp_path / "Rnd-1B", real_tok, 151936, EOS)
    monkeypatch.setattr(paper, "in_a_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(jobs.subprocess, "Popen", Process)
    monkeypatch.setattr(jobs.time, "sleep", lambda _: None)
    monkeypatch.setattr(Process, "started", [])
    # where the README's tables are made from
    monkeypatch.setattr(reproduce, "HERE", str(tmp_path / "nowhere"))

    def start(*words):
        run(reproduce, "--model", base, *SHORT, "--out", tmp_path / "out", *words)

    return start


def stop_once(run_of, number, monkeypatch):
    """A run is stopped when it has written the state of that step, as by SIGTERM; the next time it is not."""
    write_state = runs.write_state
    stopped = []

    def write_and_stop(out, step, tensors, rest, keep=2):
        write_state(out, step, tensors, rest, keep)
        if step == number and os.path.basename(out) == run_of and not stopped:
            stopped.append(out)
            raise KeyboardInterrupt(signal.SIGTERM, "state-1 is saved")

    monkeypatch.setattr(runs, "write_state", write_and_stop)


def test_the_papers_table_is_planned_run_stopped_and_continued(
        here, tmp_path, data_folder, force, capsys, monkeypatch):
    source = shared("flawed_fictions_subset.jsonl")
    run(ff_prepare, "--from", source, "--out", data_folder / "flawed_fictions")
    force("He left at noon. " + tag(2) + " She waited. \\boxed{{}}", ("Yes", "No"))
    capsys.readouterr()

    here("--plan")
    said = capsys.readouterr().out
    assert not Process.started and os.listdir(tmp_path / "out" / "flawed_fictions") == ["measured.json"]
    plan = {line.split(" | ")[0]: line.strip(" |").split(" | ")
            for line in said.splitlines() if line.startswith("| ")}
    methods = ["base", "projector", "projector-eval", "controls"]
    for method in paper.METHODS:
        methods += [method, f"{method}-eval"]
    assert {f"| flawed_fictions {method} seed 0" for method in methods} < set(plan)
    assert all(seconds_in(cells[1]) > 0 for name, cells in plan.items() if "seed 0" in name)
    assert seconds_in(plan["| **in all**"][1]) > 0 and "GB are free for" in said

    # One run is stopped: it is named, the others continue, but for what needs it;
    # the table has what there is.
    stop_once("litereason-0", 1, monkeypatch)
    with pytest.raises(UserError,
                       match="1 run failed, see .*/flawed_fictions/litereason-0/log.txt; 4 more"):
        here()
    said = capsys.readouterr().out
    assert "stopped by SIGTERM; state-1 is saved" in said and "| LiteReason + length penalty |" in said
    assert "| LiteReason |" not in said and "measuring" not in said  # that is known from the plan
    assert ([words[0] for words in Process.started[:4]]
            == ["eval.py", "train_projector.py", "eval.py", "eval.py"])
    del Process.started[:]

    here()
    said = capsys.readouterr().out
    out = tmp_path / "out" / "flawed_fictions"
    assert Process.started[0] == ["train_rl.py", "--resume", str(out / "litereason-0")]
    assert [words[0] for words in Process.started[1:]] == 4 * ["eval.py"]
    assert ("| flawed_fictions litereason seed 0, from step 1 |" in said
            and "| flawed_fictions rl seed 0 | done |" in said)

    found = json.load(open(tmp_path / "out" / "methods-Rnd-1B.flawed_fictions.json"))
    assert list(found) == paper.ROWS
    assert all(row["n_examples"] == 2 and row["samples"] == 2 for row in found.values())
    assert found["LiteReason"]["latent_steps"] == 2 and found["RL with tags, no latents"]["latent_steps"] == 0
    assert found["LiteReason"]["sampled"] > 0 and "--steps 2" in found["LiteReason"]["command"]
    made = json.load(open(out / "rl-eval-0" / "config.json"))
    assert (made["temperature"], made["top_p"], made["top_k"]) == (0.7, 0.8, 20)
    written = (tmp_path / "out" / "methods-Rnd-1B.flawed_fictions.md").read_text()
    for what in ("temperature 0.7, top-p 0.8, top-k 20", "`--steps 2 --prompts 2", "zeros for latents",
                 "2 answers each"):
        assert what in written
    assert not (tmp_path / "nowhere").exists()  # and never into the tiny world's tables

    # What the plan said of the disk is what is there now; no state is left.
    left = sum(paper.bytes_in(out / f"{method}-0") for method in methods) / 1e9
    assert left == pytest.approx(float(plan["| **in all**"][3]), rel=0.2)
    assert not list(out.rglob("state-*")) and all((out / f"{m}-0" / "model").exists() for m in paper.METHODS)

    # Nothing is left to do; a run of other settings is never taken for one of these.
    del Process.started[:]
    here()
    assert not Process.started
    with pytest.raises(UserError, match="holds a run of another command .*'--steps' where this one has "
                                             "'--lr'.*: choose another --out"):
        here("--rl-flags=--lr 1")


def seconds_in(cell):
    number, unit = cell.split()
    return float(number) * {"s": 1, "min": 60, "h": 3600}[unit]


def test_next_chapters_get_the_same_table_and_no_length_penalty(here, tmp_path, data_folder, force, capsys):
    source = shared("fairytales_val.jsonl")
    sizes = ("--story-tokens", 60, "--chapter-tokens", 16)
    run(nc_prepare, "--from", source, "--out", data_folder / "next_chapter", *sizes)
    force(f"The king was old. {tag(1)} His son was not.\nIn summary: the{{}} comes.", (" king", " son"))
    here("--tasks", "next_chapter", "--reward", "vrcli", "--methods", "litereason", "rl-lp",
         "--n", 1, "--samples", 1)
    said = capsys.readouterr().out
    assert "no length penalty is run on next_chapter" in said and "| reward |" in said
    assert "reward vrcli, scorer the base" in said
    found = json.load(open(tmp_path / "out" / "methods-Rnd-1B.next_chapter.json"))
    assert list(found) == paper.ROWS[:8]  # of the base and of LiteReason
    assert all("--reward vrcli" in " ".join(words) for words in Process.started)


def test_what_cannot_be_run_is_said_in_one_line_before_a_model_is_loaded(
        tmp_path, data_folder, monkeypatch, capsys):
    monkeypatch.setattr(paper, "in_a_process", lambda *_: pytest.fail("a model was loaded"))
    words = ("--model", "Qwen2.5-1.5B", "--out", tmp_path / "out")
    one_line("flawed_fictions/train.jsonl is not there yet; "
             "make it with: python data/flawed_fictions/prepare.py",
             run, reproduce, *words)
    one_line("no task 'nothing'", run, reproduce, *words, "--tasks", "nothing")
    one_line("--samples is 0; it must be at least 1", run, reproduce, *words, "--samples", 0)
    one_line("--n is for a real --model", run, reproduce, "--n", 4)
    one_line("--tasks flawed_fictions takes a --model", run, reproduce, "--tasks", "flawed_fictions")
    path = data_folder / "flawed_fictions"
    path.mkdir(parents=True)
    for split in ("train", "val", "test"):
        (path / f"{split}.jsonl").write_text(json.dumps({"story": "A story.", "label": True}) + "\n")
    one_line("train_rl.py does not take these flags", run, reproduce, *words, "--rl-flags=--learning-rate 1")
    assert "unrecognized arguments: --learning-rate 1" in capsys.readouterr().err


FIGURES = {  # of a model of 1.5 B parameters, as a card might have them
    "pace": [256, 2.0, 0.05, 0.03, 1e-4], "score": 0.0, "lengths": {"plain": 400.0, "tag": 300.0},
    "prompt": 1000.0, "prompts": 290, "examples": {"train": 290, "val": 62, "test": 62},
    "rl": {"prompts": 48, "group": 16, "steps": 2880, "minibatches": 16, "max_new_tokens": 2048, "val": 100,
           "refresh_share": 0.1},
    "stages": {"prompts": None, "k": 5, "steps": None, "batch": 16, "n": 200},
    "parameters": 1_667_000_000, "projector": 123_900_000, "tokenizer_bytes": 11_000_000, "device": "a card",
    "seconds": 60.0}


def planned(tmp_path, monkeypatch, *words):
    """-> the arguments of a Qwen's table on plot holes, and its jobs."""
    argv = ["reproduce.py", "--model", "Qwen2.5-1.5B", "--out", str(tmp_path), "--jobs", "1", *words]
    monkeypatch.setattr(reproduce.sys, "argv", argv)
    args = reproduce.parse_arguments()
    reproduce.settle(args)
    return args, paper.all_jobs(args)


def test_the_hours_and_the_disk_of_a_plan_follow_from_what_was_measured(tmp_path, monkeypatch):
    args, todo = planned(tmp_path, monkeypatch)
    by_name = {job.name.split()[1]: job for job in todo}

    def seconds(method):
        return paper.seconds_of(by_name[method], FIGURES, FIGURES["lengths"], args)

    # 180 rollout batches of 768 answers of 400 tokens, 256 at a time, and 30 checks on 62 val examples
    batch = 3 * (2 + 0.05 * 400) + 1e-4 * (48 * 1000 + 768 * 400)
    check = 62 / 256 * 2 + (0.03 + 62 / 256 * 0.02) * 400
    assert seconds("rl") == pytest.approx(180 * batch + 30 * check)
    assert seconds("tag") < seconds("litereason") < seconds("rl")  # the refresh; shorter answers
    rounds = 620 / 256 * 2 + (2 * 0.05 + 0.03 + 108 / 256 * 0.02) * 400
    assert seconds("rl-eval") == pytest.approx(rounds + 8 * 0.03 * 400)  # 620 answers, and 8 alone
    left, takes = paper.bytes_of(by_name["rl"], FIGURES, keep_states=False)
    assert left == pytest.approx(4 * 1.667e9 + 11e6) and takes > 3 * 12 * 1.5e9
    assert paper.bytes_of(by_name["rl"], FIGURES, keep_states=True)[0] > left + 2 * 12 * 1.5e9
    text, needed = paper.plan(args, todo, {"flawed_fictions": FIGURES})
    assert 7 * left < needed < 7 * left + takes and "in all" in text


def test_a_disk_that_is_too_small_is_refused_before_anything_starts(tmp_path, monkeypatch, capsys):
    args, todo = planned(tmp_path, monkeypatch, "--keep-states")
    usage = type("Usage", (), {"free": 100e9})
    monkeypatch.setattr(paper.shutil, "disk_usage", lambda _: usage)
    one_line("the disk is too small: 2[0-9]{2}.. GB are needed at most and 100.0 GB are free; "
             "choose an --out .* or leave --keep-states out",
             paper.say_plan, args, todo, {"flawed_fictions": FIGURES})
    assert "| flawed_fictions rl seed 0 |" in capsys.readouterr().out


def test_ctrl_c_stops_real_processes_with_their_states_saved_and_the_same_jobs_continue(
        tmp_path, monkeypatch):
    words = ("train_rl.py --method tag --task tiny --steps 40 --n 0 --val 0 --prompts 2 --group 2 "
             "--max-new-tokens 40 --show-every 0").split()
    out = str(tmp_path / "run")
    todo = [jobs.Job("a run", out, words, states_go=True)]
    sleep = jobs.time.sleep

    def interrupt_in_the_middle(seconds):
        sleep(0.05)
        if runs.saved_states(out)[-1:] > [3]:
            raise KeyboardInterrupt

    monkeypatch.setattr(jobs.time, "sleep", interrupt_in_the_middle)
    with pytest.raises(KeyboardInterrupt) as stopped:
        jobs.run(todo, 1, 1)
    assert stopped.value.args == (signal.SIGINT, "the same command continues")
    step = runs.saved_states(out)[-1]
    log = open(os.path.join(out, "log.txt")).read()
    assert 3 < step < 40 and f"step {step} of 40 is saved" in log and not jobs.is_done(out)

    monkeypatch.setattr(jobs.time, "sleep", lambda _: sleep(0.05))
    jobs.run(todo, 1, 1)
    with open(os.path.join(out, "metrics.jsonl")) as file:
        assert [json.loads(line)["step"] for line in file] == list(range(1, 41))
    assert f"resumed from {out}/state-{step}" in open(os.path.join(out, "log.txt")).read()
    assert jobs.is_done(out) and not runs.saved_states(out)
