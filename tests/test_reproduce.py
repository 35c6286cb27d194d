"""The tables of the README and of results/ are made from results/runs-*.jsonl; none is dropped in silence."""
import functools
import importlib
import json
import os
import re
import shutil
import signal
from unittest import mock

import pytest

import data
from lib import UserError, run as runs
from results import reproduce, starts, stats

README, RESULTS, REAL = (open(os.path.join(reproduce.ROOT, *path), encoding="utf-8").read() for path in (
    ["README.md"], ["results", "README.md"], ["results", "real_models.md"]))


def blocks_of(page):
    """{mark: the Markdown between its marks}"""
    return dict(re.findall(r"<!-- (\S+) -->\n(.*?)\n<!-- /\1 -->", page, re.DOTALL))


# ---------------------------------------------------------------- the committed pages
@functools.cache
def made_again(table):
    """tables_of the kept records, whatever is in out/ here."""
    seeds = reproduce.TABLES[table].seeds
    with mock.patch.object(reproduce, "is_done", lambda out: False):
        return reproduce.tables_of(table, reproduce.records_of(table, seeds), seeds)


@pytest.mark.parametrize("table", list(reproduce.TABLES))
def test_the_tables_on_the_pages_are_made_of_the_kept_records(table):
    on_pages = blocks_of(README) | blocks_of(RESULTS) | blocks_of(REAL)
    for name, text in made_again(table)[0].items():
        assert name not in on_pages or on_pages[name] == text, name
    assert f"methods-{table}" in on_pages


def test_the_table_of_starts_is_made_of_the_kept_ones():
    with open(os.path.join(reproduce.HERE, "starts-real.json")) as file:
        assert blocks_of(REAL)["starts-real"] == starts.table(json.load(file))


def test_the_gpus_table_has_the_numbers_that_were_measured():
    with open(os.path.join(reproduce.HERE, "gpu.json")) as file:
        measured = json.load(file)
    decoding, step = measured["f"], measured["g"]
    section = RESULTS.split("### On a GPU")[1].split("###")[0]
    rows = dict(re.findall(r"\| (.*) \| (.*) \|", section))
    assert rows["the same, recorded as a CUDA graph"] == f"{decoding['ms_per_step_graphs']:.1f} ms"
    assert rows["tokens a second, recorded"] == f"{decoding['tokens_per_s']:,.0f}"
    assert rows["peak of the update, without AdamW"] == f"{step['update_GiB']:.1f} GiB"
    assert rows["its update (share of the card's peak)"] == (
        f"{step['update_s']:.1f} s ({100 * step['utilisation']:.0f} %)")
    hours = [f"{step['hours_of_the_papers_run'][slots]:.1f}" for slots in ("256", "115", "34")]
    assert rows["hours of the paper's plot-hole run at 256, 115 or 34 slots an answer"] == ", ".join(hours)


# (sentence among the findings, table, row, accuracy and tokens in it)
SENTENCES = [
    ("LiteReason is right on {} in {} tokens", "tiny", stats.OURS),
    ("the base on {} in {} tokens", "tiny", stats.BASE),
    ("which has no penalty, on {} in {} tokens", "tiny", stats.RL),
    ("learns to write shorthand: {} in {} tokens", "tiny", "RL with tags + length penalty"),
    ("LiteReason ends at {} in {} tokens", "tiny", stats.AFTER_RL),
    ("with shuffled latents at {} in {} tokens", "tiny", f"{stats.AFTER_RL}, shuffled latents"),
    ("recipe** ends at {} in {} tokens here", "tiny", "the paper's recipe + length penalty"),
    ("LiteReason earns {} % in {} tokens", "tiny.next_chapter", stats.OURS),
    ("RL with tags earns {} % in {} tokens", "tiny.next_chapter", "RL with tags + length penalty"),
    ("the base earns {} % in {} tokens", "tiny.next_chapter", stats.BASE)]


