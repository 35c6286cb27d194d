"""Reads what the latents of a run say in the tiny world, word by word.

There a latent's target in stage 2 is known, the two people with whom a round ends, so it can be asked
whether a latent still is nearest to the sum of those two words when RL is through. The second latent block of
an answer begins where the first ended, so an answer of nothing but tags has a known round for each of its
latents; other answers are not read. All at the paper's sampling, on 500 test stories.

    python results/latents.py --model RUN
"""
import os
import re
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

from data import tiny
from eval import PAPER
from lib import checkpoint, run
from litereason import CLOSE, OPEN, generate, load, parse_tags
from results.stats import markdown

ONLY_TAGS = re.compile(rf"\s*({OPEN}[0-9 ]*{CLOSE}\s*)+\\boxed")


def rounds_of_latents(example, text, cap):
    """With whom the halves are in the round of each latent -> list of sets of one or two words; None if the
    answer has something beside tags before its box, or more latents than rounds."""
    rounds = [set(pair) for pair in zip(*example["chains"])]
    found, now = [], 0  # now: the round where the thought stands
    for _, _, n_latents in parse_tags(text, cap):
        found += rounds[now : now + n_latents]
        now += n_latents - 1  # the next block begins with the last round again
    return found if ONLY_TAGS.match(text) and now < len(rounds) else None


def nearest_words(model, tokenizer, latents):
    """Which two words of the tiny world each latent is nearest to, added up as in a target: latents (n, D) ->
    n sets of one or two words."""
    words = [*tiny.PEOPLE, tiny.NOBODY]
    ids = torch.tensor(tokenizer.convert_tokens_to_ids(words))
    embeddings = model.get_input_embeddings().weight.detach()[ids]  # (W, D)
    first, second = torch.triu_indices(len(words), len(words))
    sums = (embeddings[first] + embeddings[second]) / 2**0.5  # (pairs, D)
    nearest = torch.cdist(latents.to(sums), sums).argmin(1)
    return [{words[first[i]], words[second[i]]} for i in nearest.tolist()]


def read(model, tokenizer, examples, seed):
    """-> {"answers", "read", and of latents that were read "all", "last_whole", "last_lost", "wrong": [how
    many, how many name their round]}. The last latents are those of the last round, in stories where both
    halves arrive ("whole") or one is lost; "wrong": those of wrong answers."""
    cap = model.config.litereason_max_reasoning_steps
    prompts = [tiny.prompt(example, True) for example in examples]
    rollouts = generate(model, tokenizer, prompts, 1, run.SLOTS[not checkpoint.is_small(model)],
                        generator=torch.Generator().manual_seed(seed), **PAPER)
    found = {"answers": len(rollouts), "read": 0, "all": [0, 0], "last_whole": [0, 0], "last_lost": [0, 0],
             "wrong": [0, 0]}
    for rollout in rollouts:
        example = examples[rollout.prompt]
        rounds = rounds_of_latents(example, rollout.text, cap)
        if not rounds:  # more than tags, or no tag that runs
            continue
        found["read"] += 1
        said = nearest_words(model, tokenizer, rollout.latents)
        is_right = [names == true for names, true in zip(said, rounds)]
        kinds = {"all": is_right}
        if rounds[-1] == set(pair[-1] for pair in example["chains"]):
            kinds["last_lost" if example["label"] else "last_whole"] = is_right[-1:]
            if not tiny.reward(example, rollout.text):
                kinds["wrong"] = is_right[-1:]
        for kind, own in kinds.items():
            found[kind][0] += len(own)
            found[kind][1] += sum(own)
    return found


def table(found):
    """{name: [(seed, what `read` says of its run)]} -> Markdown"""
    headings = ["run", "answers of tags alone", "latents", "name their round", "the last, both halves arrive",
                "the last, one is lost", "wrong answers", "the last, of these"]
    lines = []
    for name, by_seed in found.items():
        rows = [row for _, row in by_seed]
        answers = sum(row["read"] for row in rows) / sum(row["answers"] for row in rows)
        cells = [name, f"{answers:.3f}"]
        for kind in ("all", "last_whole", "last_lost", "wrong"):
            n, n_right = (sum(row[kind][i] for row in rows) for i in (0, 1))
            cells += [f"{n:,}"] if kind in ("all", "wrong") else []
            cells += [f"{n_right / n:.3f}" if n else ""]
        lines.append(cells)
    return markdown(headings, lines)


def main():
    parser = run.parser(__doc__)
    parser.add_argument("--model", required=True, metavar="DIR", help="a run on plot holes")
    parser.add_argument("--task", default="tiny", choices=["tiny"], help="plot holes")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling [0]")
    parser.add_argument("--out", metavar="DIR", help="results.json goes there [it is only printed]")
    args = parser.parse_args()
    model, tokenizer = load(args.model, "cpu")
    found = read(model, tokenizer, tiny.examples("test")[:500], args.seed)
    print(table({args.model: [(args.seed, found)]}))
    if args.out:
        run.write_json(os.path.join(args.out, "results.json"), found)


if __name__ == "__main__":
    run.run_script(main)
