"""Books as people have them become the right chapters, splits and draws, or prepare.py says what it took for
what, or refuses with file and line. Small books made here, the headings of real ones."""
import sys
import types

import pytest
from test_real_tasks import contents, data_folder, jsonl, one_line, run, words  # noqa: F401 (a fixture)

from data import SPLITS, next_chapter as nc, read_text
from data.flawed_fictions import prepare as ff_prepare
from data.next_chapter import prepare
from data.next_chapter.prepare import ONES, TENS, chapters_of_text, number_of, order_of, read_books


def body(i, n=30):
    return f"Body {i} begins here. {words(i, n)}."


def book(headings, n=30):
    return "\n\n".join(f"{heading}\n\n{body(i, n)}" for i, heading in enumerate(headings))


def titles(text):
    return [chapter["title"] for chapter in chapters_of_text(text) if chapter["text"].strip()]


ROMANS = "I II III IV V VI VII VIII IX X XI XII".split()
NTHS = "FIRST SECOND THIRD FIFTH EIGHTH NINTH TWELFTH TWENTIETH TWENTY-FIRST LAST".split()
NUMBERS = ONES + [ten + one for ten in TENS for one in ("", *(f"-{one}" for one in ONES[:9]))]


# ---------------------------------------------------------------- headings
def test_numbers_are_read_in_every_form():
    assert [number_of(number) for number in NUMBERS] == list(range(1, 100))
    assert [number_of(f"the {nth}") for nth in NTHS[:-1]] == [1, 2, 3, 5, 8, 9, 12, 20, 21]
    assert number_of("the last") > 10**5
    assert [number_of(n) for n in ("iv", "XIX", "XLIX", "xc", "CXIV", "IIII", "12", "12.5")] == [
        4, 19, 49, 90, 114, 4, 12, 12.5]
    written = 3, 2.5, "10", "IV", "Chapter 7", "4: The Lamp", "V\nThe Lamp", "The Lamp", "", True, None
    assert [order_of(value) for value in written] == [3, 2.5, 10, 4, 7, 4, 5, None, None, None, None]


@pytest.mark.parametrize("headings", [
    [f"CHAPTER THE {nth}" for nth in NTHS],
    [f"The {nth.title()} Chapter" for nth in NTHS],
    [f"Chapter {number}" for number in NUMBERS],
    [f"CHAPTER {roman}. In which {'a very long title goes on ' * 4}" for roman in ROMANS],
    *([f"CHAPTER{space}{roman}" for roman in ROMANS] for space in ("  ", "\t", "\xa0")),
    [f"CHAP. {roman}." for roman in ROMANS], [f"{roman}. A LAMP" for roman in ROMANS],
    [f"STAVE {roman}:  MARLEY'S GHOST" for roman in ROMANS],
    ["1. The Lamp", "2. The Road", "3. Home"], ["1", "2", "3"], ["I", "II", "III"], ["ONE", "TWO", "THREE"],
    ["Chapter1", "Chapter2"], ["chapter one", "chapter two"], ["Kapitel 1", "Kapitel 2"],
    ["PROLOGUE", *ROMANS, "EPILOGUE"], ["Prologue", "1. A Lamp", "2. A Road", "Epilogue: Later"],
    ["Prologue", "Chapter 1", "Chapter 2", "Epilogue"],
    ["CHAPTER I", "CHAPTER II", "CHAPTER THE LAST", "EPILOGUE"],
    ["Chapter 11", "Chapter 12", "Chapter 12.5", "Chapter 13"],
    ["Letter 1", "Letter 2", "Chapter 1", "Chapter 2"],
    ["CHAPTER I", "II.", "III.", "IV."], ["\ufeffChapter One", "2", "3"],  # styles that meet
    ["CHAPTER I", "CHAPTER II", "Chapter 3", "Chapter Four", "CHAPTER V"],
    ["CHAPTER I", "CHAPTER II", "CHAPTER IX", "CHAPTER IV"],  # a number is misprinted
    *([marks.format(head) for head in heads] for heads in (["Chapter 1", "Chapter 2"], ["I", "II", "III"])
      for marks in ("_{}_", "**{}**", "## {}", "  {}", "[{}]", "== {} ==", "- {} -", "— {} —")),
])
def test_headings_as_books_have_them(headings):
    chapters = chapters_of_text("The Novel\n\nby me\n\n" + book(headings))
    assert [chapter["title"] for chapter in chapters] == [head.strip(" \ufeff_*#=") for head in headings]
    assert all(chapter["text"].strip() == body(i) for i, chapter in enumerate(chapters))


