"""Books as people have them become the right chapters, splits and draws, or prepare.py says what it took for
what, or refuses with file and line. Small books made here, the headings of real ones."""
import json
import sys
import types

import pytest
from test_real_tasks import SPLITS, contents, data, jsonl, one_line, run, words  # noqa: F401 (a fixture)

from data import next_chapter as nc, read_text
from data.flawed_fictions import prepare as ff_prepare
from data.next_chapter import prepare
from data.next_chapter.prepare import chapters_of_text, number_of, order_of, read_books


def body(i, n=30):
    return f"Body {i} begins here. {words(i, n)}."


def book(headings, n=30):
    return "\n\n".join(f"{heading}\n\n{body(i, n)}" for i, heading in enumerate(headings))


def titles(text):
    return [chapter["title"] for chapter in chapters_of_text(text) if chapter["text"].strip()]


ROMANS = "I II III IV V VI VII VIII IX X XI XII".split()
NTHS = "FIRST SECOND THIRD FIFTH EIGHTH NINTH TWELFTH TWENTIETH TWENTY-FIRST LAST".split()
ONES = "One Two Three Four Five Six Seven Eight Nine".split()
NUMBERS = ONES + "Ten Eleven Twelve Thirteen Fourteen Fifteen Sixteen Seventeen Eighteen Nineteen".split()
for TEN in "Twenty Thirty Forty Fifty Sixty Seventy Eighty Ninety".split():
    NUMBERS += [TEN] + [f"{TEN}-{one}" for one in ONES]


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
    [f"CHAPTER  {roman}" for roman in ROMANS], [f"CHAPTER\t{roman}" for roman in ROMANS],
    [f"CHAPTER\xa0{roman}" for roman in ROMANS], [f"CHAP. {roman}." for roman in ROMANS],
    [f"STAVE {roman}:  MARLEY'S GHOST" for roman in ROMANS], [f"{roman}. A LAMP" for roman in ROMANS],
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


@pytest.mark.parametrize("prose", [
    "he said that\nchapter two of his memoirs was\nthe best", "and in\nChapter Two, as we know,\nit ended",
    "we closed\nChapter One. It was late", "he.\n\nChapter 2 of his book was it"])
def test_prose_that_begins_like_a_heading_is_prose(prose):
    headings = ["Chapter One", "Chapter Two", "Chapter Three"]
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


def test_a_text_is_described_in_one_line(tmp_path, capsys):
    (tmp_path / "novel.txt").write_text(book(["CHAPTER I", "CHAPTER II", "CHAPTER IV"]) + " And more.")
    read_books([str(tmp_path / "novel.txt")])
    said = capsys.readouterr().out
    assert "novel: 3 chapters, from 'CHAPTER I' (Body 0 begins here." in said and said.count("\n") == 1
    assert "to 'CHAPTER IV' (Body 2" in said and "the longest is 'CHAPTER IV', 36 of 104 words" in said


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
    ("PROLOGUE\nCHAPTER I. A\nCHAPTER II. B\nEPILOGUE",
     ["PROLOGUE", "CHAPTER I. A", "CHAPTER II. B", "EPILOGUE"])])
@pytest.mark.parametrize("at_end", [False, True])
def test_a_table_of_contents_has_no_chapters(table, headings, at_end):
    text = book(headings, 100)
    text = f"{text}\n\nCONTENTS\n\n{table}" if at_end else f"CONTENTS\n\n{table}{PREFACE}{text}"
    chapters = [chapter for chapter in chapters_of_text(text) if chapter["text"].strip()]
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
    two = framed("Fox", book(["CHAPTER I", "CHAPTER II"])) + framed("Owl", book(["I", "II", "III"]))
    (tmp_path / "two.txt").write_text(two)
    books = read_books([str(tmp_path / "two.txt")])
    assert {name: len(chapters) for name, chapters in books.items()} == {"two 1": 2, "two 2": 3}
    assert not any(word in str(books) for word in ("licence", "***", "Gutenberg", "header"))
    assert capsys.readouterr().out.count("chapters, from") == 2
    for start in ("***START OF THIS PROJECT GUTENBERG EBOOK {}***",
                  "*** START OF THE PROJECT GUTENBERG EBOOK A\nVERY LONG {} ***",
                  "*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*"):
        rows = [{"book": "b", "text": framed("Fox", "Once.", start)}, {"book": "b", "text": "Two."}]
        books = read_books([str(jsonl(tmp_path / "a.jsonl", rows))])
        assert [chapter["text"].strip() for chapter in books["b"]] == ["Once.", "Two."]


