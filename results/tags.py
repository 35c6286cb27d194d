"""Does a base write the tag that its prompt offers, and what does one cost? Prints a Markdown table: of each
model and prompt the answers with a tag, tags whose number is above the cap, and answers with a verdict at all.

    python results/tags.py --models DIR DIR DIR --task next_chapter    # minutes on a core

The second prompt of each model adds one example of a tag in use to the offer; the task's own prompt has none.
"""
import os
import re
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

import torch

import data
from lib import checkpoint, run
from eval import PAPER
from litereason import CLOSE, OPEN, generate, load, parse_tags

EXAMPLE = f"""For example: "The first passage names the king. {OPEN}3{CLOSE} So the next chapter returns to him."

"""


def row(model, tokenizer, name, task, examples, with_example, samples, limit):
    """A line of the table."""
    prompts = [task.prompt(example, True) for example in examples]
    if with_example:
        prompts = [prompt.replace(data.OFFER, data.OFFER + EXAMPLE) for prompt in prompts]
    rollouts = generate(model, tokenizer, prompts, samples, limit, latent="none",
                        generator=torch.Generator().manual_seed(0), **PAPER)
    texts = [r.text for r in rollouts]
    written = [parse_tags(text) for text in texts]
    numbers = [int(n) for text in texts for n in re.findall(rf"{OPEN}\s*([0-9]{{1,9}})\s*{CLOSE}", text)]
    cost = len(checkpoint.encode_text(tokenizer, f" {OPEN}5{CLOSE}"))
    verdicts = sum(data.has_verdict(task, text) for text in texts)
    return (f"| {name} | {'offer and example' if with_example else 'offer'} | {len(texts)} "
            f"| {sum(map(bool, written))} | {sum(map(len, written))} "
            f"| {sum(n > model.config.litereason_max_reasoning_steps for n in numbers)} | {verdicts} | {cost} |")


def main():
    parser = run.parser(__doc__)
    parser.add_argument("--models", nargs="+", metavar="DIR", required=True, help="checkpoints (required)")
    parser.add_argument("--task", default="next_chapter", help="(default next_chapter)")
    parser.add_argument("--prompts", type=int, default=4, help="val examples (default 4)")
    parser.add_argument("--samples", type=int, default=5, help="answers to each (default 5)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="of an answer (default 64)")
    args = parser.parse_args()
    task = data.load_task(args.task)
    examples = task.examples("val")
    examples = examples[:: max(1, len(examples) // args.prompts)][: args.prompts]
    print("| model | prompt | answers | with a tag | tags | with a number above the cap | with a verdict "
          f"| tokens of a tag |\n|{'---|' * 8}")
    for path in args.models:
        model, tokenizer = load(path)
        for with_example in (False, True):
            name = os.path.basename(os.path.normpath(path))
            print(row(model, tokenizer, name, task, examples, with_example, args.samples, args.max_new_tokens),
                  flush=True)


if __name__ == "__main__":
    run.run_script(main)