def test_markdown_takes_the_level_of_its_chapters():
    text = ("# The Book\n\nby X\n\n## Chapter 1\n\nAbc.\n\n### scene\n\nDef.\n\n## Interlude\n\nXyz.\n\n"
            "# Part 2\n\nA motto.\n\n## Chapter 2\n\nGhi.")
    assert titles(text) == ["Chapter 1", "Interlude", "Chapter 2"]
    assert titles(text.replace("Chapter 1", "1. Home").replace("Chapter 2", "2. Away")) == [
        "1. Home", "Interlude", "2. Away"]
    assert titles("# Home\n\na\n\n# Away\n\nb") == ["Home", "Away"]
    assert titles("Home\n====\n\na\n\nAway\n====\n\nb") == ["Home", "Away"]
    assert titles("Chapter 1\nText of it.\nMore\nChapter 2\ntext\nChapter 3\nEnd.") == [
        "Chapter 1", "Chapter 2", "Chapter 3"]


def test_prose_that_begins_like_a_heading_is_prose():
    headings = ["Chapter One", "Chapter Two", "Chapter Three"]
    for prose in ("he said that\nchapter two of his memoirs was\nthe best",
                  "and in\nChapter Two, as we know,\nit ended", "we closed\nChapter One. It was late",
                  "he.\n\nChapter 2 of his book was it"):
        for i in range(3):
            assert titles(book(headings).replace(f"w{i}x10", prose)) == headings


def test_numerals_inside_chapters_number_their_parts():
    inner = "\n\n".join(f"{numeral}.\n\n{body(ord(numeral[0]))}" for numeral in ROMANS[:3])
    for heads in (["CHAPTER I", "CHAPTER II", "CHAPTER III"],
                  ["I. A SCANDAL", "II. THE LEAGUE", "III. A CASE", "IV. A"]):
        assert titles("\n\n".join(f"{head}\n\n{inner}" for head in heads)) == heads
    a_list = "he took\n\n1. The lamp.\n\n2. The oil.\n\n3. The wick.\n\n"
    assert titles(book(ROMANS).replace("w4x10", a_list)) == ROMANS
    pages = "\n\n".join(f"the man went on and\n\n{i}\n\nsaid that he would" for i in range(1, 40))
    assert titles(pages) == []  # numbers of pages
    heads_of_pages = "\n\n".join(f"CHAPTER {roman}\n\n{body(j)}" for roman in ROMANS for j in range(3))
    assert titles(heads_of_pages) == [f"CHAPTER {roman}" for roman in ROMANS]


# ---------------------------------------------------------------- contents
HEADS = ["CHAPTER I. The Lamp", "CHAPTER II. The Road", "CHAPTER III. Home"]
SYNOPSIS = "A ship is lost; a stranger comes; the lamp goes out."
PREFACE = "\n\nPREFACE\n\n" + "Many words. " * 150 + "\n\n"


@pytest.mark.parametrize("table, headings", [
    ("\n".join(HEADS), HEADS), ("\n".join(f"{head} ..... {5 * i}" for i, head in enumerate(HEADS)), HEADS),
    ("\n\n".join(f"{head}\n{SYNOPSIS}" for head in HEADS), HEADS),
    ("\n\n".join(f"{head}\n\n{SYNOPSIS}" for head in HEADS), [head.split(".")[0] for head in HEADS]),
    ("I. A Lamp\nII. The Road\nIII. Home", ["I. A LAMP", "II. THE ROAD", "III. HOME"]),
    ("I. A Lamp\nII. The Road\nIII. Home", ["CHAPTER I", "CHAPTER II", "CHAPTER III"]),
    ("Chapter 1: A Lamp\nChapter 2: The Road\nChapter 3: Home", ["1", "2", "3"]),
    ("PROLOGUE\nCHAPTER I. A\nEPILOGUE", ["PROLOGUE", "CHAPTER I. A", "EPILOGUE"])])
