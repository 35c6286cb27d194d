"""Makes train.jsonl, val.jsonl and test.jsonl of the next-chapter task from books that you have.

Every chapter but a book's first becomes an example: what came before it, and the chapter. Books are never divided between
splits. What --from takes, files and folders in any mixture:

    jsonl or json   a chapter per row: text, and where known book, chapter (a number), title
                    or a whole tale per row: sections (a list of texts), and a name in book or story
    txt or md       a book with chapter headings ("Chapter 1", "CHAPTER IV. The Storm", "# Home"), alone on their lines
    a folder        all of these in it; text files without headings are together one book, a chapter each, by file name

A row of chapters or of sections may have high_level_plan, prior_summary, character_sheets, next_synopsis: texts for the example
whose NEXT chapter the row is (for sections: one text for all, or a list with one per section).

    python data/next_chapter/prepare.py --from books/                                   # all that is in there
    python data/next_chapter/prepare.py --from a.txt b.jsonl --story-tokens 1000        # shorter prompts
    python data/next_chapter/prepare.py --from books/ --tokenizer path/to/model         # exact lengths
"""
import argparse
import os
import random
import re
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from data import SPLITS, read_rows, read_text
from data.flawed_fictions.prepare import write_splits
from runs import UserError, run_script

FIELDS = ("high_level_plan", "prior_summary", "character_sheets", "next_synopsis")
TENS = "twenty|thirty|forty|fifty|sixty"
ONES = "one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(?:thir|four|fif|six|seven|eigh|nine)teen"
ORDINAL = "first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|last"
NUMBER = rf"(?:\d+|[ivxlc]+|(?:(?:{TENS})[- ]?)?(?:{ONES})|{TENS}|the {ORDINAL}|{ORDINAL})"
HEADING = re.compile(rf"(?:chapter {NUMBER}\b.{{0,70}}|(?:prologue|epilogue)\b.{{0,70}}|#{{1,3}} .{{1,80}})", re.IGNORECASE)
ROMAN = re.compile(r"[IVXLC]+\.?")  # only where there are no others: inside chapters it numbers their parts


# ---------------------------------------------------------------- reading books
def field_text(where, name, value):
    """An optional field as text: a text, or a list of texts (one paragraph each); None stays None."""
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        value = "\n\n".join(value)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}: {name} must be a text or a list of texts, found {type(value).__name__}")
    return value and value.strip()


def chapters_of_row(where, row):
    """(name or None, chapters) of one jsonl row: a whole tale in sections, or one chapter."""
    name = next((row[k] for k in ("book", "story") if isinstance(row.get(k), str) and row[k].strip()), None)
    if "sections" in row:
        texts = row["sections"]
        if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
            raise UserError(f"{where}: sections must be a list of texts")
        chapters = [{"text": t} for t in texts]
        for field in FIELDS:
            value = row.get(field)
            if isinstance(value, list) and len(value) != len(texts):
                raise UserError(f"{where}: {field} has {len(value)} entries for {len(texts)} sections")
            for i, c in enumerate(chapters):
                c[field] = field_text(where, field, value[i] if isinstance(value, list) else value)
        return name, chapters
    if not isinstance(row.get("text"), str):
        raise UserError(f"{where}: expected a chapter (text) or a tale (sections), found the fields {', '.join(row) or 'none'}")
    order = row.get("chapter")
    chapter = {"text": row["text"], "title": field_text(where, "title", row.get("title")),
               "order": order if isinstance(order, (int, float)) and not isinstance(order, bool) else None}
    return name, [{**chapter, **{f: field_text(where, f, row.get(f)) for f in FIELDS}}]


def chapters_of_text(text):
    """Chapters of a plain book by its headings; [] if it has fewer than two. Text before the first heading is no chapter."""
    text = re.split(r"(?m)^\*\*\* ?END OF TH[^\n]*$", re.split(r"(?m)^\*\*\* ?START OF TH[^\n]*$", text)[-1])[0]  # Gutenberg's frame
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


def files_of(path):
    """A file, or a folder's text and json files in the order in which people number them: [(file, its folder or None)]."""
    if not os.path.isdir(path):
        return [(path, None)]
    number = lambda name: [int(x) if x.isdigit() else x.lower() for x in re.split(r"(\d+)", name)]
    found = []
    for base, folders, names in os.walk(path):
        folders.sort(key=number)
        found += [(os.path.join(base, n), base) for n in sorted(names, key=number)
                  if n.endswith((".txt", ".md", ".jsonl", ".json")) and not n.startswith(".")]
    if not found:
        raise UserError(f"no txt, md, jsonl or json files in {path}")
    return found


