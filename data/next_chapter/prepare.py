"""Makes train.jsonl, val.jsonl and test.jsonl of the next-chapter task from books that you have.

Every chapter but a book's first becomes an example: what came before it, and the chapter. Neither books nor
the editions of one work are divided between splits. What --from takes, files and folders in any mixture:

    rows        jsonl, json, csv, parquet: a chapter per row (text, and where known book, chapter, title and
                FIELDS, below), or a whole tale (sections, a list of texts, and a name in book or story)
    texts       txt, md: a book with headings ("Chapter 1", "STAVE I", "4. The Lamp", "# Home") on lines of
                their own, whose numbers rise by one; it prints what it took for chapters
    a folder    all of these in it

    python data/next_chapter/prepare.py --from books/                                   # all that is in there
    python data/next_chapter/prepare.py --from a.txt b.jsonl --story-tokens 1000        # shorter prompts
    python data/next_chapter/prepare.py --from books/ --tokenizer path/to/model         # exact lengths
"""
import os
import random
import re
import sys
from collections import Counter, defaultdict
from textwrap import shorten

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", ".."))

from data import SPLITS, find_clusters, line_ends, read_rows, read_text, some, write_splits
from lib import UserError, run

# Texts (or lists of them, a paragraph each) that a row may have for the example whose NEXT chapter it is.
FIELDS = ("high_level_plan", "prior_summary", "character_sheets", "next_synopsis", "title")
TEXTS = (".txt", ".md", ".markdown")
ROWS = (".jsonl", ".json", ".csv", ".parquet")

# ============================================================ headings
ONES = ("one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen").split()
NTHS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split()
NTHS += [one + "th" for one in ONES[12:]]
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
VALUES = {word: i for words in (ONES, NTHS) for i, word in enumerate(words, 1)}
VALUES |= {word: 10 * i for i, ten in enumerate(TENS, 2) for word in (ten, ten[:-1] + "ieth")}
LETTERS = dict(zip("ivxlc", (1, 5, 10, 50, 100)))
LAST = 10**6  # the number of "the last"; an epilogue has one more
WORD = "|".join(sorted(VALUES, key=len, reverse=True))  # seventeenth before seven
WORDS = rf"(?:(?:{'|'.join(TENS)})[- ]?(?:{'|'.join(NTHS[:9] + ONES[:9])})|{WORD}|last)"
ROMAN = "(?=[ivxlc])c{0,4}(?:xc|xl|l?x{0,4})(?:ix|iv|v?i{0,4})"
NUMBER = rf"(?P<number>\d+(?:\.5\b)?|{ROMAN}|(?:the )?{WORDS})(?![\w'’])"
CHAPTER = r"(?P<word>chapter|chap\.?|ch\.?|stave|canto|letter|kapitel|chapitre|cap[ií]tulo|capitolo|глава)"
TITLE = r"(?P<title>(?!(?-i:[,;]? (?!in which)[a-z])).*)"  # else it is prose: "chapter two of his memoirs"
PATTERNS = [re.compile(pattern, re.IGNORECASE) for pattern in (
    rf"{CHAPTER}(?:[ .:#-]+|(?=\d)){NUMBER}{TITLE}",
    rf"(?:the )?(?P<number>{WORDS}) (?P<word>chapter)\b{TITLE}",
    rf"(?P<word>prologue|epilogue)\b{TITLE}",
    rf"{NUMBER}(?P<title>[.:)]?|(?:[.:)]| ?[-–—]+) ?(?-i:[^a-z\s]).*)",  # a bare numeral, perhaps a title
)]
DECORATED = re.compile(r"[\s\ufeff]*(#{0,6})[\s*_=~|\[–—-]*(.*?)[\s*_=~|#\]–—-]*")  # **Chapter 1**, _IV_


def number_of(text):
    """A number as people write it: digits, a Roman numeral, English words; LAST for "the last"."""
    text = text.lower()
    if text[0].isdigit():
        return float(text)
    if re.fullmatch(ROMAN, text):
        values = [LETTERS[letter] for letter in text]
        return sum(v if v >= after else -v for v, after in zip(values, values[1:] + [0]))
    return sum(VALUES[word] for word in re.findall(WORD, text)) or LAST