def test_a_table_of_contents_has_no_chapters(table, headings):
    text = book(headings, 100)
    for whole in (f"CONTENTS\n\n{table}{PREFACE}{text}", f"{text}\n\nCONTENTS\n\n{table}"):
        chapters = [chapter for chapter in chapters_of_text(whole) if chapter["text"].strip()]
        assert [chapter["title"] for chapter in chapters] == headings
        texts = [chapter["text"].strip() for chapter in chapters[:-1]]
        assert texts == [body(i, 100) for i in range(len(headings) - 1)]
        assert "PREFACE" not in "".join(chapter["text"] for chapter in chapters)


def test_the_parts_of_a_book_are_no_tables_of_contents():
    heads, other = ["CHAPTER I", "CHAPTER II"], ["CHAPTER I. Away", "CHAPTER II. Lost", "CHAPTER III. Found"]
    parts = f"PART ONE\n\n{book(heads)}\n\nPART TWO\n\n{book(heads, 60)}"
    table = "\n".join(["PART ONE", *heads, "PART TWO", *heads])
    assert titles(parts) == titles(f"{table}{PREFACE}{parts}") == heads * 2
    assert titles(f"{book(HEADS)}\n\n{book(other, 90)}") == HEADS + other


# ---------------------------------------------------------------- frames and joins
def framed(name, text, start="*** START OF THE PROJECT GUTENBERG EBOOK {} ***"):
    return (f"The Project Gutenberg eBook of {name}\n\nChapter 1 of the header\n\n"
            f"{start.format(name.upper())}\n\n{text}\n\nEnd of Project Gutenberg's {name}\n\n"
            f"*** END OF THE PROJECT GUTENBERG EBOOK {name.upper()} ***\n\nlicence\n\n")


def test_every_ebook_of_a_file_is_a_book_without_its_frame_of_whatever_age(tmp_path, capsys):
    owl = book(["CHAPTER I", "CHAPTER II", "CHAPTER IV"]) + " And more."
    (tmp_path / "two.txt").write_text(framed("Fox", book(["I", "II"])) + framed("Owl", owl))
    books = read_books([str(tmp_path / "two.txt")])
    assert {name: len(chapters) for name, chapters in books.items()} == {"two 1": 2, "two 2": 3}
    assert not any(word in str(books) for word in ("licence", "***", "Gutenberg", "header"))
    first, second = capsys.readouterr().out.splitlines()  # what was taken for what
    assert first.startswith("two 1: 2 chapters, from 'I' (Body 0 begins here.")
    assert second.endswith("to 'CHAPTER IV' (Body 2 begins here. w2x0 w2x1 ..); "
                           "the longest is 'CHAPTER IV', 36 of 104 words")
    for start in ("***START OF THIS PROJECT GUTENBERG EBOOK {}***",
                  "*** START OF THE PROJECT GUTENBERG EBOOK A\nVERY LONG {} ***",
                  "*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*"):
        rows = [{"book": "b", "text": framed("Fox", "Once.", start)}, {"book": "b", "text": "Two."}]
        books = read_books([str(jsonl(tmp_path / "a.jsonl", rows))])
        assert [chapter["text"].strip() for chapter in books["b"]] == ["Once.", "Two."]


@pytest.mark.parametrize("numbers, order", [
    ([3, 1, 2], [1, 2, 0]), (["3", "1", "2"], [1, 2, 0]), (["Chapter II", "Chapter I"], [1, 0]),
    ([None, None], [0, 1]), (["The Fox", "The Owl"], [0, 1]), (["10", "9"], [1, 0]), ([1, 4, 2], [0, 2, 1]),
    # where numbers repeat or lack: the order of the file, and it says so
    (["1.8", "1.9", "1.10"], None), ([1, 2, 3, 1, 2], None), ([1, 3, 2, None], None)])
def test_the_order_is_that_of_the_numbers_or_that_of_the_file(tmp_path, numbers, order, capsys):
    rows = [{"book": "b", "text": body(i), "chapter": n} for i, n in enumerate(numbers)]
    books = read_books([str(jsonl(tmp_path / "a.jsonl", rows))])
    found = [int(chapter["text"].split()[1]) for chapter in books["b"]]
    assert found == (order or list(range(len(numbers))))
    said = f"b: {len(numbers)} chapters in the order of the file, as numbers repeat or lack\n"
    assert capsys.readouterr().out == ("" if order else said)