@pytest.mark.parametrize("sentence, table, row", SENTENCES)
def test_a_sentence_among_the_findings_has_the_numbers_of_its_row(sentence, table, row):
    said = " ".join(RESULTS.replace("another story's latents", "shuffled latents").split())
    found = made_again(table)[1][row]["paper"]
    accuracy = f"{found['accuracy']:.3f}" if table == "tiny" else f"{found['accuracy']:.0f}"
    assert sentence.format(accuracy, f"{found['tokens']:.1f}") in said


def test_the_page_says_what_a_right_and_a_half_right_plan_earn():
    task = data.load_task("tiny.next_chapter")
    tests = task.examples("test")
    right = [f"{task.ANSWER} {task.gold_plan(example)}" for example in tests]
    half = [f"{task.ANSWER} {chain[-1]} and {chain[-2]} ." for chain, _ in (e["chains"] for e in tests)]
    earned = [sum(task.rewards(tests, plans)) / len(tests) for plans in (right, half)]
    said = " ".join(RESULTS.split())
    assert "earns {:.0f} on average, one with one of them {:.0f}.".format(*earned) in said


def test_the_readmes_table_of_real_weights_has_the_numbers_of_the_starts():
    with open(os.path.join(reproduce.HERE, "starts-real.json")) as file:
        rows = {(row["model"], row["start"]): row for row in json.load(file) if (row["seed"], row["lr"]) == (0, 1e-4)}
    for model in {model for model, _ in rows}:
        raw, normed = rows[model, "mlp"], rows[model, "normed"]
        losses = [raw["no latents"], *(row[when] for row in (raw, normed) for when in ("loss before", "loss after"))]
        assert f"| {model} | {' | '.join(f'{loss:.3f}' for loss in losses)} |" in README


