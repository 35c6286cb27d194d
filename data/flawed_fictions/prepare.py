"""Makes train.jsonl, val.jsonl and test.jsonl of the plot-hole task from the Flawed Fictions benchmark.

The benchmark has several versions of one tale, and a split by row puts one in train and its sister in test.
So stories that share 8 words in a row are one cluster here, and a cluster is never divided.

    python data/flawed_fictions/prepare.py                       # download from the hub, split by cluster
    python data/flawed_fictions/prepare.py --from stories.jsonl  # your own rows, with story and cont_error
    python data/flawed_fictions/prepare.py --split paper         # the released split by row, for comparison
"""
import html
import json
import os
import random
import re
import sys
from collections import Counter, defaultdict
from contextlib import suppress
from textwrap import shorten

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", ".."))

import numpy as np

from data import SPLITS, find_clusters, line_ends, read_rows, some, write_splits
from lib import UserError, run

REPO = "kahuja/flawed-fictions"
# The benchmark's main split, in one file or several: not flawed_fictions_long, not .._cf_negs.
WANTED = r"(.*/)?flawed_fictions(-\d+-of-\d+|/[^/]+)?\."
KINDS = ("jsonl", "json", "csv", "parquet")  # of file, the ones we like most first
LABELS = {"0": False, "false": False, "no": False, "1": True, "true": True, "yes": True}
# A paragraph ends where one of these begins or ends.
BLOCKS = "p|div|h[1-6]|li|ul|ol|blockquote|pre|tr|table|section|article|hr"
INLINE = "a|abbr|b|big|body|center|cite|code|em|font|html|i|q|s|small|span|strong|sub|sup|td|th|tt|u"


def clean(text):
    """HTML -> plain text: a paragraph per block, a line per <br> or line end, entities resolved.

    Only HTML's own tags go. <implicit_thought>, <|im_end|> or a < b are words of the story and stay."""
    text = re.sub(r"<!--.*?-->", "", line_ends(text), flags=re.DOTALL)
    text = re.sub(r"<br\s*/?>\n?", "\n", text, flags=re.IGNORECASE)
    text = re.sub(rf"\s*</?(?:{BLOCKS})(?:\s[^<>]*)?/?>[ \t]*", "\n\n", text, flags=re.IGNORECASE)
    text = re.sub(rf"</?(?:{INLINE})(?:\s[^<>]*)?/?>", "", text, flags=re.IGNORECASE)
    text = html.unescape(text).replace("\xa0", " ")
    text = re.sub(r"[ \t]+\n", "\n", text)  # indentation stays: in verse it means something
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def strip_ending(story):
    """The story without what its makers left at the end: a row of dashes, <No modifications needed>.

    It gives the label away: of 213 stories that we could read, 86 of 108 with an error end in seven dashes
    and none of 105 without."""
    return re.sub(r"(?:\s|(?<!-)-{3,}(?!-)|<No modifications needed>)+$", "", story)


def as_lines(value):
    """A field of quoted lines, in whatever form (a list, as JSON too, or a text) -> list of plain lines."""
    if isinstance(value, str) and value.strip().startswith("["):
        with suppress(ValueError):
            value = json.loads(value)
    lines = value if isinstance(value, list) else str(value).split("\n")
    return [line for line in map(clean, map(str, lines)) if line]


def load_stories(paths):
    """Rows of the files, cleaned: [{story, label, ..}]; UserError with file and line for a malformed one."""
    stories, empty, endings = [], [], Counter()  # empty: where; endings: of each label, removed
    for where, row in [one for path in paths for one in read_rows(path)]:
        if not isinstance(row.get("story"), str) or "cont_error" not in row:
            raise UserError(f"{where}: expected the fields story (text) and cont_error, found "
                            f"{', '.join(map(str, row)) or 'none'}")
        spelled = str(row["cont_error"]).strip().lower().removesuffix(".0")
        if spelled not in LABELS:
            raise UserError(f"{where}: cont_error is {spelled!r}; expected 0 or 1, true or false, yes or no")
        whole = clean(row["story"])
        example = {"story": strip_ending(whole), "label": LABELS[spelled]}
        if not example["story"]:
            empty.append(where)
            continue
        endings[example["label"]] += example["story"] != whole
        if row.get("example_id") not in (None, ""):
            example["example_id"] = row["example_id"]
        kept = {"cont_error_expl": lambda text: clean(str(text)), "cont_error_lines": as_lines,
                "contradicted_lines": as_lines}
        stories.append(example | {field: form(row[field]) for field, form in kept.items() if row.get(field)})
    if empty:
        print(f"skipped {len(empty)} empty stories: {some(empty)}")
    if not stories:
        raise UserError(f"no stories in {', '.join(paths)}")
    print(f"removed endings that give the label away (a row of dashes), in {endings[True]} stories with an "
          f"error and {endings[False]} without")
    return stories


