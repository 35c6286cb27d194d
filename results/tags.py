"""Prints how often a base writes the tag that its prompt offers, and what one costs, as a Markdown table.

Of each model and prompt: answers with a tag, tags, tags whose number is above the cap, answers with a verdict
at all, tokens of a tag. The second prompt of each model adds an example of a tag in use to the offer.

    python results/tags.py --models DIR DIR DIR    # minutes on a core
"""
import os
import re
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

import data
from eval import PAPER
from lib import checkpoint, run
from litereason import CLOSE, OPEN, generate, load, parse_tags

EXAMPLE = ('For example: "The first passage names the king. '
           f'{OPEN}3{CLOSE} So the next chapter returns to him."\n\n')


def main():
    parser = run.parser(__doc__)
    parser.add_argument("--models", nargs="+", metavar="DIR", required=True, help="checkpoints (required)")
    paths = parser.parse_args().models
    task = data.load_task("next_chapter")
    examples = task.examples("val")
    examples = examples[:: max(1, len(examples) // 4)][:4]
    print("| model | prompt | answers | with a tag | tags | with a number above the cap | with a verdict "
          f"| tokens of a tag |\n|{'---|' * 8}")
    for path in paths:
        model, tokenizer = load(path)
        cap = model.config.litereason_max_reasoning_steps
        cost = len(checkpoint.encode_text(tokenizer, f" {OPEN}5{CLOSE}"))
        for name, offer in (("offer", data.OFFER), ("offer and example", data.OFFER + EXAMPLE)):
            prompts = [task.prompt(example, True).replace(data.OFFER, offer) for example in examples]
            rollouts = generate(model, tokenizer, prompts, 5, 64, latent="none",
                                generator=torch.Generator().manual_seed(0), **PAPER)
            texts = [rollout.text for rollout in rollouts]
            tags = [len(parse_tags(text)) for text in texts]
            numbers = re.findall(rf"{OPEN}\s*([0-9]{{1,9}})\s*{CLOSE}", "\n".join(texts))
            above = sum(int(number) > cap for number in numbers)
            verdicts = sum(data.has_verdict(task, text) for text in texts)
            cells = [len(texts), sum(map(bool, tags)), sum(tags), above, verdicts, cost]
            cells = [os.path.basename(os.path.normpath(path)), name, *map(str, cells)]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    run.run_script(main)
