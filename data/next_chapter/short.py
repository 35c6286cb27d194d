"""next_chapter with a prompt that a model of 135 M parameters can follow: two or three sentences, then a plan
of one line. Everything else is next_chapter's, its data too. Ours: --task next_chapter.short"""
from data.next_chapter import *  # noqa: F403  a task is its module's names
from data.next_chapter import ANSWER, sources

OFFER = """In the place of a sentence you may write <implicit_thought>number</implicit_thought>, with a \
number from 1 to 5. """


def prompt(example, latent):
    """What the policy reads, without a chat template; with `latent`, the offer of the tag."""
    return f"""{sources(example)}

Say in two or three short sentences what should happen next in this story and why. {OFFER if latent else ""}\
Then write one last line that tells what happens in the next chapter and begins with "{ANSWER}"."""
