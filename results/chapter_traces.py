"""Prints traces for train_projector.py --traces, made of the train chapters, for a base that earns nothing.

SmolLM2-135M kept 5 of 159 samples of stage 1, none with a sentence before its plan, so there is nothing to
put a tag into. Here a chapter's first whole sentence stands for the plan and the others for the reasoning.
This gives the train chapters away, and only them: what it teaches is the form, and the prose of these books.

    python results/chapter_traces.py > traces.jsonl
"""
import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from data.next_chapter import ANSWER, examples
from lib import run
from train_projector import sentences_of


def main():
    for number, example in enumerate(examples("train")):
        sentences = sentences_of(" ".join(example["chapter"].split()))
        first, *others = [own for own in sentences if own.rstrip("\"'”’").endswith((".", "!", "?"))] or [""]
        if others:
            print(json.dumps({"example": number, "text": f"{' '.join(others)}\n{ANSWER} {first}"}))


if __name__ == "__main__":
    run.run_script(main)