# ---------------------------------------------------------------- order
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


# ---------------------------------------------------------------- editions
def test_editions_of_one_work_stay_in_one_split_and_are_no_other_book(tmp_path, data, capsys):
    """Six books of two chapters; the last is the first with other line ends, commas and a note. All share a
    phrase, which makes no edition."""
    phrase = "once upon a time there was a king who had three sons"
    rows = [{"book": f"book {i}", "chapter": j, "text": f"{phrase} {words(100 * i + j, 400)}"}
            for i in range(5) for j in (1, 2)]
    changed = [row["text"].replace(" ", ",\n").replace("x200,", "x200 (a),") for row in rows[:2]]
    rows += [{**row, "book": "annotated", "text": text} for row, text in zip(rows, changed)]
    path = jsonl(tmp_path / "a.jsonl", rows)
    for seed in range(3):
        run(prepare, "--from", path, "--out", data / "next_chapter", "--seed", seed)
        assert "1 books are editions of another" in capsys.readouterr().out
        parts = contents(data / "next_chapter")
        home = {row["book"]: split for split, rows in parts.items() for row in rows}
        assert home["annotated"] == home["book 0"] and len(home) == 6
        assert {row.get("work") for rows in parts.values() for row in rows} == {None, "book 0"}
    nc._chapters.cache_clear()
    both = [example for split in SPLITS for example in nc.examples(split) if "work" in example]
    drawn = {nc.draw(example, step) for example in both for step in range(60)}
    assert drawn and not drawn & {example["chapter"] for example in both}


# ---------------------------------------------------------------- line ends and files
def test_line_ends_inside_rows_are_those_of_texts(tmp_path):
    for end in ("\r\n", "\r"):
        rows = [{"text": f"One.{end}{end}Two.", "prior_summary": f"a{end}b"}, {"text": "x"}]
        first = read_books([str(jsonl(tmp_path / "a.jsonl", rows))])["a"][0]
        assert first["text"] == "One.\n\nTwo." and first["prior_summary"] == "a\nb"
        (tmp_path / "a.txt").write_bytes(f"One.{end}Two.".encode())
        assert read_text(tmp_path / "a.txt") == "One.\nTwo."
        assert ff_prepare.clean(f"One.{end}{end}Two.") == "One.\n\nTwo."


def test_kinds_of_files_are_known_in_capitals_and_others_are_named(tmp_path, capsys):
    for name, text in (("A.TXT", book(ROMANS)), ("b.Md", book(["# x", "# y"])), ("e.epub", "PK"),
                       ("c.CSV", "book,text\nc,one\nc,two\n"),
                       ("d.JSONL", json.dumps({"story": "d", "sections": ["p", "q"]}))):
        (tmp_path / name).write_text(text)
    assert sorted(read_books([str(tmp_path)])) == ["A", "b", "c", "d"]
    assert f"left out 1 files of other kinds: {tmp_path / 'e.epub'}" in capsys.readouterr().out


def test_what_is_not_utf8_is_refused_with_file_and_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"Chapter 1\n\nIt\x92s caf\xe9")
    one_line("a.txt:3: not UTF-8 .byte 0x92.*iconv -f cp1252", read_books, [str(tmp_path / "a.txt")])


def test_parquet_is_read_with_pyarrow_and_asks_for_it(tmp_path, monkeypatch):
    rows = [{"book": "b", "chapter": n, "text": body(n)} for n in (2, 1)]
    parquet = types.SimpleNamespace(read_table=lambda path: types.SimpleNamespace(to_pylist=lambda: rows))
    monkeypatch.setitem(sys.modules, "pyarrow", types.SimpleNamespace(parquet=parquet))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
    assert [chapter["text"] for chapter in read_books(["a.parquet"])["b"]] == [body(1), body(2)]
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    one_line("a.parquet is parquet: `pip install pyarrow`", read_books, ["a.parquet"])
