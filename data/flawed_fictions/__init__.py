"""Plot holes in real stories: Flawed Fictions (arXiv 2504.11900), the first of the paper's two tasks (Sec. 4).

Does a short story contradict itself? The policy reasons, quotes the lines, and ends with \\boxed{Yes} or \\boxed{No}.
prepare.py makes the stories; this module reads them. LITEREASON_DATA/flawed_fictions is looked at first, if that is set.

Stories are data. A tag, a chat delimiter or a box inside one goes into the prompt as it stands: the reward reads the
policy's own words only, and tags fire only there too.
"""
import re
from collections import Counter

from data import OFFER, boxed, read_split

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
