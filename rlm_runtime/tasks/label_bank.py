"""Questions of six kinds, made from templates of our own: what OOLONG-style windows are filled
with.

The kind of a question is not written in it, but anybody can tell: it is what the question asks for.
"""

from __future__ import annotations

import random

from rlm_runtime.tasks import words

DESCRIPTION, ENTITY, HUMAN = "description and abstract concept", "entity", "human being"
NUMERIC, LOCATION, ABBREVIATION = "numeric value", "location", "abbreviation"
LABELS = (DESCRIPTION, ENTITY, HUMAN, NUMERIC, LOCATION, ABBREVIATION)

TEMPLATES = {
    DESCRIPTION: (
        "What does the word {noun} mean?",
        "How does a {noun} work?",
        "Why is a {noun} often {adjective}?",
        "What is the reason people keep a {adjective} {noun}?",
        "How do you clean a {noun}?",
        "What is the purpose of a {noun}?",
        "What is the difference between a {noun} and a {noun2}?",
        "How is a {adjective} {noun} made?",
        "What is the origin of the saying about the {adjective} {noun}?",
        "Why did the {noun} of {place} fall out of use?",
    ),
    ENTITY: (
        "What animal is shown on the {noun} of {place}?",
        "What colour is the {adjective} {noun}?",
        "What instrument is played at the {noun} feast?",
        "Which metal is a {adjective} {noun} made of?",
        "What kind of food is served with a {noun}?",
        "Which language is written on the {adjective} {noun}?",
        "What sport is played with a {noun}?",
        "What plant grows beside the {noun} in {place}?",
        "Which product made the {noun} of {place} famous?",
        "What disease was the {adjective} {noun} said to cure?",
    ),
    HUMAN: (
        "Who invented the {adjective} {noun}?",
        "Who was the first person to cross the {noun} at {place}?",
        "Which painter made the {adjective} {noun}?",
        "Who wrote the book about the {noun}?",
        "Who was mayor of {place} when the {noun} was built?",
        "Whose {noun} was sold to {person}?",
        "Which actress sang of the {adjective} {noun}?",
        "Who taught {person} to mend a {noun}?",
        "Who discovered the {noun} near {place}?",
        "Which family owned the {adjective} {noun}?",
    ),
    NUMERIC: (
        "How many {noun}s are there in {place}?",
        "How old is the {adjective} {noun}?",
        "How much does a {noun} weigh?",
        "In what year was the {noun} of {place} opened?",
        "How far is it from the {noun} to the {noun2}?",
        "What percentage of {noun}s are {adjective}?",
        "How long does a {noun} last?",
        "How tall is the {noun} at {place}?",
        "What is the price of a {adjective} {noun}?",
        "How many people can sit in the {noun}?",
    ),
    LOCATION: (
        "Where is the {adjective} {noun} kept?",
        "In which country was the {noun} first used?",
        "Which city has the largest {noun}?",
        "Where was {person} born?",
        "What river flows past the {noun} of {place}?",
        "In which street of {place} is the {noun}?",
        "What mountain is seen from the {adjective} {noun}?",
        "Where do {adjective} {noun}s come from?",
        "Which province is {place} in?",
        "On which island did {person} find the {noun}?",
    ),
    ABBREVIATION: (
        "What does {letters} stand for?",
        "What is the abbreviation for the {noun} society of {place}?",
        "What do the letters {letters} on a {noun} mean in full?",
        "What is the full form of {letters}?",
        "How is the {adjective} {noun} association abbreviated?",
        "What does the acronym {letters} mean?",
        "Which letters stand for the {noun} union?",
        "What is {letters} short for?",
    ),
}


def question(rng: random.Random, label: str) -> str:
    """A question of this kind."""
    return rng.choice(TEMPLATES[label]).format(
        noun=rng.choice(words.NOUNS),
        noun2=rng.choice(words.NOUNS),
        adjective=rng.choice(words.ADJECTIVES),
        place=rng.choice(words.PLACES),
        person=rng.choice(words.PEOPLE),
        letters="".join(rng.choice("ABCDEFGHIKLMNOPRSTUV") for _ in range(rng.randint(3, 4))),
    )