def candidates(text):
    """The lines that may be headings: dicts of start and end (in the text), level (how many #), number (None:
    a title after #), called (its title in small letters), look (of a bare numeral; None beside a word), torn
    (the text before it ends within a sentence, as before the number of a page)."""
    found = []
    for line in re.finditer(r"(?m)^.*\w.*$", text):
        start, end = line.span()
        before = text[max(start - 99, found[-1]["end"] if found else 0) : start]
        goes_on = before.rstrip(" \t\n,")[-1:].islower()
        is_wrapped = goes_on and len(before[:-1].rpartition("\n")[2]) > 40  # prose that fills its lines
        marks, bare = DECORATED.fullmatch(" ".join(line.group().split())).groups()
        match = next(filter(None, (pattern.fullmatch(bare) for pattern in PATTERNS)), None)
        one = {"start": start, "end": end, "level": len(marks), "number": None, "look": None, "torn": goes_on}
        if match and len(bare) <= 200 and not is_wrapped:
            word, number, title = map(match.groupdict().get, ("word", "number", "title"), ("", "", ""))
            one["number"] = number_of(number) if number else 0 if word.lower() == "prologue" else LAST + 1
            one["called"] = " ".join(re.findall(r"[^\W\d]+", title.lower()))
            if not word:
                one["look"] = len(marks), number.isdigit(), number.isupper(), one["called"] != ""
        if one["number"] is not None or 0 < len(marks) < 4 and len(bare) <= 80:
            found.append(one)
    return found


def rising(found):
    """The headings among such lines: those with a word, and the numerals that rise by one."""
    headings = []
    last = {"number": -9, "called": None}
    for one, after in zip(found, found[1:] + [last]):
        n = one["number"]
        is_next = n == last["number"] + 1
        is_first = n == after["number"] - 1 and n != last["number"]
        is_again = (n, one["called"]) == (last["number"], last["called"])  # the head of a page
        if is_next or is_first or one["look"] is None and not is_again:
            last = one
            headings.append(last)
    return headings


def span(headings):
    """The length of the longest stretch of text over which the numbers rise by one."""
    lengths = [0]
    for before, one in zip(headings, headings[1:]):
        rises = 0 < one["number"] - before["number"] <= 1
        lengths.append(lengths[-1] + one["start"] - before["start"] if rises else 0)
    return max(lengths)


def cut(text, headings):
    """The chapters between headings. A table of contents has none, with synopses or without: most of its
    entries (but the last, behind which stands what follows) have six times the words in another place."""
    chapters = []
    parts = [{}]  # of chapters whose numbers rise: {number: words}
    for one, after in zip(headings, headings[1:] + [{"start": len(text)}]):
        own = text[one["end"] + 1 : after["start"]]
        if one["number"] is not None:
            if one["number"] <= max(parts[-1], default=-1):
                parts.append({})
            parts[-1][one["number"]] = len(own.split())
        title = text[one["start"] : one["end"]].strip(" \t\xa0\ufeff#*_=~")
        chapters.append({"title": title, "number": one["number"], "text": own, "part": len(parts) - 1})
    for i, part in enumerate(parts):
        entries = list(part)[:-1]
        longer = [sum(6 * part[n] < other.get(n, 0) for n in entries) for other in parts]
        if 2 * max(longer) > len(entries):
            chapters = [{**one, "text": ""} if one["part"] == i else one for one in chapters]
    return chapters


