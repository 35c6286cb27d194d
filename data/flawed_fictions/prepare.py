"""Makes train.jsonl, val.jsonl and test.jsonl of the plot-hole task from the Flawed Fictions benchmark.

No near-duplicates across splits: the benchmark has several versions of one tale, and a split by row puts one in train and
its sister in test. Stories that share 8 words in a row are one cluster here, and a cluster is never divided.
Nothing is written before everything has been read, so that a bad file leaves an older preparation as it was.

    python data/flawed_fictions/prepare.py                            # download from the hub, split by cluster
    python data/flawed_fictions/prepare.py --from stories.jsonl       # your own file: story and cont_error in each row
    python data/flawed_fictions/prepare.py --split paper              # the released row-level split, for comparison
"""
import argparse
import hashlib
import html
import json
import os
import random
import re
import sys
from collections import Counter, defaultdict

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

import numpy as np

from data import SPLITS, read_rows
from data.flawed_fictions import words_of
from runs import UserError, hub_answers, run_script

REPO, NAME = "kahuja/flawed-fictions", "flawed_fictions"
LABELS = {"0": False, "false": False, "no": False, "1": True, "true": True, "yes": True}
BLOCKS = "p|div|h[1-6]|li|ul|ol|blockquote|pre|tr|table|section|article|hr"  # a paragraph ends where one of these begins or ends
INLINE = "a|abbr|b|big|body|center|cite|code|em|font|html|i|q|s|small|span|strong|sub|sup|td|th|tt|u"


def clean(text):
    """HTML -> plain text: a paragraph per block, a line per <br> or line end (verse, dialogue), entities resolved.

    Only HTML's own tags go. <implicit_thought>, <|im_end|> or a < b are words of the story and stay.
    """
    text = re.sub(r"<!--.*?-->", "", text.replace("\r\n", "\n"), flags=re.DOTALL)
    text = re.sub(r"<br\s*/?>\n?", "\n", text, flags=re.IGNORECASE)
    text = re.sub(rf"\s*</?(?:{BLOCKS})(?:\s[^<>]*)?/?>[ \t]*", "\n\n", text, flags=re.IGNORECASE)
    text = re.sub(rf"</?(?:{INLINE})(?:\s[^<>]*)?/?>", "", text, flags=re.IGNORECASE)
    text = html.unescape(text).replace("\xa0", " ")
    text = re.sub(r"[ \t]+\n", "\n", text)  # indentation stays: in verse it means something
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def strip_ending(story):
    """The story without what its makers left at the end: a row of dashes, and an editor's <No modifications needed>.

    It gives the label away: of 213 stories of the benchmark that we could read, 86 of 108 with an error end in seven
    dashes and none of 105 without (5 of those end in 68). Whoever looks at nothing else is right in 90 % of the cases.
    """
    return re.sub(r"(?:\s|(?<!-)-{3,}(?!-)|<No modifications needed>)+$", "", story)


def as_lines(value):
    """A field of quoted lines, in whatever form it came (list, text with line ends, absent) -> list of plain lines."""
    if isinstance(value, str) and value.strip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            pass
    lines = value if isinstance(value, list) else str(value or "").split("\n")
    return [line for line in (clean(str(l)).strip() for l in lines) if line]


def load_stories(paths, keep_endings=False):
    """Rows of the files, cleaned: [{story, label, ..}]. UserError for a row that is malformed, naming file and line."""
    stories, empty, endings = [], [], Counter()
    for path in paths:
        for where, row in read_rows(path):
            if not isinstance(row.get("story"), str) or "cont_error" not in row:
                raise UserError(f"{where}: expected the fields story (text) and cont_error, found {', '.join(map(str, row)) or 'none'}")
            label = LABELS.get(str(row["cont_error"]).strip().lower().removesuffix(".0"))
            if label is None:
                raise UserError(f"{where}: cont_error is {row['cont_error']!r}; expected 0 or 1, true or false, yes or no")
            whole = clean(row["story"])
            story = whole if keep_endings else strip_ending(whole)
            if not story:
                empty.append(where)
                continue
            endings[label] += strip_ending(whole) != whole
            out = {"story": story, "label": label}
            if row.get("example_id") not in (None, ""):
                out["example_id"] = row["example_id"]
            if row.get("cont_error_expl"):
                out["cont_error_expl"] = clean(str(row["cont_error_expl"]))
            for field in ("cont_error_lines", "contradicted_lines"):
                if row.get(field):
                    out[field] = as_lines(row[field])
            stories.append(out)
    if empty:
        print(f"skipped {len(empty)} empty stories: {', '.join(empty[:3])}{' ..' if len(empty) > 3 else ''}")
    if not stories:
        raise UserError(f"no stories in {', '.join(paths)}")
    if endings:
        n = Counter(s["label"] for s in stories)
        said = max(endings[True] + n[False] - endings[False], endings[False] + n[True] - endings[True])
        print(f"endings that give the label away (a row of dashes): {endings[True]} of {n[True]} stories with an error, "
              f"{endings[False]} of {n[False]} without; going by them alone is {100 * said / len(stories):.0f} % right; {'kept' if keep_endings else 'removed'}")
    return stories


