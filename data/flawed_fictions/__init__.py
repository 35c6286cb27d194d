"""Plot holes in real stories, the first of the paper's two tasks (Sec. 4): Flawed Fictions, arXiv 2504.11900.

Does a short story contradict itself? The policy reasons, quotes the lines, and ends with \\boxed{Yes} or
\\boxed{No}. prepare.py makes the stories; this module reads them.

Stories are data. A tag, a chat delimiter or a box inside one goes into the prompt as it stands: the reward
reads the policy's own words only, and tags fire only there too."""
import re

from data import OFFER, boxed, read_split


def examples(split):
    """Stories of a split: [{story, label: bool, cluster, the benchmark's explanations where it has them}]."""
    return read_split("flawed_fictions", split)


def prompt(example, latent):
    """What the policy reads, without a chat template; with `latent`, the offer of the tag."""
    return f"""A story has a continuity error if it contradicts itself: something happens, is said, or is \
the case that cannot be true together with what the story established earlier. Read the story below and \
decide whether it has such an error.

Reason step by step. If you find an error, quote the lines that contradict each other between \
<contradicted_lines> and </contradicted_lines>. Then end with your verdict: \\boxed{{Yes}} if the story has \
a continuity error, \\boxed{{No}} if it has none.

{OFFER if latent else ""}<story>
{example["story"]}
</story>

Take care, and check your reasoning before you give the verdict in \
\\boxed{{}}."""  # empty: repeating it is no verdict


def answer(example):
    """The gold answer, in exactly the format that `reward` parses (the refresh trains on it)."""
    return "\\boxed{Yes}" if example["label"] else "\\boxed{No}"


# What may stand in a box beside the verdict: commands that choose a type, and punctuation.
TYPE = re.compile(r"\\(?:text|math|emph|underline|bf|rm|it|Large|large)[a-z]*(?![a-zA-Z])")
WORD = re.compile(r"[\s*_`'\"“‘(\[{$.:]*(yes|no)[\s*_`'\"”’)\]}$.,;:!]*")


def verdict(completion):
    """True (Yes), False (No) or None: what the completion's last box says, if that is one of the two.

    Quoted lines are the story's words, not the verdict. In the box only type (\\text{..}) and punctuation
    are passed over: \\neg Yes is no Yes. Without a box there is none, as in the released code."""
    own_words = re.sub(r"<contradicted_lines>.*?</contradicted_lines>", "", completion, flags=re.DOTALL)
    content = TYPE.sub(" ", boxed(own_words) or "")  # the braces stay, as punctuation
    word = WORD.fullmatch(content.lower())
    return word and word.group(1) == "yes"


def reward(example, completion):
    """1.0 if the last box of the policy's own words holds the right answer, else 0.0 (paper Sec. 4)."""
    return float(verdict(completion) is example["label"])


def report(examples, completions):
    """Precision, recall and F1 (an error is the positive class; 0 where undefined), the accuracy of always
    giving the commoner answer, and the share without a verdict."""
    verdicts = list(map(verdict, completions))
    labels = [example["label"] for example in examples]
    hits = sum(said is True and label for said, label in zip(verdicts, labels))
    precision, recall = (hits / max(1, of.count(True)) for of in (verdicts, labels))
    return {
        "precision": precision, "recall": recall,
        "f1": 2 * precision * recall / max(1e-9, precision + recall),
        "majority_accuracy": max(labels.count(True), labels.count(False)) / len(labels),
        "no_verdict": verdicts.count(None) / len(verdicts)}
