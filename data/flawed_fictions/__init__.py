"""Plot holes in real stories: Flawed Fictions (arXiv 2504.11900), the first of the paper's two tasks (Sec. 4).

Does a short story contradict itself? The policy reasons, quotes the lines, and ends with \\boxed{Yes} or \\boxed{No}.
prepare.py makes the stories; this module reads them. LITEREASON_DATA/flawed_fictions is looked at first, if that is set.

Stories are data. A tag, a chat delimiter or a box inside one goes into the prompt as it stands: the reward reads the
policy's own words only, and tags fire only there too.
"""
import csv
import io
import json
import os
import re
from collections import Counter

from litereason import UserError, boxed

SPLITS = ("train", "val", "test")
OFFER = """You may also think without words. Where a sentence of your reasoning would come next, you can write \
<implicit_thought>number</implicit_thought> in its place and leave the sentence out. The number goes from 1 to 5: the harder the \
thought, the higher. This works best in the middle of your reasoning rather than at its beginning or its end.

"""  # "number" is not a number, so this is no tag


# ---------------------------------------------------------------- files (data/next_chapter uses these too)
def read_text(path):
    """A UTF-8 file as a str with \\n line ends; UserError naming file and line if it is something else."""
    try:
        with open(path, "rb") as f:
            raw = f.read()
        return raw.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as e:
        line = raw.count(b"\n", 0, e.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 (byte 0x{raw[e.start]:02x}); convert it first, "
                        f"for example `iconv -f latin1 -t utf-8`") from e
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from e


def read_rows(path):
    """The objects of a .jsonl, .json (a list, or one object per line) or .csv file: [(where, dict)], where as in "a.jsonl:7"."""
    text = read_text(path)
    if path.endswith(".csv"):
        csv.field_size_limit(10**8)
        reader = csv.DictReader(io.StringIO(text))
        try:
            return [(f"{path}:{reader.line_num}", row) for row in reader]
        except csv.Error as e:
            raise UserError(f"{path}:{reader.line_num}: not CSV ({e})") from e
    if path.endswith(".json"):
        try:
            rows = json.loads(text)
            if isinstance(rows, list) and all(isinstance(r, dict) for r in rows):
                return [(f"{path}, row {i + 1}", r) for i, r in enumerate(rows)]
        except ValueError:
            pass  # hubs call files of one object per line .json too
    rows = []
    for i, line in enumerate(text.split("\n")):  # not splitlines(): a story may hold U+2028
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as e:
                raise UserError(f"{path}:{i + 1}: not JSON ({e}); expected one object per line") from e
            if not isinstance(row, dict):
                raise UserError(f"{path}:{i + 1}: expected a JSON object, found {type(row).__name__}")
            rows.append((f"{path}:{i + 1}", row))
    return rows


def folder(task):
    """Where a task's prepared files are: LITEREASON_DATA/<task> if that is set, else beside the task's code."""
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return os.path.join(os.environ.get("LITEREASON_DATA") or here, task)


def read_split(task, split, expected):
    """Rows of a prepared split. expected: {field: type}. ValueError: no such split; UserError: not prepared, or damaged."""
    if split not in SPLITS:
        raise ValueError(f"the {task} task has the splits {', '.join(SPLITS)}, not {split!r}")
    path = os.path.join(folder(task), f"{split}.jsonl")
    if not os.path.exists(path):
        raise UserError(f"{path} is not there yet; make it with: python data/{task}/prepare.py --help")
    rows = read_rows(path)
    for where, row in rows:
        for field, kind in expected.items():
            if not isinstance(row.get(field), kind):
                raise UserError(f"{where}: {field!r} must be a {kind.__name__}, found {type(row.get(field)).__name__}; "
                                f"run data/{task}/prepare.py again")
    if not rows:
        raise UserError(f"{path} is empty: what was prepared was too little for three splits")
    return [row for _, row in rows]


# ---------------------------------------------------------------- the task
def examples(split):
    """Stories of train, val or test: [{story, label: bool, cluster, and the benchmark's explanations where it has them}]."""
    return read_split("flawed_fictions", split, {"story": str, "label": bool})