def download():
    """The benchmark's main file from the hub -> [path]; one UserError line says what to do without it."""
    from huggingface_hub import HfApi, hf_hub_download
    try:
        every = sorted(HfApi().list_repo_files(REPO, repo_type="dataset"))
        by_kind = [[file for file in every if re.fullmatch(WANTED + kind, file)] for kind in KINDS]
        files = next(filter(None, by_kind), [])
        if not files:
            raise LookupError("it has no flawed_fictions file of a known kind")
        return [hf_hub_download(REPO, file, repo_type="dataset") for file in files]
    except Exception as e:  # no network, a gate, a wrong token, a full disk: the hub has many exceptions
        raise UserError(f"cannot download {REPO} ({shorten(str(e), 300)}); `hf auth login`, or get it from "
                        f"https://huggingface.co/datasets/{REPO} and pass it with --from FILE") from e


# ============================================================ splits
def split_by_row(labels, seed):
    """A split name per story: 15 % val, 15 % test, the same share of each label."""
    rng, split = random.Random(seed), {}
    for label in (False, True):
        index = [i for i, own in enumerate(labels) if own == label]
        rng.shuffle(index)
        n = round(0.15 * len(index))
        split |= zip(index, ["val"] * n + ["test"] * n + ["train"] * len(index))
    return [split[i] for i in range(len(labels))]


def split_by_cluster(labels, clusters, by_row, seed):
    """That of `by_row`, but every cluster gathered where most of it was; then evened out by stories that are
    alone."""
    split = list(by_row)
    members = defaultdict(list)  # cluster -> its stories
    for i, cluster in enumerate(clusters):
        members[cluster].append(i)
    for group in members.values():
        home = max(SPLITS, key=[by_row[i] for i in group].count)  # train where it is a tie
        for i in group:
            split[i] = home

    alone = [group[0] for group in members.values() if len(group) == 1]
    random.Random(seed + 1).shuffle(alone)
    wanted = Counter(zip(by_row, labels))
    for label in (False, True):
        for name in SPLITS[1:]:
            lacking = wanted[name, label] - Counter(zip(split, labels))[name, label]
            source, target = ("train", name) if lacking > 0 else (name, "train")
            movable = [i for i in alone if labels[i] == label and split[i] == source]
            for i in movable[: abs(lacking)]:
                split[i] = target
    return split


def split_as_released(n, seed=42):
    """The released code's rows: shuffled as by the datasets library, then 70, 15 and 15 %."""
    size = int(0.15 * n)
    names = ["train"] * (n - 2 * size) + ["val"] * size + ["test"] * size
    places = np.random.default_rng(seed).permutation(n).argsort()
    return [names[place] for place in places]


# ============================================================ the script
def main():
    parser = run.parser(__doc__)
    add = parser.add_argument
    add("--from", dest="files", nargs="+", metavar="FILE",
        help="local jsonl, json, csv or parquet files [the benchmark is downloaded]")
    add("--out", default=HERE, metavar="DIR", help="where the three files go [beside this script]")
    add("--split", default="cluster", choices=["cluster", "paper"],
        help="cluster: near-duplicates stay together; paper: the released rows [cluster]")
    add("--seed", type=int, default=0, help="of the cluster split; the paper's is fixed at 42 [0]")
    args = parser.parse_args()
    stories = load_stories(args.files or download())
    labels = [story["label"] for story in stories]
    clusters = find_clusters([story["story"] for story in stories])
    sizes = [n for n in Counter(clusters).values() if n > 1]
    print(f"{len(stories)} stories, {sum(labels)} with an error; {sum(sizes)} of them have near-duplicates "
          f"(8 words in a row), in {len(sizes)} clusters of up to {max(sizes, default=1)}")
    split = split_by_cluster(labels, clusters, split_by_row(labels, args.seed), args.seed)
    if args.split == "paper":
        split = split_as_released(len(stories))
    rows = [{**story, "cluster": cluster} for story, cluster in zip(stories, clusters)]
    examples = {name: [row for row, own in zip(rows, split) if own == name] for name in SPLITS}
    if not all(examples.values()):
        raise UserError(f"{len(stories)} stories in {len(set(clusters))} clusters are too few for three "
                        "splits: give more stories")
    for name, rows in examples.items():
        print(f"{name:5} {len(rows):4} stories, {sum(row['label'] for row in rows)} with an error")
    write_splits(args.out, examples)


if __name__ == "__main__":
    run.run_script(main)
