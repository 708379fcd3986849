#!/usr/bin/env python3
"""Generates the demo task: a customer's sentence -> the order as one line of JSON.

    python3 scripts/make_demo_data.py [examples/data]

Writes `demo_train.jsonl` (800 rows) and `demo_heldout.jsonl` (100 rows); `examples/data/README.md` describes them.
Only the standard library is used, the seed is fixed, and the same files come out every time.
"""

import json
import pathlib
import random
import sys

SEED, TRAIN_ROWS, HELDOUT_ROWS = 20, 800, 100
SYSTEM = "Turn the order into JSON."

# Of every list the last entries (after the `*`) stay out of training: every second held-out row has one of them.
NAMES = """
Abbott Achterberg Adeyemi Alvarez Amari Andersson Bauer Becker Bianchi Brandt Castillo Chandra Cohen Costa Delgado
Dubois Eriksen Farouk Ferrari Fischer Fontaine Garcia Gupta Haddad Hansen Hoffman Ivanov Jansen Jensen Johansson
Kaplan Keller Khan Kim Kovacs Larsen Laurent Lehmann Lindgren Lopez Marino Martin Mbeki Meyer Moreau Morgan Murphy
Nakamura Nguyen Novak Okafor Olsen Ortega Patel Pereira Petrov Quinn Rahman Ramos Reyes Ricci Rossi Russo Sanders
Santos Sato Schmidt Silva Singh Soto Suzuki Tanaka Torres Turner Vargas Virtanen Wagner Weber Yilmaz Zhang
* Baptiste Calloway Dimitrov Eklund Fujita Grimaldi Holloway Iversen Kowalski Lindqvist Mendoza Osman Pelletier Sharma
Thornton Ueda Vasquez Whitaker Yamamoto Zimmer
"""
CITIES = """
Athens Basel Bergen Berlin Bilbao Boston Bristol Chicago Cologne Dallas Denver Dublin Geneva Genoa Glasgow Hamburg
Helsinki Houston Kyoto Leeds Leipzig Lima Lisbon London Lyon Madrid Malaga Milan Munich Naples Nice Oslo Ottawa Paris
Porto Prague Quito Rome Seattle Seoul Sofia Toronto Turin Valencia Vienna Warsaw Zagreb Zurich
* Antwerp Austin Belfast Cairo Dresden Florence Krakow Lagos Montreal Osaka Riga Stockholm
"""
ITEMS = """
apple juice, black tea, blue paint, brown sugar, candles, cat food, cement, chalk, coffee beans, copper wire, cotton
yarn, dish soap, dog food, envelopes, floor tiles, garden soil, ginger tea, glass jars, green tea, hand soap, honey,
ink, lamp oil, light bulbs, maple syrup, matches, mineral water, nails, notebooks, oat milk, olive oil, orange juice,
paper cups, paper towels, pencils, plaster, postcards, potatoes, printer paper, rice, roof tiles, rope, salt, screws,
soy sauce, sunflower seeds, tomato soup, walnuts, white paint, wood glue
* batteries, bird seed, brown rice, cherry jam, garlic, lentils, orange paint, paper bags, red wine, sandpaper, sea
salt, spring water
"""
UNITS = "bags bottles boxes cans cases crates packs".split()
NUMBERS = "two three four five six seven eight nine ten eleven twelve".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
TITLES = ["Mr.", "Ms.", "Dr.", "Mrs."]

# {order}: how many of what; {who}: title and surname; {by}: one of BY or nothing.
TEMPLATES = [
    "Please send {order} to {who} in {city}{by}.",
    "{who} from {city} would like {order}{by}.",
    "We need {order} for {who}, delivered to {city}{by}.",
    "Can you ship {order} to {city}{by}? The customer is {who}.",
    "Order for {who}: {order}, to {city}{by}.",
    "{who} called from {city} and asked for {order}{by}.",
    "Hello, this is {who}. I want {order} sent to {city}{by}.",
    "To {city}, for {who}: {order}{by}.",
    "I am writing for {who} in {city}, who needs {order}{by}.",
    "Put down {order} for {who}. It goes to {city}{by}.",
]
BY = [" by {day}", " on {day}", " before {day}", " no later than {day}"]
URGENT = ["It is urgent.", "This is a rush order.", "Please hurry.", "They need it fast.", "Treat it as a priority."]
CALM = [
    "There is no hurry.",
    "Take your time.",
    "It is not urgent.",
    "No rush at all.",
    "Thank you.",
    "Same price as before.",
]


def split(text: str, separator: str | None = None) -> tuple[list[str], list[str]]:
    train, heldout = (
        [" ".join(entry.split()) for entry in part.split(separator) if entry.strip()] for part in text.split("*")
    )
    return train, heldout


def row(rng: random.Random, names: list[str], cities: list[str], items: list[str]) -> tuple[tuple, dict]:
    name, city, item = rng.choice(names), rng.choice(cities), rng.choice(items)
    quantity = rng.randrange(2, 13)
    count = NUMBERS[quantity - 2] if rng.random() < 0.6 else str(quantity)
    if quantity == 12 and rng.random() < 0.5:
        order = f"a dozen {rng.choice(UNITS)} of {item}"
    else:
        order = f"{count} {rng.choice(UNITS)} of {item}"
    day = rng.choice(DAYS) if rng.random() < 0.8 else None
    by = rng.choice(BY).format(day=day) if day else ""
    sentence = rng.choice(TEMPLATES).format(order=order, who=f"{rng.choice(TITLES)} {name}", city=city, by=by)
    rush = rng.random() < 0.4
    if rush:
        sentence += " " + rng.choice(URGENT)
    elif rng.random() < 0.5:
        sentence += " " + rng.choice(CALM)
    answer = {"item": item, "qty": quantity, "to": name, "city": city, "day": day and day[:3], "rush": rush}
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": sentence},
        {"role": "assistant", "content": json.dumps(answer, separators=(",", ":"))},
    ]
    return (name, city, item), {"messages": messages}


def main() -> None:
    out = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "examples/data")
    rng = random.Random(SEED)
    names, cities, items = split(NAMES), split(CITIES), split(ITEMS, ",")
    assert all(not set(known) & set(unseen) for known, unseen in (names, cities, items))
    train, heldout, pairs = {}, {}, set()
    while len(train) < TRAIN_ROWS:
        key, made = row(rng, names[0], cities[0], items[0])
        if key not in train:
            train[key] = made
            name, city, item = key
            pairs |= {(name, city), (name, item), (city, item)}
    while len(heldout) < HELDOUT_ROWS:
        lists = [names[0], cities[0], items[0]]
        if len(heldout) % 2:
            part = len(heldout) // 2 % 3
            lists[part] = (names, cities, items)[part][1]
        key, made = row(rng, *lists)
        name, city, item = key
        if key not in heldout and not pairs & {(name, city), (name, item), (city, item)}:
            heldout[key] = made
    out.mkdir(parents=True, exist_ok=True)
    for file, rows in (("demo_train.jsonl", train), ("demo_heldout.jsonl", heldout)):
        text = "".join(json.dumps(made, ensure_ascii=False) + "\n" for made in rows.values())
        (out / file).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