def download():
    """The benchmark's main file from the hub -> [path]; one UserError line that says what to do if it cannot be had."""
    from huggingface_hub import HfApi, hf_hub_download

    by_hand = (f"get the file of the {NAME} split from https://huggingface.co/datasets/{REPO} on a machine that can, "
               f"and pass it with --from FILE (jsonl, json or csv)")
    if not hub_answers():  # the hub's library would try for half a minute
        raise UserError(f"the hub cannot be reached from here: {by_hand}")
    try:
        files = [f for f in HfApi().list_repo_files(REPO, repo_type="dataset")
                 if re.match(rf"{NAME}(-\d+-of-\d+)?\.(jsonl|json|csv|parquet)$", os.path.basename(f))  # not _long, not _cf_negs ..
                 or re.fullmatch(rf"(?:.*/)?{NAME}/[^/]+\.(jsonl|json|csv|parquet)", f)]
        kinds = sorted({f.rsplit(".", 1)[1] for f in files}, key=["jsonl", "json", "csv", "parquet"].index)
        if not kinds:
            raise UserError(f"the repository {REPO} has no {NAME} file of a known kind; {by_hand}")
        paths = [hf_hub_download(REPO, f, repo_type="dataset") for f in sorted(files) if f.endswith("." + kinds[0])]
    except UserError:
        raise
    except Exception as e:  # no network, a gate, a wrong token, a full disk: the hub's many exceptions all end here
        why = (str(e).strip().splitlines() or [type(e).__name__])[0][:160]
        gate = "; if it asks for a token, run `hf auth login` first" if re.search("40[13]|gated|token", str(e), re.I) else ""
        raise UserError(f"cannot download {REPO} ({why}){gate}; or {by_hand}") from e
    return [parquet_to_jsonl(p) for p in paths] if kinds[0] == "parquet" else paths


def parquet_to_jsonl(path):
    """The path of a temporary .jsonl with a parquet file's rows; needs pyarrow, which this project does not."""
    try:
        import pyarrow.parquet
    except ImportError as e:
        raise UserError(f"the hub has {REPO} as parquet only; `pip install pyarrow` and run this again "
                        f"(or convert {path} to jsonl elsewhere and pass that with --from)") from e
    import tempfile
    out = os.path.join(tempfile.mkdtemp(), f"{NAME}.jsonl")
    with open(out, "w", encoding="utf-8") as f:
        for row in pyarrow.parquet.read_table(path).to_pylist():
            f.write(json.dumps(row, default=str) + "\n")
    return out


# ---------------------------------------------------------------- near-duplicates and splits
def ngrams(text, n=8):
    words = words_of(text)
    return {" ".join(words[i : i + n]) for i in range(len(words) - n + 1)}


def find_clusters(stories, n=8):
    """Cluster numbers, one per text: texts that share n words in a row, directly or through others, have the same one."""
    parent, owner = list(range(len(stories))), {}

    def root(i):
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    for i, story in enumerate(stories):
        for gram in ngrams(story, n) or {" ".join(words_of(story))}:  # shorter than n words: the same words make a duplicate
            a, b = root(owner.setdefault(gram, i)), root(i)
            parent[max(a, b)] = min(a, b)
    return [root(i) for i in range(len(stories))]