def test_splits_are_by_work_the_same_every_time_and_an_edition_is_no_other_book(
        tmp_path, data_folder, capsys):
    """Six books of two chapters; the last is the first with other line ends, commas and a note. All share a
    phrase, which makes no edition."""
    phrase = "once upon a time there was a king who had three sons"
    rows = [{"book": f"book {i}", "chapter": j, "text": f"{phrase} {words(100 * i + j, 400)}"}
            for i in range(5) for j in (1, 2)]
    changed = [row["text"].replace(" ", ",\n").replace("x200,", "x200 (a),") for row in rows[:2]]
    rows += [{**row, "book": "annotated", "text": text} for row, text in zip(rows, changed)]
    made, path = [], jsonl(tmp_path / "a.jsonl", rows)
    for seed in (0, 1, 2, 0):
        run(prepare, "--from", path, "--out", data_folder / "next_chapter", "--seed", seed)
        assert "1 books are editions of another" in capsys.readouterr().out
        made.append(contents(data_folder / "next_chapter"))
        home = [(row["book"], split) for split in SPLITS for row in made[-1][split]]  # one example each
        assert len(home) == 6 and {split for _, split in home} == set(SPLITS)
        assert dict(home)["annotated"] == dict(home)["book 0"]
    assert made[0] == made[3] and made[0] != made[1]
    nc._chapters.cache_clear()
    both = [example for split in SPLITS for example in nc.examples(split) if "work" in example]
    drawn = {nc.draw(example, step) for example in both for step in range(60)}
    assert len(both) == 2 and drawn and not drawn & {example["chapter"] for example in both}
    jsonl(path, rows[:4])
    one_line("2 works are too few for three splits", run, prepare, "--from", path, "--out", tmp_path)


# ---------------------------------------------------------------- line ends and files
def test_line_ends_are_those_of_texts_and_what_is_not_utf8_is_refused_with_file_and_line(tmp_path):
    path = tmp_path / "a.txt"
    for end in ("\r\n", "\r"):
        rows = [{"text": f"One.{end}{end}Two.", "prior_summary": f"a{end}b"}, {"text": "x"}]
        first = read_books([str(jsonl(tmp_path / "a.jsonl", rows))])["a"][0]
        assert first["text"] == "One.\n\nTwo." and first["prior_summary"] == "a\nb"
        path.write_bytes(f"One.{end}Two.".encode())
        assert read_text(path) == "One.\nTwo." == ff_prepare.clean(f"One.{end}Two.")
    path.write_bytes(b"Chapter 1\n\nIt\x92s caf\xe9")
    one_line("a.txt:3: not UTF-8 .byte 0x92.*iconv -f cp1252", read_books, [str(path)])


def test_books_in_every_form_are_read_and_what_is_left_out_is_named(tmp_path, monkeypatch, capsys):
    columns = types.SimpleNamespace(to_pylist=lambda: [{"book": "p", "text": text} for text in "xy"])
    parquet = types.SimpleNamespace(read_table=lambda path: columns)
    monkeypatch.setitem(sys.modules, "pyarrow", types.SimpleNamespace(parquet=parquet))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
    jsonl(tmp_path / "rows.jsonl", [{"text": "no book name"}] + [{"text": "so the file's"}] * 2)
    jsonl(tmp_path / "tales.JSONL", [{"story": "fox", "sections": ["a fox", "", "two foxes"]},
                                     {"story": "lone", "sections": ["only one"]}, {"sections": ["a", "b"]},
                                     {"book": 7, "sections": ["c", "d"]}])
    for name, text in (("A.TXT", book(ROMANS)), ("b.Md", book(["# x", "# y"])), ("p.parquet", ""),
                       ("c.CSV", "book,text\nc,one\nc,two\n"), ("e.epub", "PK"), ("bare.txt", "no heading")):
        (tmp_path / name).write_text(text)
    books = read_books([str(tmp_path)])
    assert sorted(books) == [f"{tmp_path}/tales.JSONL:3", *"7Abc", "fox", "p", "rows"]
    assert [[chapter["text"] for chapter in books[name]] for name in ("fox", "rows")] == [
        ["a fox", "two foxes"], ["no book name", "so the file's"]]
    said = capsys.readouterr().out
    for part in (f"left out 1 files of other kinds: {tmp_path / 'e.epub'}", "left out 2 chapters, empty",
                  "2 books with fewer than two chapters: bare, lone"):
        assert part in said
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    one_line("p.parquet is parquet: `pip install pyarrow`", read_books, [str(tmp_path)])