def read_books(paths):
    """{book: [chapter, ..]} with empty chapters, one-chapter books and repeated books left out; says in one line each what and why."""
    books, came_from = {}, {}  # came_from: the file or folder that a book was first seen in

    def add(name, chapters, source):
        if came_from.setdefault(name, source) != source:
            raise UserError(f"the book {name!r} is in {came_from[name]} and in {source}; give one of them another name")
        books.setdefault(name, []).extend(chapters)

    for path in paths:
        for file, directory in files_of(path):
            stem = os.path.splitext(os.path.basename(file))[0]
            if file.endswith((".jsonl", ".json")):
                for where, row in read_rows(file):
                    name, chapters = chapters_of_row(where, row)
                    if "sections" in row and name in books:
                        raise UserError(f"{where}: a second tale with the name {name!r}")
                    add(name or (where if "sections" in row else stem), chapters, file)
            else:
                text = read_text(file)
                chapters = chapters_of_text(text)
                if chapters or directory is None:
                    add(stem, chapters or [{"text": text}], file)
                else:
                    add(os.path.basename(os.path.abspath(directory)), [{"text": text}], directory)
    empty, short, seen, repeated = 0, [], {}, {}
    for name in list(books):
        chapters = books[name]
        if all(c.get("order") is not None for c in chapters):
            chapters.sort(key=lambda c: c["order"])
        full = [c for c in chapters if c["text"].strip()]
        empty += len(chapters) - len(full)
        books[name] = full
        same = seen.setdefault(" ".join(" ".join(c["text"] for c in full).split()), name)
        if len(full) < 2:
            short.append(name)
        elif same != name:  # under two names it could be in two splits
            repeated[name] = same
    some = lambda names: ", ".join(names[:3]) + (" .." if len(names) > 3 else "")
    if empty:
        print(f"left out {empty} empty chapters (a table of contents gives some)")
    if short:
        print(f"left out {len(short)} books with fewer than two chapters: {some(short)}")
    if repeated:
        print(f"left out {len(repeated)} books with the same text as another: {some([f'{a} (as {b})' for a, b in repeated.items()])}")
    left = {n: c for n, c in books.items() if len(c) > 1 and n not in repeated}
    if not left:
        raise UserError(f"no book with two or more chapters in {', '.join(paths)} (text files need headings such as \"Chapter 1\", "
                        f"or a folder with one file per chapter)")
    return left


# ---------------------------------------------------------------- lengths
def make_ruler(tokenizer=None):
    """A function text -> (where its units start, tokens per unit): words at 1.3 tokens, or the tokenizer's own tokens."""
    if tokenizer is None:
        return lambda text: ([m.start() for m in re.finditer(r"\S+", text)], 1.3)
    return lambda text: ([a for a, _ in tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]], 1.0)


def length(ruler, text):
    starts, price = ruler(text or "")
    return len(starts) * price