def split_by_row(labels, seed):
    """A split name per story: 15 % val, 15 % test, the same share of each label."""
    rng, out = random.Random(seed), ["train"] * len(labels)
    for label in (False, True):
        index = [i for i, y in enumerate(labels) if y == label]
        rng.shuffle(index)
        n = round(0.15 * len(index))
        for place, i in enumerate(index[: 2 * n]):
            out[i] = SPLITS[1 + place // n]
    return out


def split_by_cluster(labels, clusters, seed):
    """split_by_row with every cluster gathered where most of it was, then evened out with stories that are alone.

    -> (split names, number of stories that moved, the row-level split names).
    """
    rows = split_by_row(labels, seed)
    out, members, rng = list(rows), defaultdict(list), random.Random(seed + 1)
    for i, c in enumerate(clusters):
        members[c].append(i)
    for group in members.values():
        count = Counter(rows[i] for i in group)
        to = max(SPLITS, key=lambda s: count[s])  # train where it is a tie
        for i in group:
            out[i] = to
    alone = [group[0] for group in members.values() if len(group) == 1]
    rng.shuffle(alone)
    for label in (False, True):
        for split in SPLITS[1:]:
            want = sum(r == split and y == label for r, y in zip(rows, labels))
            more = want - sum(o == split and y == label for o, y in zip(out, labels))
            source, target = ("train", split) if more > 0 else (split, "train")
            for i in [i for i in alone if labels[i] == label and out[i] == source][: abs(more)]:
                out[i] = target
    return out, sum(a != b for a, b in zip(out, rows)), rows


def split_as_released(n, seed=42):
    """The released code's rows: shuffled as the datasets library does it, the last 2 x 15 % are val and test."""
    order, size = np.random.default_rng(seed).permutation(n), int(0.15 * n)
    out = ["train"] * n
    for place, i in enumerate(order[n - 2 * size :]):
        out[i] = SPLITS[1 + place // size]
    return out


def overlap(split, clusters):
    """How many val and test stories have a near-duplicate in another split."""
    where = defaultdict(set)
    for s, c in zip(split, clusters):
        where[c].add(s)
    return sum(s != "train" and len(where[c]) > 1 for s, c in zip(split, clusters))


def write_splits(out, splits):
    """{name: rows} -> out/name.jsonl, all complete before the first is renamed into place. -> sha256, 16 digits."""
    digest, written = hashlib.sha256(), []
    try:
        os.makedirs(out, exist_ok=True)
        for name, rows in splits.items():
            path = os.path.join(out, f"{name}.jsonl")
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "replace")
            written.append(path)
            with open(path + ".tmp", "wb") as f:
                f.write(text)
            digest.update(text)
        for path in written:
            os.replace(path + ".tmp", path)
    except OSError as e:
        for path in written:
            if os.path.isfile(path + ".tmp"):
                os.remove(path + ".tmp")
        raise UserError(f"cannot write {path if written else out}: {e.strerror}; what was there before is unchanged") from e
    return digest.hexdigest()[:16]


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = os.path.dirname(os.path.abspath(__file__))
    ap.add_argument("--from", dest="files", nargs="+", metavar="FILE", help="local jsonl, json or csv files instead of the download")
    ap.add_argument("--out", default=here, metavar="DIR", help="where the three files go (default: beside this script)")
    ap.add_argument("--split", default="cluster", choices=["cluster", "paper"], help="keep near-duplicates together, or the released rows")
    ap.add_argument("--keep-endings", action="store_true", help="leave the rows of dashes that give the label away")
    ap.add_argument("--seed", type=int, default=0, help="of the cluster split (the paper's is fixed at 42)")
    args = ap.parse_args()

    stories = load_stories(args.files or download(), args.keep_endings)
    labels, clusters = [s["label"] for s in stories], find_clusters([s["story"] for s in stories])
    sizes = [n for n in Counter(clusters).values() if n > 1]
    print(f"{len(stories)} stories, {sum(labels)} with an error; {sum(sizes)} of them have near-duplicates (8 words in a row), in "
          f"{len(sizes)} clusters of up to {max(sizes, default=1)}")
    if args.split == "paper":
        split = split_as_released(len(stories))
        print(f"warning: the released split is by row: {overlap(split, clusters)} of {sum(s != 'train' for s in split)} val and test "
              f"stories share 8 words in a row with a story of another split; use it for comparison only")
    else:
        split, moved, rows = split_by_cluster(labels, clusters, args.seed)
        print(f"by row, {overlap(rows, clusters)} of {sum(s != 'train' for s in rows)} val and test stories would have a near-duplicate "
              f"in another split; {moved} stories moved to keep clusters whole")
    parts = {name: [{**s, "cluster": c} for s, c, where in zip(stories, clusters, split) if where == name] for name in SPLITS}
    if not all(parts.values()):
        raise UserError(f"{len(stories)} stories in {len(set(clusters))} clusters are too few for three splits")
    digest = write_splits(args.out, parts)
    for name, rows in parts.items():
        print(f"{name:5} {len(rows):4} stories, {sum(r['label'] for r in rows)} with an error")
    print(f"wrote {args.out}; content {digest}")


if __name__ == "__main__":
    run_script(main)
