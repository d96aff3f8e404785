"""The little world of the demo: synthetic pre-training text, and the order-ticket data set.

Everything is drawn from the word lists below with a seeded generator; no outside text is read. The
pre-training text holds short documents: stories and order messages with questions answered in full
sentences, sums, number words, word lists and opposites. The fine-tuning task, turning an order message into
a terse ticket, is *not* among them: it recombines what they teach (find the place, the count, the goods and
the sender; write a number word as a digit) in a form that the model has never produced.
"""

from __future__ import annotations

import random
from collections.abc import Callable


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "Mia Tom Ana Ben Eva Leo Ida Max Nina Otto Rosa Paul Lena Hugo Clara Felix "
    "Greta Jonas Sofia Viktor Marta Oscar Julia Simon"
)
PLACES = _words("mill barn school harbour market bakery library station garden castle museum bridge farm hotel")
GOODS = _words("cups hats lamps chairs ropes boots kites plates pears books drums flags bells coats")
COLOURS = _words("red blue green white black yellow brown pink")
NUMBER_WORDS = _words("zero one two three four five six seven eight nine")
OPPOSITES = (
    "hot cold|big small|old new|fast slow|high low|long short|hard soft|wet dry|full empty|early late|"
    "light dark|near far|loud quiet|open closed|happy sad|young old"
)

OPENINGS = (
    "Hello, this is {name}.",
    "Good morning, {name} here.",
    "My name is {name}.",
    "Hi, {name} speaking.",
    "Greetings from {name}.",
    "Hello, my friend {other} told {name} to write, so here I am.",
)
REQUESTS = (
    "Please send {count} {colour} {goods} to the {place}.",
    "We need {count} {colour} {goods} at the {place}.",
    "The {place} is waiting for {count} {colour} {goods}.",
    "Could you bring {count} {colour} {goods} to the {place}?",
    "I would like {count} {colour} {goods}, delivered to the {place}.",
    "At the {place} we ran out of {goods}, so bring {count} {colour} ones.",
)
REMARKS = (
    "Thank you!",
    "{other} will pay.",
    "It is for {other}.",
    "We have {colour2} {goods2} already.",
    "Do not go to the {place2}.",
    "I am at the {place2} today.",
    "Many thanks and see you soon.",
)

# Lines that start so are given; all others are answers, which can be known from what is given.
GIVEN = ("Message:", "Story:", "Question:", "Reverse:", "Sort:", "First:", "Last:", "Count:", "Copy:")

Facts = dict[str, str]
Row = dict[str, str]


def _facts(rng: random.Random) -> Facts:
    """Draw what one order is about, with a second value of most kinds as a distractor."""
    name, other = rng.sample(NAMES, 2)
    place, place2 = rng.sample(PLACES, 2)
    goods, goods2 = rng.sample(GOODS, 2)
    colour, colour2 = rng.sample(COLOURS, 2)
    number = rng.randint(2, 9)
    return {
        "name": name, "other": other, "place": place, "place2": place2, "goods": goods, "goods2": goods2,
        "colour": colour, "colour2": colour2, "count": NUMBER_WORDS[number], "digit": str(number),
    }  # fmt: skip


def order_message(rng: random.Random, facts: Facts) -> str:
    """Write an order: who writes, what is wanted and where, and a remark that does not matter."""
    parts = [rng.choice(OPENINGS), rng.choice(REQUESTS), rng.choice(REMARKS)]
    return "Message: " + " ".join(parts).format(**facts)


def ticket_row(rng: random.Random) -> Row:
    """Draw one example of the fine-tuning task."""
    facts = _facts(rng)
    prompt = order_message(rng, facts) + "\nQuestion: What is the ticket?\nAnswer:"
    return {"prompt": prompt, "completion": " {place}: {digit} {colour} {goods} for {name}".format(**facts)}


def ticket_rows(count: int, seed: int) -> list[Row]:
    """Draw rows of the fine-tuning task; no prompt occurs twice."""
    rng, rows = random.Random(seed), dict[str, Row]()
    while len(rows) < count:
        row = ticket_row(rng)
        rows.setdefault(row["prompt"], row)
    return list(rows.values())


def _answered(lines: list[str], questions: list[tuple[str, str]], rng: random.Random) -> str:
    rng.shuffle(questions)
    body = [f"Question: {q}\nAnswer: {a}" for q, a in questions[:4]]
    return "\n".join(lines + body)