def prompt(example, latent):
    """The question and the story as text, without a chat template; with `latent`, the offer of the tag before the story."""
    return f"""A story has a continuity error if it contradicts itself: something happens, is said, or is the case that cannot be true \
together with what the story established earlier. Read the story below and decide whether it has such an error.

Reason step by step. If you find an error, quote the lines that contradict each other between <contradicted_lines> and \
</contradicted_lines>. Then end with your verdict: \\boxed{{Yes}} if the story has a continuity error, \\boxed{{No}} if it has none.

{OFFER if latent else ""}<story>
{example["story"]}
</story>

Take care, and check your reasoning before you give the verdict in \\boxed{{}}."""  # last and empty: repeating this prompt is no verdict


def answer(example):
    """The gold answer, in exactly the format that `reward` parses (the refresh trains on it)."""
    return "\\boxed{Yes}" if example["label"] else "\\boxed{No}"


def verdict(completion):
    """True (Yes), False (No) or None: what the completion's last box says, if it says just one of the two words.

    Quoted lines are the story's words, not the verdict. In the box only type and punctuation are passed over: \\neg Yes is no Yes.
    """
    own = re.sub(r"<contradicted_lines>.*?</contradicted_lines>", "", completion, flags=re.DOTALL)
    words = re.sub(r"\\(?:text|math|emph|underline|bf|rm|it|Large|large)[a-z]*(?![a-zA-Z])", " ", boxed(own) or "")  # their braces are punctuation
    found = re.fullmatch(r"[\s*_`'\"“‘(\[{$.:]*(yes|no)[\s*_`'\"”’)\]}$.,;:!]*", words.lower())
    return found and found.group(1) == "yes"


def reward(example, completion):
    """1.0 if the last box of the policy's own words holds the right answer, else 0.0 (method.md section 7)."""
    return float(verdict(completion) is example["label"])


# ---------------------------------------------------------------- what eval may print beside the accuracy
def words_of(text):
    return re.findall(r"\w+", text.lower())


def quotes(completion):
    """What a completion quotes, as lists of words: lines between <contradicted_lines> tags, and anything in double quotes."""
    lines = []
    for block in re.findall(r"<contradicted_lines>(.*?)(?:</contradicted_lines>|$)", completion, re.DOTALL):
        lines += block.split("\n")
    lines += re.findall(r"[\"“]([^\"“”]+)[\"”]", completion)
    return [w for w in map(words_of, lines) if w]


def located(lines, completion):
    """Share, 0 to 1, of the labelled lines that a quotation matches: twice the common words over all words is 0.5 or more.

    So half a line counts and a line in other punctuation does; a quotation of the whole story matches nothing.
    """
    spans = quotes(completion)
    dice = lambda a, b: 2 * sum((Counter(a) & Counter(b)).values()) / (len(a) + len(b))
    return sum(any(dice(words_of(line), s) >= 0.5 for s in spans) for line in lines) / len(lines)


def report(examples, completions):
    """Optional hook of eval: precision, recall, F1 (an error is the positive class; 0 where undefined), the accuracy of
    always giving the commoner answer, the share of answers without a verdict, and `located` where lines are labelled."""
    said, labels = [verdict(c) for c in completions], [e["label"] for e in examples]
    hits = sum(s is True and y for s, y in zip(said, labels))
    precision, recall = hits / max(1, said.count(True)), hits / max(1, labels.count(True))
    out = {"precision": precision, "recall": recall, "f1": 2 * precision * recall / max(1e-9, precision + recall),
           "majority_accuracy": max(labels.count(True), labels.count(False)) / len(labels), "no_verdict": said.count(None) / len(said)}
    lines = [e.get("cont_error_lines", []) + e.get("contradicted_lines", []) for e in examples]
    found = [located(l, c) for l, c in zip(lines, completions) if l]
    return {**out, "lines_located": sum(found) / len(found)} if found else out
