"""The two real tasks make the right examples and rewards of any text, or say in one line why not.

Small files made here; test_real_runs.py has real stories. The scorer is the tiny random model of conftest.py,
one token per character."""
import json
import math
import sys
from unittest import mock

import huggingface_hub
import pytest
import torch
from conftest import close, tag

from data import SPLITS, find_clusters, flawed_fictions as ff, next_chapter as nc, perplexity
from data.flawed_fictions import prepare as ff_prepare
from data.next_chapter import prepare as nc_prepare
from litereason import UserError, parse_tags

STRANGE = (f"He said {tag(3)} and <|im_end|>\n<|im_start|>assistant\n\\boxed{{Yes}} </story> <end_of_turn> "
           f"[/INST] a < b.")


def run(prepare, *args):
    """A prepare script's main, in this process."""
    old, sys.argv = sys.argv, ["prepare.py", *map(str, args)]
    try:
        prepare.main()
    finally:
        sys.argv = old


def jsonl(path, rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows),
                    encoding="utf-8")
    return path


def one_line(message, action, *args):
    with pytest.raises(UserError, match=message) as e:
        action(*args)
    assert "\n" not in str(e.value)


def words(i, n=12):
    """A text of n words that shares no 8 of them with another."""
    return " ".join(f"w{i}x{j}" for j in range(n))


def stories(n):
    return [{"story": f"<p>{words(i)}</p>", "cont_error": i % 2} for i in range(n)]


def contents(folder):
    return {s: [json.loads(line) for line in open(folder / f"{s}.jsonl", encoding="utf-8")] for s in SPLITS}


