"""The closed vocabularies of the embedded tasks: short words, most of them one token of the BPE of 512 entries."""

import calendar
import html.entities


def _words(text: str) -> tuple[str, ...]:
    """Split a list of words."""
    return tuple(text.split())


ITEMS = _words("figs nuts pens cups eggs pins hats jars keys bags mugs toys caps beds rugs pots pans nets maps logs")
NAMES = _words("Ann Bob Eve Tom Max Ida Leo Mia Sam Zoe Kim Lou Ray Amy Ben Dan Jan Ned Pia Roy")
WORDS = _words(
    "sun fog ice sea map cat dog fox owl bee ant pig hen elm oak ivy rye tea jam pie "
    "box cup hat key lid net oil pan rug saw toy urn van wax yak zip bus gem ink jet"
)
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")

# The first 54 elements (symbol, name) in order of atomic number.
ELEMENTS = tuple(
    tuple(pair.split(":"))
    for pair in [
        "H:hydrogen",
        "He:helium",
        "Li:lithium",
        "Be:beryllium",
        "B:boron",
        "C:carbon",
        "N:nitrogen",
        "O:oxygen",
        "F:fluorine",
        "Ne:neon",
        "Na:sodium",
        "Mg:magnesium",
        "Al:aluminium",
        "Si:silicon",
        "P:phosphorus",
        "S:sulfur",
        "Cl:chlorine",
        "Ar:argon",
        "K:potassium",
        "Ca:calcium",
        "Sc:scandium",
        "Ti:titanium",
        "V:vanadium",
        "Cr:chromium",
        "Mn:manganese",
        "Fe:iron",
        "Co:cobalt",
        "Ni:nickel",
        "Cu:copper",
        "Zn:zinc",
        "Ga:gallium",
        "Ge:germanium",
        "As:arsenic",
        "Se:selenium",
        "Br:bromine",
        "Kr:krypton",
        "Rb:rubidium",
        "Sr:strontium",
        "Y:yttrium",
        "Zr:zirconium",
        "Nb:niobium",
        "Mo:molybdenum",
        "Tc:technetium",
        "Ru:ruthenium",
        "Rh:rhodium",
        "Pd:palladium",
        "Ag:silver",
        "Cd:cadmium",
        "In:indium",
        "Sn:tin",
        "Sb:antimony",
        "Te:tellurium",
        "I:iodine",
        "Xe:xenon",
    ]
)
SYMBOLS = _words("Li Ne Mg Si Cl Sc Cr Mn Fe Co Ni Zn Ge As Se Sr Nb Mo")  # one token each

# Powers of ten between units: (from, to, zeros).
UNITS = (
    ("km", "m", 3),
    ("m", "cm", 2),
    ("m", "mm", 3),
    ("cm", "mm", 1),
    ("kg", "g", 3),
    ("g", "mg", 3),
    ("hm", "m", 2),
    ("dm", "cm", 1),
)

_ENTITY_NAMES = [
    "amp",
    "copy",
    "deg",
    "divide",
    "eth",
    "frac12",
    "laquo",
    "micro",
    "middot",
    "para",
    "plusmn",
    "pound",
    "reg",
    "sect",
    "sup2",
    "times",
    "uml",
    "yen",
]


def facts() -> tuple[tuple[tuple[str, ...], str], ...]:
    """List every memorised fact as (its paraphrases, its answer): elements, months, named characters of HTML."""
    rows: list[tuple[tuple[str, ...], str]] = []
    for number, (symbol, name) in enumerate(ELEMENTS, start=1):
        rows.append((_phrase("symbol", name), symbol))
        rows.append((_phrase("atomic number", name), str(number)))
        rows.append((_phrase("element", f"number {number}"), symbol))
    for month in range(1, 13):
        rows.append((_phrase("number", calendar.month_name[month]), str(month)))
        rows.append((_phrase("days", calendar.month_name[month]), str(calendar.monthrange(2026, month)[1])))
    rows += [(_phrase("code point", f"&{name};"), str(html.entities.name2codepoint[name])) for name in _ENTITY_NAMES]
    return tuple(rows)


def _phrase(relation: str, subject: str) -> tuple[str, ...]:
    """Ask for one relation of one subject in four ways; the subject stands last in two of them."""
    return (
        f"{relation} of {subject}?",
        f"{subject}: {relation}?",
        f"Give the {relation} of {subject}.",
        f"For {subject}, what is the {relation}?",
    )
