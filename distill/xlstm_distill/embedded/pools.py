"""The closed vocabularies of the embedded tasks: short words, one token each of the BPE."""


def _words(text: str) -> tuple[str, ...]:
    """Split a list of words."""
    return tuple(text.split())


ITEMS = _words(
    "figs nuts pens cups eggs pins hats jars keys bags mugs toys caps beds rugs pots pans nets "
    "maps logs"
)
NAMES = _words("Ann Bob Eve Tom Max Ida Leo Mia Sam Zoe Kim Lou Ray Amy Ben Dan Jan Ned Pia Roy")
WORDS = _words(
    "sun fog ice sea map cat dog fox owl bee ant pig hen elm oak ivy rye tea jam pie "
    "box cup hat key lid net oil pan rug saw toy urn van wax yak zip bus gem ink jet"
)
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
COLUMNS = tuple("ABCDEFGHJKLM")  # first halves of keys such as B4; I would be read as 1
ROWS = tuple("123456789")

# The symbols of the first 54 elements in order of atomic number.
ELEMENTS = _words(
    "H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se "
    "Br Kr Rb Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe"
)
BASES = {"A": "T", "T": "A", "C": "G", "G": "C"}

# Powers of ten between units: (from, to, power). A negative power divides.
UNITS = (
    ("km", "m", 3),
    ("m", "cm", 2),
    ("m", "mm", 3),
    ("cm", "mm", 1),
    ("km", "mm", 6),
    ("kg", "g", 3),
    ("g", "mg", 3),
    ("m", "km", -3),
    ("cm", "m", -2),
    ("mm", "cm", -1),
    ("g", "kg", -3),
    ("mg", "kg", -6),
)