def chapters_of_text(text):
    """Chapters of a plain book by its headings, without what comes before; [] if it has fewer than two.

    Words like "chapter" come first, then lines with #, then the bare numerals that span most of the book:
    inside chapters they number their parts. Prologues, epilogues and a "Chapter I" go with all of them."""
    text = re.sub(r"(?m)^(\S.{0,79})\n={3,}[ \t]*$", r"# \1\n", text)  # the other way to mark a title
    found = candidates(text)
    numbered = [one for one in found if one["number"] is not None]
    marked = [one for one in found if one["level"]]
    worded = rising([one for one in numbered if one["look"] is None])
    bare = []
    for look in {one["look"] for one in numbered if one["look"]}:
        torn = [one["torn"] for one in numbered if one["look"] == look]
        if sum(torn) <= len(torn) / 2:  # else they are numbers of pages
            bare.append(rising([one for one in numbered if one["look"] in (None, look)]))
    bare.sort(key=span, reverse=True)
    is_table = bare and 4 * span(worded) < span(bare[0])
    for way in [[] if is_table else worded, rising([one for one in marked if one["look"]]), marked, *bare]:
        level = max((one["level"] for one in way), default=0)
        chapters = cut(text, [one for one in found if one in way or 0 < level == one["level"]])
        if sum(chapter["text"].strip() != "" for chapter in chapters) > 1:
            return chapters
    return []


# ============================================================ reading books
START = r"(?ms)^[ \t]*\*(?:\*\* ?START OF TH|END\* ?THE SMALL PRINT).{0,300}?\*(?:\*\*|END\*)[^\n]*$"
END = r"(?mi)^[ \t]*(?:\*\*\* ?END OF TH|End of (?:the |this )?Project Gutenberg)"


def ebooks(text):
    """The books in a text, without Project Gutenberg's header and licence; [text] where there are none."""
    pieces = re.split(START, line_ends(text))
    return [re.split(END, piece)[0] for piece in pieces[1:] or pieces]


def order_of(value):
    """The number of a chapter, from a number or a text like "10" or "Chapter IV"; None if it is neither."""
    if isinstance(value, str):
        value = next((one["number"] for one in candidates(value)), None)
    return value if type(value) in (int, float) else None


def chapters_of_row(where, row):
    """(name or None, chapters) of a row: a chapter, or a whole tale in sections."""
    name = row.get("story") if row.get("book") in (None, "") else row["book"]
    texts = row.get("sections", [row.get("text")])
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: expected a chapter (text) or a tale (sections, a list of texts); it has "
                        f"{', '.join(map(str, row)) or 'no fields'}")
    chapters = [{"text": "\n\n".join(ebooks(text))} for text in texts]
    if "sections" not in row:
        chapters[0]["order"] = order_of(row.get("chapter"))
        for field in FIELDS:
            value = row.get(field) or ""
            whole = "\n\n".join(map(str, value)) if isinstance(value, list) else str(value)
            chapters[0][field] = line_ends(whole).strip()
    return None if name is None else str(name).strip(), chapters


def files_of(path):
    """[path], or the text and row files of a folder."""
    files, others = [] if os.path.isdir(path) else [path], []
    for base, folders, names in os.walk(path):
        folders.sort()
        for name in sorted(names):
            is_ours = name.lower().endswith(TEXTS + ROWS) and not name.startswith(".")
            (files if is_ours else others).append(os.path.join(base, name))
    if others:
        print(f"left out {len(others)} files of other kinds: {some(others)}")
    return files


def collect_books(paths):
    """{book: [chapter, ..]}, all that is in the files; UserError if a book is in two of them."""
    books, came_from = {}, {}  # came_from: the file of a book

    def add(name, chapters, source):
        if came_from.setdefault(name, source) != source:
            raise UserError(f"the book {name!r} is in {came_from[name]} and in {source}; give one of them "
                            "another name")
        books.setdefault(name, []).extend(chapters)

    for file in [file for path in paths for file in files_of(path)]:
        stem, kind = os.path.splitext(os.path.basename(file))
        is_rows = kind.lower() in ROWS
        for where, row in read_rows(file) if is_rows else ():
            name, chapters = chapters_of_row(where, row)
            source, default = (where, where) if "sections" in row else (file, stem)
            add(name or default, chapters, source)
        texts = [] if is_rows else ebooks(read_text(file))
        for i, text in enumerate(texts, 1):
            name = stem if len(texts) == 1 else f"{stem} {i}"
            add(name, chapters_of_text(text) or [{"text": text}], file)
    return books


def in_order(name, chapters):
    """Chapters of rows by their numbers; where one repeats or is not there, in the order of the file."""
    known = {chapter.get("order"): chapter for chapter in chapters}
    if None not in known and len(known) == len(chapters):
        return [known[number] for number in sorted(known)]
    if known.keys() - {None}:
        print(f"{name}: {len(chapters)} chapters in the order of the file, as numbers repeat or lack")
    return chapters


