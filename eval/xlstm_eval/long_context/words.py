"""Words of the synthetic texts. No word of a needle's key is a word of a haystack.

Plain English words without digits: every tokenizer of a language model can write them.
"""

from __future__ import annotations


def _list(words: str) -> tuple[str, ...]:
    return tuple(words.split())


PEOPLE = _list(
    "baker farmer teacher painter sailor doctor singer miller tailor porter gardener carpenter "
    "writer driver hunter weaver mason smith clerk guard judge cook nurse pilot"
)
MANNERS = _list(
    "old young quiet busy tired happy careful polite famous honest clever patient cheerful modest "
    "hungry serious friendly lonely"
)
ACTIONS = _list(
    "cleaned opened carried painted counted followed visited repaired described watched moved "
    "found sold bought borrowed covered finished washed"
)
THINGS = _list(
    "table window basket letter bottle ladder blanket bridge garden kitchen wagon picture candle "
    "hammer bucket carpet mirror drawer pillow teapot lantern barrel curtain bench"
)
PLACES = _list(
    "market harbour station village river church school library bakery meadow tower castle museum "
    "hospital theatre valley forest island"
)
TIMES = (
    "in the morning",
    "before lunch",
    "after dinner",
    "during the storm",
    "late in the evening",
    "on a cold day",
    "without a word",
    "for the second time",
)

KEY_ADJECTIVES = _list(
    "brave crimson silent golden hidden frozen gentle bitter rapid hollow velvet amber rugged "
    "misty scarlet nimble ancient humble fierce marble dusty vivid rusty solar"
)
KEY_ANIMALS = _list(
    "falcon otter badger panther beetle heron lizard salmon tiger raven camel walrus donkey spider "
    "turtle parrot dolphin weasel gecko moose pigeon rabbit lobster hornet"
)
KEYS = tuple(f"{adjective} {animal}" for adjective in KEY_ADJECTIVES for animal in KEY_ANIMALS)
