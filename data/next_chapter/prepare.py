"""Makes train.jsonl, val.jsonl and test.jsonl of the next-chapter task from books that you have.

Every chapter but a book's first becomes an example: what came before it, and the chapter. Books are never
divided between splits. What --from takes, files and folders in any mixture:

    jsonl or json   a chapter per row: text, and where known book, chapter (a number), title
                    or a whole tale per row: sections (a list of texts), and a name in book or story
    txt or md       a book with chapter headings ("Chapter 1", "CHAPTER IV. The Storm", "# Home") on lines of
                    their own
    a folder        all of these in it; text files without headings are together one book, a chapter each, by
                    file name

A row of chapters or of sections may have high_level_plan, prior_summary, character_sheets, next_synopsis:
texts for the example whose NEXT chapter the row is (for sections: one text for all, or a list with one per
section).

    python data/next_chapter/prepare.py --from books/                                   # all that is in there
    python data/next_chapter/prepare.py --from a.txt b.jsonl --story-tokens 1000        # shorter prompts
    python data/next_chapter/prepare.py --from books/ --tokenizer path/to/model         # exact lengths
"""
import os
import random
import re
import sys
from collections import Counter

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from data import SPLITS, read_rows, read_text, write_splits
import runs
from runs import UserError, run_script

FIELDS = ("high_level_plan", "prior_summary", "character_sheets", "next_synopsis")
TENS = "twenty|thirty|forty|fifty|sixty"
ONES = ("one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|"
        "(?:thir|four|fif|six|seven|eigh|nine)teen")
ORDINAL = "first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|last"
NUMBER = rf"(?:\d+|[ivxlc]+|(?:(?:{TENS})[- ]?)?(?:{ONES})|{TENS}|the {ORDINAL}|{ORDINAL})"
HEADING = re.compile(rf"(?:chapter {NUMBER}\b.{{0,70}}|(?:prologue|epilogue)\b.{{0,70}}|#{{1,3}} .{{1,80}})",
                     re.IGNORECASE)
ROMAN = re.compile(r"[IVXLC]+\.?")  # only where there are no others: inside chapters it numbers their parts


# ============================================================ reading books
def field_text(where, name, value):
    """An optional field as text: a text, or a list of texts (one paragraph each); None stays None."""
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        value = "\n\n".join(value)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}: {name} must be a text or a list of texts, found {type(value).__name__}")
    return value and value.strip()


def chapters_of_row(where, row):
    """(name or None, chapters) of one jsonl row: a whole tale in sections, or one chapter."""
    names = [row[key] for key in ("book", "story") if row.get(key) is not None]
    if not all(type(name) in (str, int) for name in names):
        raise UserError(f"{where}: book and story are names, texts or whole numbers, found {names}")
    name = next((own for own in map(str, names) if own.strip()), None)
    if "sections" in row:
        return name, chapters_of_tale(where, row)
    if not isinstance(row.get("text"), str):
        fields = ", ".join(row) or "none"
        raise UserError(f"{where}: expected a chapter (text) or a tale (sections), found the fields {fields}")
    order = row.get("chapter")
    is_number = isinstance(order, (int, float)) and not isinstance(order, bool)
    title = field_text(where, "title", row.get("title"))
    chapter = {"text": row["text"], "title": title, "order": order if is_number else None}
    for field in FIELDS:
        chapter[field] = field_text(where, field, row.get(field))
    return name, [chapter]


def chapters_of_tale(where, row):
    """The chapters of a row with sections; each optional field is one text for all of them, or a list with
    one per section."""
    texts = row["sections"]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: sections must be a list of texts")
    chapters = [{"text": text} for text in texts]
    for field in FIELDS:
        value = row.get(field)
        values = value if isinstance(value, list) else [value] * len(texts)
        if len(values) != len(texts):
            raise UserError(f"{where}: {field} has {len(values)} entries for {len(texts)} sections")
        for chapter, own in zip(chapters, values):
            chapter[field] = field_text(where, field, own)
    return chapters