def describe(name, chapters):
    """Says what a text was taken for."""
    words = [chapter["text"].split() for chapter in chapters]
    begins, ends = (f"{chapters[i]['title']!r} ({' '.join(words[i][:6])} ..)" for i in (0, -1))
    longest = max(range(len(words)), key=lambda i: len(words[i]))
    print(f"{name}: {len(chapters)} chapters, from {begins} to {ends}; the longest is "
          f"{chapters[longest]['title']!r}, {len(words[longest])} of {sum(map(len, words))} words")


def read_books(paths):
    """{book: [chapter, ..]} in their order, without empty or repeated chapters and one-chapter books; says
    what it leaves out. UserError if nothing is left."""
    books = {}
    left_out = defaultdict(list)  # what -> where
    for name, chapters in collect_books(paths).items():
        unlike = {}  # text -> the first chapter that has it
        for chapter in chapters:
            unlike.setdefault(" ".join(chapter["text"].split()), chapter)
        unlike.pop("", None)
        repeated = [name] * (len(chapters) - len(unlike))
        left_out["chapters, empty (as in a table of contents) or there twice"] += repeated
        if len(unlike) < 2:
            left_out["books with fewer than two chapters"].append(name)
        else:
            books[name] = in_order(name, list(unlike.values()))
            if "number" in books[name][0]:
                describe(name, books[name])
    for what, names in left_out.items():
        if names:
            print(f"left out {len(names)} {what}: {some(list(dict.fromkeys(names)))}")
    if not books:
        raise UserError(f"no book with two or more chapters in {', '.join(paths)} (txt, md, jsonl, json, csv "
                        "or parquet; texts need headings such as \"Chapter 1\")")
    return books


# ============================================================ lengths
def make_ruler(name=None):
    """A function text -> (where its units start, tokens per unit): words at 1.3 tokens (a Chinese or Japanese
    character is one), or the tokens of a model's tokenizer."""
    if name is None:
        word = r"[\u2e80-\uffef]|[^\s\u2e80-\uffef]+"
        return lambda text: ([match.start() for match in re.finditer(word, text)], 1.3)
    from transformers import AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as e:
        raise UserError(f"no tokenizer at {name!r} ({shorten(str(e), 120)})") from e
    tokenizer.model_max_length = 10**9  # whole books are measured, nothing is run
    asked = {"add_special_tokens": False, "return_offsets_mapping": True}
    return lambda text: ([start for start, _ in tokenizer(text, **asked)["offset_mapping"]], 1.0)


def length(ruler, text):  # in tokens
    starts, price = ruler(text)
    return len(starts) * price


