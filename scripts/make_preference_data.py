#!/usr/bin/env python3
"""Generates pairs of answers for preference training: a plain answer is preferred to one that hedges.

    python3 scripts/make_preference_data.py [examples/data]

Writes `preference_train.jsonl` (400 pairs) and `preference_heldout.jsonl` (100 pairs). Both answers hold the same fact, so that
only the manner tells them apart. Questions of the held-out pairs do not occur in training, nor do the phrases of half of them.
Only the standard library is used, the seed is fixed, and the same files come out every time.
"""

import json
import pathlib
import random
import sys

SEED, TRAIN_ROWS, HELDOUT_ROWS = 23, 400, 100

CAPITALS = """
Austria Vienna, Belgium Brussels, Bulgaria Sofia, Chile Santiago, Croatia Zagreb, Cuba Havana, Denmark Copenhagen, Egypt Cairo,
Estonia Tallinn, Finland Helsinki, France Paris, Germany Berlin, Ghana Accra, Greece Athens, Hungary Budapest, Iceland Reykjavik,
Iran Tehran, Iraq Baghdad, Ireland Dublin, Italy Rome, Japan Tokyo, Jordan Amman, Kenya Nairobi, Latvia Riga, Lebanon Beirut,
Mali Bamako, Morocco Rabat, Nepal Kathmandu, Norway Oslo, Oman Muscat, Peru Lima, Poland Warsaw, Portugal Lisbon, Qatar Doha,
Romania Bucharest, Russia Moscow, Senegal Dakar, Serbia Belgrade, Spain Madrid, Sudan Khartoum, Sweden Stockholm, Tunisia Tunis,
Uganda Kampala, Ukraine Kyiv, Uruguay Montevideo, Vietnam Hanoi
"""
OPPOSITES = """
hot cold, big small, fast slow, early late, hard soft, light dark, full empty, high low, new old, wet dry, young old, loud quiet,
open closed, strong weak, rich poor, thick thin, sharp blunt, sweet sour, long short, clean dirty, near far, deep shallow
"""

# Those of the lists `..._HELDOUT` stay out of training.
PLAIN = ["{answer}.", "It is {answer}.", "The answer is {answer}.", "{answer}, in short.", "That is {answer}."]
PLAIN_HELDOUT = ["Simply {answer}.", "{answer} is right."]
OPENINGS = [
    "I might be wrong, but", "I am not entirely sure, but", "It is hard to say, though", "As far as I can tell,",
    "I could be mistaken, but perhaps", "Opinions may differ, but", "I cannot promise it, but", "If I had to guess,",
]
OPENINGS_HELDOUT = ["I would not swear to it, but", "With some reservations,", "Do not rely on me here, but"]
ENDINGS = [
    "is probably what you mean.", "seems possible.", "could be the answer, I suppose.", "may be correct; please check elsewhere.",
    "is one way to see it.", "might do, but it depends.",
]
ENDINGS_HELDOUT = ["is what some would say, possibly.", "could perhaps be it; ask an expert."]


def pairs_of(text: str) -> list[list[str]]:
    return [entry.split() for entry in text.replace("\n", " ").split(",")]


def questions() -> list[tuple[str, str]]:
    """Every question once, with its answer."""
    found = [(f"What is the capital of {land}?", city) for land, city in pairs_of(CAPITALS)]
    for word, other in pairs_of(OPPOSITES):
        found += [(f"What is the opposite of {word}?", other), (f"Name a word that means the contrary of {word}.", other)]
    for a in range(2, 20):
        for b in range(2, 20):
            found += [(f"What is {a} + {b}?", str(a + b)), (f"How much is {a} times {b}?", str(a * b))]
    return found


def row(rng: random.Random, question: str, answer: str, unseen: bool) -> dict:
    plain, openings, endings = (
        (PLAIN_HELDOUT, OPENINGS_HELDOUT, ENDINGS_HELDOUT) if unseen else (PLAIN, OPENINGS, ENDINGS)
    )
    say = lambda content: [{"role": "assistant", "content": content}]
    chosen = rng.choice(plain).format(answer=answer)
    rejected = f"{rng.choice(openings)} {answer} {rng.choice(endings)}"
    return {"prompt": [{"role": "user", "content": question}], "chosen": say(chosen), "rejected": say(rejected)}


def main() -> None:
    out = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "examples/data")
    rng = random.Random(SEED)
    asked = questions()
    rng.shuffle(asked)
    assert len({question for question, _ in asked}) == len(asked) >= TRAIN_ROWS + HELDOUT_ROWS
    heldout, train = asked[:HELDOUT_ROWS], asked[HELDOUT_ROWS : HELDOUT_ROWS + TRAIN_ROWS]
    for name, part, unseen in [("train", train, lambda _: False), ("heldout", heldout, lambda i: i % 2 == 1)]:
        rows = [row(rng, question, answer, unseen(i)) for i, (question, answer) in enumerate(part)]
        text = "".join(json.dumps(r) + "\n" for r in rows)
        (out / f"preference_{name}.jsonl").write_text(text)
        print(f"preference_{name}.jsonl: {len(rows)} pairs, {len(text)} bytes")


if __name__ == "__main__":
    main()