def message_document(rng: random.Random) -> str:
    """An order message and questions about it, answered in full sentences."""
    facts = _facts(rng)
    questions = [
        ("Who wrote this?", "{name} wrote this."),
        ("Where do the {goods} go?", "The {goods} go to the {place}."),
        ("What is wanted?", "{name} wants {count} {colour} {goods}."),
        ("How many {goods} are wanted?", "There are {digit} {goods}."),
        ("What colour are the {goods}?", "The {goods} are {colour}."),
        ("Which place is it?", "It is the {place}."),
        ("What is the number?", "The number is {digit}."),
    ]
    pairs = [(q.format(**facts), a.format(**facts)) for q, a in questions]
    return _answered([order_message(rng, facts)], pairs, rng)


def story_document(rng: random.Random) -> str:
    """Where some people are and what they have, and questions about it."""
    size = rng.randint(1, 3)
    names, places, goods = (rng.sample(words, size) for words in (NAMES, PLACES, GOODS))
    lines, questions = [], []
    for name, place, item in zip(names, places, goods, strict=True):
        colour, number = rng.choice(COLOURS), rng.randint(2, 9)
        word = NUMBER_WORDS[number]
        lines += [f"{name} is at the {place}.", f"{name} has {word} {colour} {item}."]
        questions += [
            (f"Where is {name}?", f"{name} is at the {place}."),
            (f"Who is at the {place}?", f"{name} is at the {place}."),
            (f"What does {name} have?", f"{name} has {word} {colour} {item}."),
            (f"Who has the {item}?", f"{name} has the {item}."),
            (f"How many {item} are there?", f"There are {number} {item}."),
        ]
    rng.shuffle(lines)
    return _answered([" ".join(["Story:", *lines])], questions, rng)


def number_document(rng: random.Random) -> str:
    """Number words as digits, and small sums."""
    lines = []
    for _ in range(5):
        high, low = sorted((rng.randint(0, 9), rng.randint(0, 9)), reverse=True)
        digit, word = rng.choice(list(enumerate(NUMBER_WORDS)))
        forms = (
            (f"{word} in digits", digit),
            (f"{word} {rng.choice(GOODS)} in digits", digit),
            (f"{digit} in words", word),
            (f"{low} + {9 - high}", low + 9 - high),
            (f"{high} - {low}", high - low),
        )
        lines.append("Question: What is {}?\nAnswer: {}".format(*rng.choice(forms)))
    return "\n".join(lines)


def list_document(rng: random.Random) -> str:
    """Turn round, sort, count or pick from a list of words of one kind."""
    lines = []
    for _ in range(2):
        words = rng.sample(rng.choice((NAMES, PLACES, GOODS, COLOURS)), rng.randint(2, 5))
        tasks = {
            "Reverse": words[::-1],
            "Sort": sorted(words),
            "First": words[:1],
            "Last": words[-1:],
            "Count": [str(len(words))],
        }
        task, result = rng.choice(list(tasks.items()))
        lines.append(f"{task}: {' '.join(words)}\nAnswer: {' '.join(result)}")
    return "\n".join(lines)


def copy_document(rng: random.Random) -> str:
    """Copy a list of words of all kinds, and look up what follows one: this is where retrieval is learned."""
    words = rng.sample(NAMES + PLACES + GOODS + COLOURS + NUMBER_WORDS, rng.randint(3, 10))
    lines = [f"Copy: {' '.join(words)}", f"Answer: {' '.join(words)}"]
    for _ in range(3):
        place = rng.randrange(len(words) - 1)
        lines += [f"Question: What follows {words[place]}?", f"Answer: {words[place + 1]}"]
    return "\n".join(lines)


def opposite_document(rng: random.Random) -> str:
    """Words and their opposites."""
    pairs = rng.sample([tuple(pair.split()) for pair in OPPOSITES.split("|")], 3)
    return "\n".join(f"Question: What is not {a}?\nAnswer: {b}" for a, b in pairs)


def notes_document(rng: random.Random) -> str:
    """An order message, and some kinds of its facts listed as asked for."""
    facts = _facts(rng)
    lines = [order_message(rng, facts)]
    for _ in range(2):
        kinds = rng.sample(["name", "place", "goods", "colour", "digit"], rng.randint(2, 4))
        lines += [f"Question: List {', '.join(kinds)}.", f"Answer: {', '.join(facts[k] for k in kinds)}"]
    return "\n".join(lines)


DOCUMENTS: tuple[tuple[Callable[[random.Random], str], int], ...] = (
    (message_document, 5),
    (notes_document, 3),
    (story_document, 4),
    (number_document, 2),
    (list_document, 2),
    (copy_document, 5),
    (opposite_document, 1),
)


def pretraining_documents(count: int, seed: int) -> list[str]:
    """Draw the pre-training documents, kinds mixed by their weights."""
    rng = random.Random(seed)
    makers, weights = zip(*DOCUMENTS, strict=True)
    return [maker(rng) for maker in rng.choices(makers, weights, k=count)]