def newest(ruler, text, budget):
    """The end of a text that fits the budget, from a paragraph's start if one is near, else from a word's."""
    starts, price = ruler(text)
    keep = int(budget / price)
    if len(starts) <= keep:
        return text
    rest = text[starts[-keep] :]
    if not text[starts[-keep] - 1].isspace():  # a tokenizer may cut inside a word
        rest = re.sub(r"^\S{0,40}(\s+|$)", "", rest)  # in a text without spaces what is cut stays
    return rest[max(rest.find("\n\n", 0, len(rest) // 5), 0) :].strip()


def first(ruler, text, budget):
    """The beginning of a text that fits the budget, to a paragraph's end if one is near, else to a word's."""
    starts, price = ruler(text)
    keep = int(budget / price)
    if len(starts) <= keep:
        return text
    rest = text[: starts[keep]]
    if not text[starts[keep]].isspace() and not rest[-1:].isspace():
        rest = re.sub(r"(^|\s)\S{0,40}$", "", rest)
    at = rest.rfind("\n\n", len(rest) * 4 // 5)
    return rest[: at if at > 0 else None].strip()


def make_examples(book, chapters, ruler, story_tokens, chapter_tokens, counts):
    """One example per chapter from the second on. counts: a Counter of what was cut or did not fit."""
    examples = []
    sizes = [length(ruler, chapter["text"]) for chapter in chapters]
    for i in range(1, len(chapters)):
        given = {field: chapters[i].get(field, "") for field in FIELDS}
        room = story_tokens - sum(length(ruler, given[field]) for field in FIELDS[:-1])
        if room < story_tokens / 4:  # a story of a few words behind long sheets is no story
            counts["unfit"] += 1
            continue
        start = i - 1  # of the chapters before, as many as there is room for
        while start > 0 and sum(sizes[start:i]) < room:
            start -= 1
        *earlier, whole = (chapter["text"].strip() for chapter in chapters[start : i + 1])
        before = "\n\n".join(earlier)
        story, chapter = newest(ruler, before, room), first(ruler, whole, chapter_tokens)
        counts["stories cut"] += story != before or start > 0
        counts["chapters cut"] += chapter != whole
        kept = {field: text for field, text in given.items() if text}
        examples.append({"book": book, "number": i + 1, "story": story, "chapter": chapter, **kept})
    return examples


def works_of(books):
    """{book: the name of the first edition of the same work}. Editions have over 1 % of their runs of 8 words
    in common; by chance it is 0.2 % at most."""
    names = list(books)
    texts = [" ".join(one["text"] for one in chapters) for chapters in books.values()]
    work_of = {name: names[cluster] for name, cluster in zip(names, find_clusters(texts, share=0.01))}
    twins = [f"{name} ({work})" for name, work in work_of.items() if name != work]
    if twins:
        print(f"{len(twins)} books are editions of another, or of parts, stay in its split: {some(twins)}")
    return work_of


# ============================================================ the script
def main():
    parser = run.parser(__doc__)
    add = parser.add_argument
    add("--from", dest="files", nargs="+", required=True, metavar="PATH", help="files and folders, see above")
    add("--out", default=HERE, metavar="DIR", help="where the three files go [beside this script]")
    add("--story-tokens", type=int, default=2048, metavar="N",
        help="of everything before the chapter; the oldest text is cut first [2048]")
    add("--chapter-tokens", type=int, default=1024, metavar="N",
        help="of the chapter that is scored; its end is cut [1024]")
    add("--tokenizer", metavar="NAME",
        help="to count with: a directory, or OWNER/NAME on the hub [1.3 tokens per word]")
    add("--seed", type=int, default=0, help="of the split by book [0]")
    args = parser.parse_args()
    if min(args.story_tokens, args.chapter_tokens) < 16:
        raise UserError("--story-tokens and --chapter-tokens must be at least 16")
    ruler = make_ruler(args.tokenizer)
    books = read_books(args.files)

    work_of = works_of(books)
    editions = Counter(work_of.values())  # of each work
    works = sorted(editions)
    random.Random(args.seed).shuffle(works)
    n = max(1, round(0.15 * len(works)))  # 15 % of the works, and at least one, in val and in test
    split_of = dict(zip(works, ["val"] * n + ["test"] * n + ["train"] * len(works)))
    splits, counts = {split: [] for split in SPLITS}, Counter()
    for name, chapters in books.items():
        examples = make_examples(name, chapters, ruler, args.story_tokens, args.chapter_tokens, counts)
        work = work_of[name]
        if editions[work] > 1:  # the others are no "other book" for the contrastive reward
            examples = [{**example, "work": work} for example in examples]
        splits[split_of[work]] += examples
    unit = "tokens" if args.tokenizer else "tokens (estimated at 1.3 per word)"
    print(f"books {len(books)}, examples {sum(map(len, splits.values()))}; "
          f"in {counts['stories cut']} the oldest text was cut to fit {args.story_tokens} {unit}, "
          f"in {counts['chapters cut']} the chapter's end to fit {args.chapter_tokens}; left out "
          f"{counts['unfit']}, whose other fields leave less than a quarter of the tokens to the story")
    if not all(splits.values()):
        raise UserError(f"{len(editions)} works are too few for three splits: give four books or more; "
                        "the contrastive reward needs two in train")
    for split, examples in splits.items():
        print(f"{split:5} books {len({row['book'] for row in examples}):3}, examples {len(examples):4}")
    write_splits(args.out, splits)


if __name__ == "__main__":
    run.run_script(main)