def chapters_of_text(text):
    """Chapters of a plain book by its headings; [] if it has fewer than two. Text before the first heading
    is no chapter."""
    text = re.split(r"(?m)^\*\*\* ?START OF TH[^\n]*$", text)[-1]  # Gutenberg's frame
    text = re.split(r"(?m)^\*\*\* ?END OF TH[^\n]*$", text)[0]
    for heading in (HEADING, ROMAN):
        chapters = []
        for line in text.split("\n"):
            if heading.fullmatch(line.strip()):
                chapters.append({"title": line.strip("# \t"), "text": ""})
            elif chapters:
                chapters[-1]["text"] += line + "\n"
        if len(chapters) > 1:
            return chapters
    return []


def number_key(name):
    """Sorts names in the order in which people number them: 2 before 10."""
    return [int(piece) if piece.isdigit() else piece.lower() for piece in re.split(r"(\d+)", name)]


def files_of(path):
    """A file, or a folder's text and json files in the order in which people number them: [(file, its
    folder or None)]."""
    if not os.path.isdir(path):
        return [(path, None)]
    files = []
    for base, folders, names in os.walk(path):
        folders.sort(key=number_key)
        for name in sorted(names, key=number_key):
            if name.endswith((".txt", ".md", ".jsonl", ".json")) and not name.startswith("."):
                files.append((os.path.join(base, name), base))
    if not files:
        raise UserError(f"no txt, md, jsonl or json files in {path}; name a folder that has some")
    return files


def collect_books(paths):
    """{book: [chapter, ..]}, all that is in the files; UserError if a book is in two of them."""
    books = {}
    came_from = {}  # the file or folder that a book was first seen in
    taken = set()  # files, by what they really are

    def add(name, chapters, source):
        if came_from.setdefault(name, source) != source:
            raise UserError(f"the book {name!r} is in {came_from[name]} and in {source}; give one of them "
                            f"another name")
        books.setdefault(name, []).extend(chapters)

    for path in paths:
        for file, directory in files_of(path):
            really = os.path.realpath(file)
            if really in taken:
                continue
            taken.add(really)
            stem = os.path.splitext(os.path.basename(file))[0]
            if file.endswith((".jsonl", ".json")):
                for where, row in read_rows(file):
                    name, chapters = chapters_of_row(where, row)
                    if "sections" in row and name in books:
                        raise UserError(f"{where}: a second tale with the name {name!r}; give one of them "
                                        "another name")
                    add(name or (where if "sections" in row else stem), chapters, file)
            else:
                text = read_text(file)
                chapters = chapters_of_text(text)
                if chapters or directory is None:
                    add(stem, chapters or [{"text": text}], file)
                else:
                    add(os.path.basename(os.path.abspath(directory)), [{"text": text}], directory)
    return books


def read_books(paths):
    """{book: [chapter, ..]} in their order, without empty chapters, one-chapter books and repeated books.

    Says in one line each how many of what were left out. UserError if nothing is left."""
    books = {}
    empty, twice = 0, 0
    short = []
    repeated = {}  # book -> the book with the same text
    seen = {}  # text -> book
    for name, chapters in collect_books(paths).items():
        if all(chapter.get("order") is not None for chapter in chapters):
            chapters.sort(key=lambda chapter: chapter["order"])
        full = [chapter for chapter in chapters if chapter["text"].strip()]
        empty += len(chapters) - len(full)
        unlike = {}  # text -> the first chapter that has it
        for chapter in full:
            unlike.setdefault(" ".join(chapter["text"].split()), chapter)
        twice += len(full) - len(unlike)
        full = list(unlike.values())
        text = " ".join(chapter["text"] for chapter in full)
        same = seen.setdefault(" ".join(text.split()), name)
        if len(full) < 2:
            short.append(name)
        elif same != name:  # under two names it could be in two splits
            repeated[name] = same
        else:
            books[name] = full
    if empty:
        print(f"left out {empty} empty chapters (a table of contents gives some)")
    if twice:
        print(f"left out {twice} chapters that their book has already: they would stand in their own story")
    if short:
        print(f"left out {len(short)} books with fewer than two chapters: {some(short)}")
    if repeated:
        pairs = [f"{name} (as {same})" for name, same in repeated.items()]
        print(f"left out {len(repeated)} books with the same text as another: {some(pairs)}")
    if not books:
        raise UserError(f"no book with two or more chapters in {', '.join(paths)} (text files need headings "
                        f"such as \"Chapter 1\", or a folder with one file per chapter)")
    return books


