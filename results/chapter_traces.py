"""Makes traces for a base that earns nothing, for train_projector.py --traces, of the train chapters.

SmolLM2-135M kept 5 of 159 samples of stage 1, none with a sentence before its plan, so there is nothing to
put a tag into. Here a chapter's first whole sentence stands for the plan and the others for the reasoning.
This gives the train chapters away, and only them: what it teaches is the form, and the prose of these books.

    python results/chapter_traces.py --out traces.jsonl
"""
import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import data
from lib import run
from train_projector import sentences_of


def main():
    parser = run.parser(__doc__)
    parser.add_argument("--out", required=True, metavar="FILE", help="the traces go there")
    args = parser.parse_args()
    task = data.load_task("next_chapter.short")
    lines = []
    for number, example in enumerate(task.examples("train")):
        sentences = sentences_of(" ".join(example["chapter"].split()))
        first, *others = [own for own in sentences if own.rstrip("\"'”’").endswith((".", "!", "?"))] or [""]
        if others:
            text = f"{' '.join(others)}\n{task.ANSWER} {first}"
            lines.append(json.dumps({"example": number, "text": text}) + "\n")
    run.write_text(args.out, "".join(lines))
    print(f"wrote {len(lines)} traces to {args.out}")


if __name__ == "__main__":
    run.run_script(main)
