"""The tiny world, task 1 of 2: is there a plot hole? (the shape of Flawed Fictions, paper Sec. 4)

A map is torn, and its pieces go from hand to hand, along three chains of people; who has it from whom is
told in any order. Two of the chains end with the one who acts on the map; in the third the piece is lost.
The prompt says who acts, and with whom two halves start: it is a plot hole if one of them is the lost one.

    from Mara Otto has it . .. from Otto nobody has it . ..  task : .. Rosa acts .. start with Mara and Karl :

So two chains have to be followed, two to six look-ups one after the other in each; nothing else in the story
tells. Every word is one token, so a reader can count. A story's split is a function of its text (`split_of`),
hence no story can be in two splits, and the base model in `base/` was trained on the train part only."""
import random
import zlib

from data import boxed

PEOPLE = ("Karl Mara Otto Lena Ivan Rosa Emil Nina Hugo Tess Olga Paul Vera Finn Ada Bruno Jana Leo Ida Max "
          "Eva Tom").split()
NOBODY = "nobody"  # who has a piece that is lost
LENGTHS = (2, 3, 4, 5, 6)  # how often a piece of the map changes hands; as many stories of each
SIZES = {"train": 6000, "val": 200, "test": 500}
SEEDS = {"train": 1, "val": 2, "test": 3}
# the paper's offer of the tag, in few words
OFFER = " or skip with <implicit_thought> number </implicit_thought>"


def make_story(rng, hole, hops):
    """One story of three chains, in which each piece of the map changes hands so many times -> {story, label,
    first, asked, chains}: with whom the two halves start, who acts on the map, and, for the readers of
    prepare.py, through whose hands each half goes."""
    asked, *others = rng.sample(PEOPLE, 3 * hops + 1)
    chains = [others[i * hops : (i + 1) * hops] for i in range(3)]
    for chain, last in zip(chains, (asked, asked, NOBODY)):
        chain.append(last)
    followed = [chains[0], chains[2 if hole else 1]]
    rng.shuffle(followed)
    return {"story": events_of(rng, chains), "label": bool(hole), "first": [chain[0] for chain in followed],
            "asked": asked, "chains": followed}


def events_of(rng, chains):
    """What happens in some chains of people, in any order, as text."""
    events = [f"from {giver} {taker} has it ." for chain in chains for giver, taker in zip(chain, chain[1:])]
    return " ".join(rng.sample(events, len(events)))


def split_of(story):
    """Train, val or test by the story's own text: 80 / 10 / 10 %."""
    bucket = zlib.crc32(story.encode()) % 10
    return "test" if bucket == 0 else "val" if bucket == 1 else "train"


def collect(split, n, make):
    """n different stories of the split; make(number of the next one) -> a story, of any split."""
    rows = {}  # story -> row
    while len(rows) < n:
        row = make(len(rows))
        if split_of(row["story"]) == split:
            rows.setdefault(row["story"], row)
    return list(rows.values())


def length_of(number):
    """The length of the split's story of this number: each twice in turn, without a hole and with one."""
    return LENGTHS[number // 2 % len(LENGTHS)]


def examples(split, n=None, hops=None):
    """The split's stories, the same on every machine: a list of dicts, exactly half with a hole.

    n: another number of stories. hops: one length for all chains (default: LENGTHS in turn)."""
    rng = random.Random(SEEDS[split])
    return collect(split, n or SIZES[split],
                   lambda number: make_story(rng, number % 2, hops or length_of(number)))


def prompt(example, latent):
    """The story and the question; with `latent`, the offer of the tag, as in the paper's prompt."""
    task = f"task : find the hole . {example['asked']} acts on the map . think aloud{OFFER * bool(latent)} ."
    return f"{example['story']} {task} the halves start with {' and '.join(example['first'])} :"


def answer(example):
    """The gold answer, in exactly the format that `reward` parses (the refresh trains on it)."""
    return "\\boxed{ Yes }" if example["label"] else "\\boxed{ No }"


def reward(example, completion):
    """1.0 if the last box of the completion is the right word, else 0.0 (paper Sec. 4)."""
    said = (boxed(completion) or "").strip().lower()
    return float(said == ("yes" if example["label"] else "no"))