def newest(ruler, text, budget):
    """The end of a text that fits the budget (tokens), from a paragraph's start if one is near, else from a word's."""
    starts, price = ruler(text)
    keep = int(budget / price)
    if len(starts) <= keep:
        return text
    rest = text[starts[-keep] :] if keep > 0 else ""
    if rest and not text[starts[-keep] - 1].isspace():  # a tokenizer may cut inside a word
        rest = re.sub(r"^\S*\s*", "", rest)
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
        rest = re.sub(r"\S*$", "", rest)
    at = rest.rfind("\n\n", len(rest) * 4 // 5)
    return rest[:at].strip() if at > 0 else rest.strip()


def make_examples(book, chapters, ruler, story_tokens, chapter_tokens):
    """One example per chapter from the second on -> (rows, how many stories were cut, how many chapters, how many did not fit)."""
    rows, stories_cut, chapters_cut, unfit = [], 0, 0, 0
    sizes = [length(ruler, c["text"]) for c in chapters]
    for i in range(1, len(chapters)):
        given = {f: chapters[i][f] for f in FIELDS + ("title",) if chapters[i].get(f)}
        room = story_tokens - sum(length(ruler, given.get(f)) for f in FIELDS if f != "prior_summary")
        if room < story_tokens / 4:  # a story of a few words behind long sheets is no story
            unfit += 1
            continue
        # With a summary of the earlier chapters the story is the last one alone; else as many of the last as there is room for.
        at = i - 1
        while "prior_summary" not in given and at > 0 and sum(sizes[at:i]) < room:
            at -= 1
        whole = "\n\n".join(c["text"].strip() for c in chapters[at:i])
        story = newest(ruler, whole, room)
        if "prior_summary" in given:  # older than the last chapter, so cut before it
            summary = newest(ruler, given["prior_summary"], room - length(ruler, story))
            stories_cut += story != whole or summary != given["prior_summary"]
            given["prior_summary"] = summary
        else:
            stories_cut += story != whole or at > 0
        chapter = first(ruler, chapters[i]["text"].strip(), chapter_tokens)
        chapters_cut += chapter != chapters[i]["text"].strip()
        rows.append({"book": book, "number": i + 1, "story": story, "chapter": chapter, **{k: v for k, v in given.items() if v}})
    return rows, stories_cut, chapters_cut, unfit


def split_books(books, seed):
    """{book: split}: 15 % of the books, and at least one, in val and in test; two books make train and test, one makes train."""
    names = sorted(books)
    random.Random(seed).shuffle(names)
    n = max(1, round(0.15 * len(names))) if len(names) > 2 else 0
    out = {name: SPLITS[1] if i < n else SPLITS[2] if i < 2 * n else SPLITS[0] for i, name in enumerate(names)}
    if len(names) == 2:
        out[names[0]] = SPLITS[2]
    return out


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = os.path.dirname(os.path.abspath(__file__))
    ap.add_argument("--from", dest="files", nargs="+", required=True, metavar="PATH", help="files and folders, see above")
    ap.add_argument("--out", default=here, metavar="DIR", help="where the three files go (default: beside this script)")
    ap.add_argument("--story-tokens", type=int, default=2048, help="tokens of everything before the chapter; the oldest text is cut first")
    ap.add_argument("--chapter-tokens", type=int, default=1024, help="tokens of the chapter that is scored; its end is cut")
    ap.add_argument("--tokenizer", default=None, metavar="PATH", help="count with this model's tokenizer (default: 1.3 tokens per word)")
    ap.add_argument("--seed", type=int, default=0, help="of the split by book")
    args = ap.parse_args()
    for name in ("story_tokens", "chapter_tokens"):
        if getattr(args, name) < 16:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 16")

    tokenizer = None
    if args.tokenizer:
        from transformers import AutoTokenizer
        try:
            tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
            tokenizer("a", return_offsets_mapping=True)
        except Exception as e:  # transformers raises what it likes
            raise UserError(f"no tokenizer that can be used at {args.tokenizer!r} ({(str(e).strip().splitlines() or ['?'])[0][:120]})") from e
        tokenizer.model_max_length = 10**9  # whole books are measured, nothing is run
    ruler, books = make_ruler(tokenizer), read_books(args.files)
    made = {name: make_examples(name, chapters, ruler, args.story_tokens, args.chapter_tokens) for name, chapters in books.items()}
    n, stories_cut, chapters_cut, unfit = sum(len(m[0]) for m in made.values()), *(sum(m[k] for m in made.values()) for k in (1, 2, 3))
    how = "tokens" if tokenizer else "tokens (estimated at 1.3 per word)"
    print(f"books {len(books)}, examples {n}; in {stories_cut} the oldest text was cut to fit {args.story_tokens} {how}, "
          f"in {chapters_cut} the chapter's end to fit {args.chapter_tokens}")
    if unfit:
        print(f"left out {unfit} examples whose plan, sheets and synopsis leave less than a quarter of the tokens to the story")
    books = {name: m[0] for name, m in made.items() if m[0]}
    if not books:
        raise UserError("no examples are left; raise --story-tokens")
    where = split_books(books, args.seed)
    parts = {s: [row for name, rows in books.items() if where[name] == s for row in rows] for s in SPLITS}
    if not all(parts.values()):
        print(f"warning: too few books ({len(books)}) for three splits: {' and '.join(s for s in SPLITS if not parts[s])} stay empty"
              + ("; the contrastive reward needs a second book" if len(books) == 1 else ""))
    digest = write_splits(args.out, parts)
    for s in SPLITS:
        print(f"{s:5} books {len({r['book'] for r in parts[s]}):3}, examples {len(parts[s]):4}")
    print(f"wrote {args.out}; content {digest}")


if __name__ == "__main__":
    run_script(main)