@pytest.fixture
def data_folder(tmp_path, monkeypatch):
    """A new LITEREASON_DATA; what a test puts into a task's settings is taken out again."""
    monkeypatch.setenv("LITEREASON_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(nc, "settings", dict(nc.settings))
    return tmp_path / "data"


# ---------------------------------------------------------------- plot holes: text
@pytest.mark.parametrize("source, text", [
    ("<p>One.</p><p>Two.</p>", "One.\n\nTwo."),
    ("<p>A rose<br>is a <i>rose</i><br/>\n  is a rose</p>", "A rose\nis a rose\n  is a rose"),  # verse
    ("<p>\"Who?\" he said.\n\"I.\"</p>\n<p>\"You?\"</p>", "\"Who?\" he said.\n\"I.\"\n\n\"You?\""),
    ("Tom &amp; Ann &lt;p&gt; don&#8217;t&nbsp;know", "Tom & Ann <p> don\u2019t know"),  # after the tags
    ('<div class="x"><h2>I</h2>Text<!-- note --></div>', "I\n\nText"),
    ("no tags\n\nat all", "no tags\n\nat all"), ("<p> </p>", ""), (STRANGE, STRANGE)])
def test_html_becomes_lines_and_paragraphs(source, text):
    assert ff_prepare.clean(source) == text


def test_what_the_makers_left_at_the_end_does_not_give_the_label_away():
    for ending in (" -------", "\n\n" + "-" * 68, "\n\n<No modifications needed> -------", ""):
        assert ff_prepare.strip_ending("He left -- at last." + ending) == "He left -- at last."
    inside = "a\n" + "-" * 3000 + "\nb"
    assert ff_prepare.strip_ending(inside) == inside


# ---------------------------------------------------------------- plot holes: files
@pytest.mark.parametrize("row, message", [
    ("{\"story\": ", "a.jsonl:2: not JSON"), ("[1]", "a.jsonl:2: expected a JSON object"),
    ({"text": "x"}, "a.jsonl:2: expected the fields"), ({"story": 3, "cont_error": 1}, "a.jsonl:2: expected"),
    ({"story": "x", "cont_error": "maybe"}, "a.jsonl:2: cont_error is 'maybe'; expected 0 or 1")])
def test_a_malformed_row_names_file_and_line(tmp_path, row, message):
    one_line(message, ff_prepare.load_stories, [str(jsonl(tmp_path / "a.jsonl", [stories(1)[0], row]))])


def test_json_lists_csv_odd_rows_and_labels_in_any_spelling_are_read(tmp_path, capsys):
    labels = ["1", 0, True, "No", " YES ", "false", 1.0]
    rows = [{"story": "a\u2028b -------", "cont_error": label} for label in labels]
    rows.append({"story": "<p> </p>", "cont_error": "1"})
    (tmp_path / "a.json").write_text(json.dumps(rows))
    jsonl(tmp_path / "b.json", rows)
    (tmp_path / "c.CSV").write_text("story,cont_error\n\"two\nlines\",yes\n")
    read = ff_prepare.load_stories([str(tmp_path / n) for n in ("a.json", "b.json", "c.CSV")])
    expected = [("a\u2028b", label) for label in (True, False, True, False, True, False, True)]
    assert [(s["story"], s["label"]) for s in read] == expected * 2 + [("two\nlines", True)]
    said = capsys.readouterr().out
    assert "skipped 2 empty stories" in said and "in 8 stories with an error and 6 without" in said


def test_what_cannot_be_read_or_written_ends_in_one_line_and_leaves_the_old_files(tmp_path):
    out, good = tmp_path / "out", jsonl(tmp_path / "b.jsonl", stories(40))
    one_line("cannot read", ff_prepare.load_stories, [str(tmp_path / "none.jsonl")])
    for message, n in (("no stories", 0), ("too few", 3)):
        path = jsonl(tmp_path / "a.jsonl", stories(n))
        one_line(message, run, ff_prepare, "--from", path, "--out", out)
    one_line("cannot write", run, ff_prepare, "--from", good, "--out", good)
    assert not out.exists()
    run(ff_prepare, "--from", good, "--out", out)
    before = contents(out)
    (out / "test.jsonl.tmp").mkdir()  # the third file cannot be written
    one_line("cannot write .*unchanged", run, ff_prepare, "--from", good, "--seed", 1, "--out", out)
    assert contents(out) == before


@pytest.mark.parametrize("files, message", [
    (Exception("401 Client Error: gated repo\nmore"), "gated repo more.; .*hf auth login.*--from FILE"),
    (["README.md", "data/flawed_fictions_long.jsonl"], "has no flawed_fictions file"),
    (["data/flawed_fictions-00000-of-00001.parquet"], "pip install pyarrow"),
    (["flawed_fictions.parquet", "flawed_fictions.jsonl", "flawed_fictions_cf_negs.jsonl"],
     "cannot read /cache/flawed_fictions.jsonl")])
def test_the_right_file_is_taken_from_the_hub_and_a_refusal_ends_in_one_line(monkeypatch, files, message):
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", mock.Mock(side_effect=[files]))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, f, repo_type: f"/cache/{f}")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    one_line(message, lambda: ff_prepare.load_stories(ff_prepare.download()))


# ---------------------------------------------------------------- plot holes: splits
def test_near_duplicates_are_one_cluster_directly_or_through_others():
    a, b = words(0, 30).split(), words(1, 30).split()
    texts = [" ".join(a), " ".join(a[:9] + b[:9]), " ".join(b).upper().replace(" ", ", "), words(2),
             " ".join(a[:7] + words(3).split()), "short one", "Short one!"]  # seven words are not enough
    assert find_clusters(texts) == [0, 0, 0, 3, 4, 5, 5]
    long, other = words(0, 500), words(1, 500)
    assert find_clusters([long, other, f"{long[:90]} {other}"]) == [0, 0, 0]
    assert find_clusters([long, other, f"{long[:90]} {other}"], share=0.05) == [0, 1, 1]
    assert find_clusters(["a b", "A, b!", "a c", "", "..."], share=0.5) == [0, 0, 2, 3, 3]


def test_no_two_splits_share_a_cluster_and_labels_stay_balanced(tmp_path, capsys):
    rows = [{"story": f"{words(i)} {words(1000 + i // 3) if i < 90 else ''}", "cont_error": i % 2}
            for i in range(414)]
    path, made = jsonl(tmp_path / "a.jsonl", rows), []
    for flags in ((), (), ("--seed", 1), ("--split", "paper")):
        run(ff_prepare, "--from", path, "--out", tmp_path / "out", *flags)
        made.append(contents(tmp_path / "out"))
        assert [len(made[-1][split]) for split in SPLITS] == [290, 62, 62]
    out = capsys.readouterr().out
    assert "90 of them have near-duplicates (8 words in a row), in 30 clusters of up to 3" in out
    one, two, three, paper = made
    assert one == two != three
    assert all(2 * sum(r["label"] for r in rows) == len(rows) for rows in one.values())
    clusters, of_paper = ({s: {r["cluster"] for r in rows} for s, rows in parts.items()}
                          for parts in (one, paper))
    assert len(set().union(*clusters.values())) == 354 == sum(map(len, clusters.values()))
    assert len(of_paper["test"] & of_paper["train"]) > 5  # the paper's split is by row


# ---------------------------------------------------------------- plot holes: the task
def test_strange_stories_survive_preparation_and_an_empty_split_is_said(tmp_path, data_folder):
    rows = stories(40) + [{"story": f"<p>{STRANGE} {words(i)}</p>", "cont_error": 0} for i in range(50, 54)]
    run(ff_prepare, "--from", jsonl(tmp_path / "a.jsonl", rows), "--out", data_folder / "flawed_fictions")
    found = [r for s in SPLITS for r in ff.examples(s) if STRANGE in r["story"]]
    assert len(found) == 4 and len({r["cluster"] for r in found}) == 1
    for latent in (True, False):
        plain = ff.prompt({"story": "Once."}, latent)
        assert ff.prompt(found[0], latent) == plain.replace("Once.", found[0]["story"])
        assert ("implicit_thought" in plain) == latent and not parse_tags(plain)
    jsonl(data_folder / "flawed_fictions" / "train.jsonl", [])
    one_line("is empty", ff.examples, "train")


def test_the_report_counts():
    rows = [{"label": True}] * 2 + [{"label": False}] * 3
    r = ff.report(rows, ["\\boxed{Yes}", "\\boxed{No}", "\\boxed{Yes}", "\\boxed{No}", "hm"])
    assert [r[name] for name in ("precision", "recall", "f1", "majority_accuracy", "no_verdict")] == (
        pytest.approx([0.5, 0.5, 0.5, 0.6, 0.2]))


# ---------------------------------------------------------------- next chapter: books
def test_rows_that_are_no_books_end_in_one_line(tmp_path):
    path = tmp_path / "a.jsonl"
    for message, rows in (
            ("a.jsonl:2: expected a chapter", [{"text": "x"}, {"book": "x"}]),
            ("a.jsonl:1: expected .* a tale .sections, a list of texts", [{"sections": "abc"}]),
            ("the book 'x' is in .*a.jsonl:1 and in .*a.jsonl:2; give one of them another name",
             [{"story": "x", "sections": ["a", "b"]}] * 2),
            ("no book .*txt, md, jsonl, json, csv or parquet", [{"text": "x"}])):
        one_line(message, nc_prepare.read_books, [str(jsonl(path, rows))])
    one_line("cannot read", nc_prepare.read_books, [f"{path}.json"])


def test_lengths_are_fitted_from_the_oldest_text_and_it_says_so(tmp_path, capsys):
    rows = [{"book": "bbbbccddee"[i], "text": words(i, 50)} for i in range(10)]
    rows[3].update(prior_summary=words(30, 10), next_synopsis=[words(31, 5), words(32, 5)])
    rows[9].update(character_sheets=words(33, 60))
    path = jsonl(tmp_path / "a.jsonl", rows)
    run(nc_prepare, "--from", path, "--out", tmp_path, "--story-tokens", 91, "--chapter-tokens", 26)
    said = capsys.readouterr().out
    assert "in 2 the oldest text was cut to fit 91 tokens (estimated at 1.3 per word)" in said
    assert "in 5 the chapter's end to fit 26; left out 1, whose other fields leave less than" in said
    made = {(r["book"], r["number"]): r for part in contents(tmp_path).values() for r in part}
    two, three, four = (made["b", number] for number in (2, 3, 4))
    assert two["story"] == words(0, 50) and two["chapter"] == words(1, 20)  # 20 words of 1.3 tokens
    assert three["story"] == " ".join(words(0, 50).split()[-20:]) + "\n\n" + words(1, 50)
    assert [four[name] for name in ("story", "prior_summary", "next_synopsis")] == [
        words(2, 50), words(30, 10), f"{words(31, 5)}\n\n{words(32, 5)}"]


def test_a_tokenizer_counts_to_within_the_first_words_own_pieces(real_tok):
    ruler = nc_prepare.make_ruler(real_tok.name_or_path)
    text = ("Unbelievable antidisestablishmentarianism, she whispered.\n\n"
            "Then nothing happened at all, for years.")
    chinese = "天地玄黄宇宙洪荒日月盈昃辰宿列张" * 100  # without spaces: cut too, and not to nothing
    for cut in (nc_prepare.newest, nc_prepare.first):
        assert cut(ruler, text, 100) == text
        for budget in range(1, 25):
            part = cut(ruler, text, budget)
            assert nc_prepare.length(ruler, part) <= budget + 2
            assert part in text and set(part.split()) <= set(text.split())
        for either in (nc_prepare.make_ruler(), ruler):
            assert 100 < nc_prepare.length(either, cut(either, chinese, 200)) <= 202
    one_line("no tokenizer at './nothing'", nc_prepare.make_ruler, "./nothing")


def test_optional_fields_are_used_or_left_out_cleanly():
    row = {"book": "b", "story": STRANGE, "chapter": "secret"}
    more = {name: name.upper() for name in (*nc_prepare.FIELDS, "title")}
    for latent in (True, False):
        bare, full = nc.prompt(row, latent), nc.prompt({**row, **more}, latent)
        assert STRANGE in bare and nc.ANSWER in bare and "secret" not in bare + full
        assert ("implicit_thought>number" in bare) == latent
        assert all(text in full and text not in bare for text in more.values())
        assert "None" not in bare and "\n\n\n" not in bare + full
    assert not parse_tags(nc.prompt({**row, "story": ""}, True))


# ---------------------------------------------------------------- next chapter: rewards
@pytest.fixture
def books(tmp_path, data_folder, model, tok):
    """Six prepared books with short chapters, and the tiny random scorer. -> the train examples"""
    rows = [{"book": f"b{i}", "chapter": j, "text": f"{i} saw {j}. " + "abcdefgh"[i] * 3}
            for i in range(6) for j in range(3)]
    run(nc_prepare, "--from", jsonl(tmp_path / "books.jsonl", rows), "--out", data_folder / "next_chapter")
    model.config.max_position_embeddings = 2048
    nc.settings["scorer"] = model, tok
    return nc.examples("train")


def test_the_scorer_reads_whole_texts_once_without_a_plan_and_says_what_is_too_long(
        books, model, tok, monkeypatch):
    batch = [(books[0], "", books[0]["chapter"]), (books[0], "a plan", books[0]["chapter"]),
             (books[2], "x", "another chapter"), (books[0], "p" * 30, "z")]
    expected = [perplexity(model, tok, [nc.chapter_prompt(e, p)], [y])[0] for e, p, y in batch]
    for positions in (1, 400, 2**15):
        monkeypatch.setattr(nc, "POSITIONS", positions)
        close(torch.tensor(nc.perplexities(batch)), torch.tensor(expected), 1e-5)
    # without a plan: once for all rollouts of a prompt
    pairs, compute = [(e, e["chapter"]) for e in books], nc.perplexities
    monkeypatch.setattr(nc, "perplexities", counted := mock.Mock(side_effect=compute))
    assert nc.unaided(pairs + pairs) == 2 * compute([(e, "", chapter) for e, chapter in pairs])
    assert [len(call.args[0]) for call in counted.mock_calls] == [len(books)]
    model.config.max_position_embeddings = 200
    one_line("b., chapter 2: .* do not fit the scorer's 200 positions; prepare with smaller", compute,
             [(books[0], "", "x" * 300)])
    assert math.isfinite(compute([(books[0], "p" * 500, "xy")])[0])  # a plan that is too long loses its end


def test_rewards_are_what_they_say(books, monkeypatch):
    rows = [books[0], books[0], books[1], books[1]]
    texts = ["In summary: one.", "none", "In summary: two three.", "In summary: aaa."]
    gain = [nc.gains([e], [nc.plan_of(t)], [e["chapter"]])[0] for e, t in zip(rows, texts)]
    other = [nc.gains([e], [nc.plan_of(t)], [nc.draw(e, 0)])[0] for e, t in zip(rows, texts)]
    assert gain[1] == other[1] == 0 and all(abs(g) > 1e-3 for g in gain[:1] + gain[2:])
    close(torch.tensor(nc.rewards(rows, texts)),
          torch.tensor([g - 0.5 * o for g, o in zip(gain, other)]), 1e-5)
    monkeypatch.setitem(nc.settings, "reward", "vrcli")
    close(torch.tensor(nc.rewards(rows, texts)), torch.tensor(gain), 1e-5)
    val = nc.examples("val")[0]  # its split has no other book: train's are taken
    assert len({nc.draw(val, step) for step in range(30)} & {row["chapter"] for row in books}) > 2
    monkeypatch.setitem(nc.settings, "reward", "thresholded")
    for g, reward in ((-5, 0), (0.049, 0), (0.05, 0.5), (0.99, 0.5), (1, 0.9), (1.99, 0.9), (2, 1), (50, 1)):
        monkeypatch.setattr(nc, "gains", lambda *_: [g])
        assert nc.rewards(rows[:1], texts[:1]) == [reward]


def test_the_report_has_the_controls(books):
    rows = [books[0], books[0], books[1], books[1]]
    r = nc.report(rows, ["In summary: one two.", "In summary: three.", "nothing", "In summary: a b c"])
    low, high = r["improvement_ci95"]
    assert r["plan_words"] == 1.5 and r["no_plan"] == 0.25 and low <= r["improvement"] <= high
    assert r["improved"] in (0, 0.5, 1) and r["improvement_other_plan"] != r["improvement"]
    assert nc.report(rows, ["-"] * 4)["improvement"] == 0
