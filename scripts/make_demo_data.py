#!/usr/bin/env python3
"""Generates the demo task: a customer's sentence -> the order as one line of JSON.

    python3 scripts/make_demo_data.py [examples/data]

Writes `demo_train.jsonl` (800 rows) and `demo_heldout.jsonl` (100 rows); the README beside them describes the task.
Only the standard library is used, the seed is fixed, and the same files come out every time.
"""

import json
import pathlib
import random
import sys

SEED, TRAIN_ROWS, HELDOUT_ROWS = 20, 800, 100
SYSTEM = "Turn the order into JSON."

# Of every list the last entries (after the `*`) stay out of training: half of the held-out rows are made of them alone.
NAMES = """
Abbott Abe Achterberg Adeyemi Ahmed Allen Alvarez Amari Andersson Andrade Arslan Aydin Bailey Banerjee Barros Bashir
Bauer Becker Benali Berg Bianchi Blanc Bosch Brandt Bryant Campbell Carvalho Castillo Chandra Chen Clarke Cohen Conti
Cooper Costa Dahl Delgado Desai Diallo Diaz Dubois Dunn Ekberg Engel Eriksen Evans Farouk Fernandez Ferrari Fischer
Flores Fontaine Fraser Gallo Garcia Gomez Greco Gupta Haddad Hamid Hansen Hayashi Herrera Hoffman Holm Huang Ibrahim
Ito Ivanov Jacobs Jansen Jensen Jimenez Johansson Kaplan Kaya Keller Khan Kim Koch Kovacs Lambert Larsen Laurent Lee
Lehmann Leroy Lindgren Lopez Lund Maier Mancini Marino Martin Mbeki Mensah Meyer Mishra Mora Moreau Morgan Murphy
Nakamura Nguyen Nielsen Noor Novak Okada Okafor Oliveira Olsen Ortega Park Patel Pavlov Pereira Perez Petrov Popescu
Quinn Rahman Ramos Reyes Ricci Richter Rojas Rossi Roy Russo Saito Sakai Sanders Santos Sato Schmidt Schneider Serrano
Shah Silva Simon Singh Soto Stein Suzuki Takeda Tanaka Teixeira Torres Tran Turner Varga Vargas Virtanen Vogel Wagner
Walsh Wang Weber Winter Wong Wright Yilmaz Young Zhang
* Baptiste Calloway Dimitrov Eklund Fujita Grimaldi Holloway Iversen Kowalski Lindqvist Mendoza Osman Pelletier Sharma
Thornton Ueda Vasquez Whitaker Yamamoto Zimmer
"""
CITIES = """
Aberdeen Adelaide Ankara Athens Atlanta Auckland Baltimore Bangkok Barcelona Basel Beirut Belgrade Bergamo Bergen
Berlin Bilbao Birmingham Bologna Bonn Bordeaux Boston Bremen Brisbane Bristol Bruges Brussels Bucharest Budapest
Calgary Cardiff Casablanca Chicago Cleveland Cologne Copenhagen Cork Dallas Delhi Denver Detroit Dortmund Dubai Dublin
Edinburgh Essen Frankfurt Geneva Genoa Ghent Glasgow Granada Graz Hamburg Hanoi Hanover Helsinki Houston Istanbul
Jakarta Kyoto Lausanne Leeds Leipzig Lille Lima Linz Lisbon Liverpool London Lyon Madrid Malaga Manchester Manila
Marseille Melbourne Memphis Miami Milan Mumbai Munich Nairobi Nantes Naples Nice Odense Oslo Ottawa Palermo Paris
Perth Phoenix Pisa Portland Porto Prague Quito Rome Rotterdam Salzburg Santiago Seattle Seoul Seville Singapore Sofia
Split Sydney Tallinn Tampere Tokyo Toronto Trieste Tunis Turin Utrecht Valencia Vancouver Verona Vienna Vilnius Warsaw
Zagreb Zurich
* Antwerp Austin Belfast Cairo Dresden Florence Krakow Lagos Montreal Osaka Riga Stockholm
"""
ITEMS = """
almonds, apple juice, apple pie, baking powder, barley, black beans, black pepper, black tea, blue paint, bricks,
brown sugar, buttons, candles, canned corn, cat food, cement, chalk, cinnamon, cocoa powder, coffee beans, copper
wire, corn flour, cotton yarn, cough drops, dish soap, dog food, dried figs, duct tape, envelopes, fish food, floor
tiles, flower pots, garden soil, gift wrap, ginger tea, glass jars, green beans, green tea, ground coffee, hair gel,
hand soap, herbal tea, hinges, honey, ice cream, ink, lamp oil, lemons, light bulbs, maple syrup, matches, milk
powder, mineral water, mustard, nails, notebooks, oat milk, oats, olive oil, orange juice, paper cups, paper plates,
paper towels, pasta, peanuts, pencils, pine boards, plaster, plum jam, postcards, potatoes, printer paper, raisins,
red paint, rice, roof tiles, rope, rubber bands, salt, screws, shampoo, soy sauce, sponges, staples, sunflower seeds,
tea towels, tomato soup, vinegar, walnuts, washers, wheat flour, white paint, wood glue, yeast
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
        if len(heldout) % 2:
            key, made = row(rng, names[1], cities[1], items[1])  # nothing of it was ever seen
        else:
            key, made = row(rng, names[0], cities[0], items[0])  # known parts, never seen together
        name, city, item = key
        if key not in heldout and not pairs & {(name, city), (name, item), (city, item)}:
            heldout[key] = made
    out.mkdir(parents=True, exist_ok=True)
    for file, rows in (("demo_train.jsonl", train), ("demo_heldout.jsonl", heldout)):
        text = "".join(json.dumps(made, ensure_ascii=False) + "\n" for made in rows.values())
        (out / file).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