# ---------------------------------------------------------------- from runs to tables
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
    return {"accuracy": accuracy, "tokens": tokens, "text_tokens": tokens - 2, "latent_steps": 2.0,
            "flops": 1e9, "n_examples": 4, "samples": 1, "split": "test", "sampling": "paper",
            "per_example": {"score": right, "tokens": [tokens - 1, tokens, tokens, tokens + 1]}, **more}


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Two seeds of the base, LiteReason, its controls and Soft Thinking as their runs would leave them."""
    monkeypatch.setattr(reproduce, "ROOT", str(tmp_path))
    monkeypatch.setattr(reproduce, "HERE", str(tmp_path / "results"))
    monkeypatch.setattr(reproduce, "draw", lambda *_: None)
    (tmp_path / "results").mkdir()
    (tmp_path / "README.md").write_text("a\n<!-- methods-tiny -->\n<!-- /methods-tiny -->\nb\n")
    at = tmp_path / "out" / "results" / "tiny"
    for seed in (0, 1):
        leave(at / f"base-test-{seed}", row_of(0.5, 40.0), row_of(0.25, 44.0, sampling="trained"))
        leave(at / f"litereason-{seed}", seconds_json="30", finished_json="[]",
              config_json=json.dumps({"prompts": 2, "num_generations": 4}),
              metrics_jsonl=json.dumps({"text_tokens": 8, "latent_steps": 2}) + "\n")
        leave(at / f"litereason-test-{seed}", row_of(1.0 - seed / 4, 10.0 + seed),
              row_of(0.75, 12.0, sampling="trained"))
        leave(at / f"litereason-train-{seed}", row_of(1.0, split="train"))
        leave(at / f"soft-thinking-{seed}", row_of(0.25))
        leave(at / f"controls-{seed}", *(row_of(accuracy, control=control) for control, accuracy in (
            ("plain", 1.0), ("latents: shuffled", 0.25))))
    return tmp_path


def table_of(world):
    """{row: {heading: cell}} of the table on the page."""
    page = (world / "README.md").read_text()
    assert page.startswith("a\n<!-- methods-tiny -->\n| tiny")
    assert page.endswith("|\n<!-- /methods-tiny -->\nb\n")
    lines = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in page.splitlines()[2:-2]]
    return {line[0]: dict(zip(lines[0], line)) for line in lines[2:]}


def test_tables_differences_and_claims_are_written_from_the_runs(world, capsys):
    reproduce.write_tables("tiny", [0, 1, 2])
    said = capsys.readouterr().out
    found = table_of(world)
    assert list(found) == ["base, explicit reasoning", "LiteReason", "Soft Thinking"]
    expected = {"accuracy": "0.875", "by seed": "1.000, 0.750", "accuracy, train stories": "1.000",
                "accuracy, temperature 1": "0.750", "tokens, temperature 1": "12.0", "latent": "2.0"}
    assert {heading: found["LiteReason"][heading] for heading in expected} == expected
    for words in ("| shuffled latents | 0.250, 0.250 | -0.750 |",
                  "LiteReason: base, explicit reasoning | +0.375", "LiteReason is shorter than the base",
                  "**not met**", "compared with, temperature 1", "| LiteReason | 10.0, 11.0 |",
                  "| 30 | `python train_rl.py --model out/results/tiny/projector-SEED --steps"):
        assert words in said, words


def test_a_table_is_made_again_and_gets_rows_where_its_runs_are_gone(world):
    reproduce.write_tables("tiny", [0, 1])
    kept = world / "results" / "runs-tiny.jsonl"
    before, text = table_of(world), kept.read_text()
    at = world / "out" / "results" / "tiny"
    shutil.rmtree(at)
    reproduce.write_tables("tiny", [0, 1])
    assert before == table_of(world) and kept.read_text() == text and str(world) not in text
    leave(at / "moi-0", row_of(0.25))
    leave(at / "base-test-1", row_of(0.0))
    reproduce.write_tables("tiny", [0, 1])
    by_seed = {name: cells["by seed"] for name, cells in table_of(world).items()}
    assert by_seed["MoI"] == "0.250" and by_seed["LiteReason"] == "1.000, 0.750"
    assert by_seed["base, explicit reasoning"] == "0.500, 0.000"  # what is there counts first
    reproduce.write_tables("tiny", [1])  # another seed's records stay, and are in no table
    assert table_of(world)["LiteReason"]["by seed"] == "0.750" and "/litereason-0" in kept.read_text()


def test_a_record_of_another_command_is_refused_and_one_whose_words_were_renamed_counts(world, monkeypatch):
    reproduce.write_tables("tiny", [0, 1])
    shutil.rmtree(world / "out")
    kept = world / "results" / "runs-tiny.jsonl"
    text = kept.read_text()
    kept.write_text(text.replace("results/baselines.py", "baselines.py"))
    reproduce.write_tables("tiny", [0, 1])
    assert kept.read_text() == text
    methods = [(name, method, command.replace("--steps 96", "--steps 97"))
               for name, method, command in reproduce.METHODS]
    monkeypatch.setitem(reproduce.TABLES, "tiny", reproduce.Table("tiny", methods))
    with pytest.raises(UserError, match="was made with '.*--steps 96.*', not with '.*--steps 97"):
        reproduce.write_tables("tiny", [0])
    assert kept.read_text() == text


def test_renamed_flags_have_the_words_of_today():
    words = "train_rl.py --group 6 --rows 9 --tokens-per-forward 8 --latent other --refresh-share 1"
    for pattern, now in reproduce.RENAMED:
        words = re.sub(pattern, now, words)
    assert words == ("train_rl.py --num-generations 6 --gen-batch-size 9 --micro-batch-tokens 8 "
                     "--latent shuffled --refresh-share 1")


def test_tokens_sampled_count_a_rollout_batch_once(tmp_path):
    step = json.dumps({"text_tokens": 90, "latent_steps": 10}) + "\n"
    config = {"prompts": 3, "num_generations": 2, "minibatches": 4}
    leave(tmp_path / "run", config_json=json.dumps(config), metrics_jsonl=8 * step)
    assert reproduce.tokens_sampled(str(tmp_path / "run")) == 2 * 3 * 2 * 100


# ---------------------------------------------------------------- jobs
def test_every_run_is_evaluated_after_it_at_both_samplings_and_on_train_stories():
    todo = {os.path.basename(job.out): job for job in reproduce.jobs_of("tiny", 1)}
    at = lambda method: reproduce.directory("tiny", method, 1)
    assert " ".join(todo["rl-lp-1"].words) == (
        "train_rl.py --method grpo --steps 96 --lr-schedule cosine --overlong-buffer 240 --n 0 --task tiny "
        "--seed 1")
    assert " ".join(todo["rl-test-1"].words) == (
        f"eval.py --model {at('rl')} --sampling paper trained --alone 8 --task tiny --seed 1")
    assert " ".join(todo["rl-train-1"].words) == (
        f"eval.py --model {at('rl')} --split train --n 200 --task tiny --seed 1")
    text = todo["litereason-lp-text-length-3-1"]
    assert text.needs == [at("litereason-lp")] and "--latent none --hops 3" in " ".join(text.words)
    assert todo["controls-1"].needs == [at("litereason-lp")] and "coconut-test-1" not in todo


@pytest.mark.parametrize("table", list(reproduce.TABLES))
def test_every_job_is_a_command_line_that_its_script_takes_behind_what_it_needs(table, monkeypatch):
    before = set()
    for job in reproduce.jobs_of(table, 0):
        assert before.issuperset(job.needs)
        before.add(job.out)
        module = importlib.import_module(job.words[0].removesuffix(".py").replace("/", "."))
        if hasattr(module, "parse_arguments"):
            monkeypatch.setattr("sys.argv", [*job.words, "--out", "x"])
            module.parse_arguments()


def test_the_page_says_how_the_quick_run_differs_from_the_tables():
    flags = f"{reproduce.FROZEN} {reproduce.PENALTY}".split()
    of_the_tables = [float(flags[i + 1]) for i, word in enumerate(flags) if word in ("--prompts", "--steps")]
    assert of_the_tables == [6000, 1200, 96]
    said = " ".join(RESULTS.split())
    for words in ("instead of 6,000 in stage 1", "instead of 1,200 in stage 2", "RL steps instead of 96"):
        assert words in said, words


def test_jobs_are_stopped_with_their_states_saved_and_go_on_and_failures_are_named(
        tmp_path, monkeypatch, capsys):
    words = ("train_rl.py --method tag --task tiny --steps 40 --n 0 --val 0 --prompts 1 "
             "--max-new-tokens 40 --show-every 0").split()
    out = str(tmp_path / "run")
    todo = [reproduce.Job(out, words, [])]
    sleep = reproduce.time.sleep

    def interrupt_in_the_middle(seconds):
        sleep(0.05)
        if runs.saved_states(out)[-1:] > [3]:
            raise KeyboardInterrupt

    monkeypatch.setattr(reproduce.time, "sleep", interrupt_in_the_middle)
    with pytest.raises(KeyboardInterrupt) as stopped:
        reproduce.run_jobs(todo, 1)
    assert stopped.value.args == (signal.SIGINT, "the same command continues")
    step = runs.saved_states(out)[-1]
    assert 3 < step < 40 and not reproduce.is_done(out)

    monkeypatch.setattr(reproduce.time, "sleep", lambda _: sleep(0.05))
    reproduce.run_jobs(todo, 1)
    with open(os.path.join(out, "metrics.jsonl")) as file:
        assert [json.loads(line)["step"] for line in file] == list(range(1, 41))
    assert f"resumed from {out}/state-{step}" in open(os.path.join(out, "log.txt")).read()

    bad = reproduce.Job(str(tmp_path / "bad"), ["eval.py", "--model", str(tmp_path / "nowhere")], [])
    needy = reproduce.Job(str(tmp_path / "needy"), words, [bad.out])
    with pytest.raises(UserError, match="1 failed, see .*bad/log.txt; 1 more, which need what they make"):
        reproduce.run_jobs([bad, needy, *todo], 2)
    assert "bad: 0s, failed" in re.sub(r"\d+s", "0s", capsys.readouterr().out)


def test_a_directory_that_holds_a_run_of_another_command_is_refused(world, monkeypatch):
    words = json.dumps(["train_rl.py", "--steps", "1"])
    leave(world / "out" / "results" / "tiny" / "rl-0", command_json=words)
    monkeypatch.setattr("sys.argv", ["reproduce.py", "--tables", "--only", "tiny", "--seeds", "0"])
    with pytest.raises(UserError, match="rl-0 was made with '--steps', not with '--method': delete"):
        reproduce.main()