def some(names):
    """The first three, for a message."""
    return ", ".join(names[:3]) + (" .." if len(names) > 3 else "")


# ============================================================ lengths
def make_ruler(tokenizer=None):
    """A function text -> (where its units start, tokens per unit): words at 1.3 tokens (a Chinese or Japanese
    character is one), or the tokenizer's own tokens."""
    def words(text):
        found = re.finditer(r"[\u2e80-\uffef]|[^\s\u2e80-\uffef]+", text)
        return [match.start() for match in found], 1.3

    def tokens(text):
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return [start for start, _ in encoded["offset_mapping"]], 1.0

    return words if tokenizer is None else tokens


def length(ruler, text):
    """Tokens of a text; 0 for None."""
    starts, price = ruler(text or "")
    return len(starts) * price


def newest(ruler, text, budget):
    """The end of a text that fits the budget (tokens), from a paragraph's start if near, else
    from a word's."""
    starts, price = ruler(text)
    keep = int(budget / price)
    if len(starts) <= keep:
        return text
    rest = text[starts[-keep] :] if keep > 0 else ""
    if rest and not text[starts[-keep] - 1].isspace():  # a tokenizer may cut inside a word
        rest = re.sub(r"^\S{0,40}(\s+|$)", "", rest)  # in a text without spaces what is cut stays
    at = rest.find("\n\n", 0, len(rest) // 5)
    return rest[at:].strip() if at >= 0 else rest.strip()


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
    return rest[:at].strip() if at > 0 else rest.strip()


def fit_story(ruler, chapters, sizes, room, summary=None):
    """The text before a chapter that fits `room` (tokens) -> (story, summary, is it cut?).

    chapters: all before it, sizes: their tokens. With a summary of the earlier chapters the story is the
    last one alone; otherwise as many of the last as there is room for."""
    start = len(chapters) - 1
    while not summary and start > 0 and sum(sizes[start:]) < room:
        start -= 1
    whole = "\n\n".join(chapter["text"].strip() for chapter in chapters[start:])
    story = newest(ruler, whole, room)
    if not summary:
        return story, summary, story != whole or start > 0
    # The summary is older than the last chapter, so it is what is cut.
    shorter = newest(ruler, summary, room - length(ruler, story))
    return story, shorter, story != whole or shorter != summary


def make_examples(book, chapters, ruler, story_tokens, chapter_tokens):
    """One example per chapter from the second on -> (examples, Counter of those with a cut story, a cut
    chapter, and of those that did not fit)."""
    examples = []
    counts = Counter()
    sizes = [length(ruler, chapter["text"]) for chapter in chapters]
    for i in range(1, len(chapters)):
        given = {field: chapters[i][field] for field in FIELDS + ("title",) if chapters[i].get(field)}
        beside = [given.get(field) for field in FIELDS if field != "prior_summary"]
        room = story_tokens - sum(length(ruler, text) for text in beside)
        if room < story_tokens / 4:  # a story of a few words behind long sheets is no story
            counts["unfit"] += 1
            continue
        story, summary, cut = fit_story(ruler, chapters[:i], sizes[:i], room, given.get("prior_summary"))
        if "prior_summary" in given:
            given["prior_summary"] = summary
        whole = chapters[i]["text"].strip()
        chapter = first(ruler, whole, chapter_tokens)
        counts["stories cut"] += cut
        counts["chapters cut"] += chapter != whole
        kept = {field: text for field, text in given.items() if text}
        examples.append({"book": book, "number": i + 1, "story": story, "chapter": chapter, **kept})
    return examples, counts


def split_books(books, seed):
    """{book: split}: 15 % of the books, and at least one, in val and in test; two books make train and
    test, one makes train."""
    names = sorted(books)
    random.Random(seed).shuffle(names)
    n = max(1, round(0.15 * len(names))) if len(names) > 2 else 0
    split_of = dict.fromkeys(names, "train")
    split_of.update(dict.fromkeys(names[:n], "val"))
    split_of.update(dict.fromkeys(names[n : 2 * n], "test"))
    if len(names) == 2:
        split_of[names[0]] = "test"
    return split_of


# ============================================================ the script
def parse_arguments():
    here = os.path.dirname(os.path.abspath(__file__))
    parser = runs.parser(__doc__)
    parser.add_argument("--from", dest="files", nargs="+", required=True, metavar="PATH",
                        help="files and folders, see above (required, so no default)")
    parser.add_argument("--out", default=here, metavar="DIR",
                        help="where the three files go (default: beside this script)")
    parser.add_argument("--story-tokens", type=int, default=2048, metavar="N",
                        help="tokens of everything before the chapter; the oldest text is cut first "
                        "(default 2048)")
    parser.add_argument("--chapter-tokens", type=int, default=1024, metavar="N",
                        help="tokens of the chapter that is scored; its end is cut (default 1024)")
    parser.add_argument("--tokenizer", default=None, metavar="NAME",
                        help="count with this model's tokenizer: a directory, or OWNER/NAME on the hub "
                        "(default: 1.3 tokens per word)")
    parser.add_argument("--seed", type=int, default=0, help="of the split by book (default 0)")
    args = parser.parse_args()
    for flag, value in (("--story-tokens", args.story_tokens), ("--chapter-tokens", args.chapter_tokens)):
        if value < 16:
            raise UserError(f"{flag} is {value}; it must be at least 16")
    return args


def load_tokenizer(path):
    """A tokenizer that can say where in a text its tokens begin."""
    from transformers import AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        tokenizer("a", return_offsets_mapping=True)
    except Exception as e:  # transformers raises what it likes
        why = (str(e).strip().splitlines() or ["?"])[0][:120]
        raise UserError(f"no tokenizer that can be used at {path!r} ({why}); name a model that has one, or "
                        "leave --tokenizer out") from e
    tokenizer.model_max_length = 10**9  # whole books are measured, nothing is run
    return tokenizer


def main():
    args = parse_arguments()
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    ruler = make_ruler(tokenizer)
    books = read_books(args.files)

    made = {}  # book -> its examples, where it has any
    counts = Counter()
    for name, chapters in books.items():
        examples, own_counts = make_examples(name, chapters, ruler, args.story_tokens, args.chapter_tokens)
        counts += own_counts
        if examples:
            made[name] = examples
    unit = "tokens" if tokenizer else "tokens (estimated at 1.3 per word)"
    print(f"books {len(books)}, examples {sum(map(len, made.values()))}; "
          f"in {counts['stories cut']} the oldest text was cut to fit {args.story_tokens} {unit}, "
          f"in {counts['chapters cut']} the chapter's end to fit {args.chapter_tokens}")
    if counts["unfit"]:
        print(f"left out {counts['unfit']} examples whose plan, sheets and synopsis leave less than a "
              f"quarter of the tokens to the story")
    if not made:
        raise UserError("no examples are left; raise --story-tokens")

    splits = {split: [] for split in SPLITS}
    split_of = split_books(made, args.seed)
    for name, examples in made.items():
        splits[split_of[name]] += examples
    if not all(splits.values()):
        empty = " and ".join(split for split in SPLITS if not splits[split])
        print(f"warning: too few books ({len(made)}) for three splits: {empty} stay empty, and training "
              "reads all three; give four books or more")
    elif len({example["book"] for example in splits["train"]}) == 1:
        print("warning: train has one book, and the contrastive reward needs two; give four books or more, "
              "or train with --reward vrcli")
    digest = write_splits(args.out, splits)
    for split, examples in splits.items():
        n_books = len({example["book"] for example in examples})
        print(f"{split:5} books {n_books:3}, examples {len(examples):4}")
    print(f"wrote {args.out}; content {digest}")


if __name__ == "__main__":
    run_script(main)
