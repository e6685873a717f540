"""Text and code for the tests that no Python's own library decides: modules made from a seed, the same everywhere."""

import textwrap

SYLLABLES = [a + b for a in ("b", "ch", "d", "gl", "k", "m", "n", "r", "st", "tr", "v", "z") for b in "aeiou"]
CODE = (
    "def {a}_{b}({c}, {d}={n}, *, {e}: int = {n}):\n    {doc}\n    # {s}\n    return [{c}[{d}:] for {c} in {e} if {c}]\n",
    "class {A}{B}({A}):\n    {doc}\n\n    {c} = {n}  # {s}\n\n    def __init__(self, {d}):\n        self.{d} = {d}\n",
    "@{a}.{b}\nasync def {c}({d}, **{e}):\n    async with {d}({e}) as {a}:\n        await {a}.{b}('{s}', f'{{{d}!r}} {n}')\n",
    "try:\n    {a} = {b}({c}={n}, {d}=lambda {e}: {e} ** {n})\nexcept {A}Error as {e}:\n    raise {B}Error({e}) from None\n",
    "if ({a} := {b}({n})) and {c} < {n}:  # {s}\n    {d} = {{'{c}': {n}, '{e}': ({a}, {n}.5), **{b}}}\nelse:\n    del {e}\n",
    "{a}, *{b} = {c} \\\n    + {d}[::{n}]\n{e} = '''{s}\n\n    # not a comment\n'''\n",
    "match {a}:\n    case {{'{b}': {c}}} if {c} > {n}:\n        pass\n    case [{d}, *_]:\n        yield_{e} = not {d}\n",
    "while True:\n    global_{a} = {b} or {c}  # {s}\n    if global_{a} is {d}:\n        break\n",
)


class _Draw:
    """A linear congruential generator: random.Random promises the same numbers in every version only for random()."""

    def __init__(self, seed):
        self.state = seed * 2_654_435_761 + 12_345

    def __call__(self, n):
        self.state = (self.state * 6_364_136_223_846_793_005 + 1_442_695_040_888_963_407) % 2**64
        return (self.state >> 33) % n

    def word(self):
        """Common words more often than rare ones."""
        rank = _Draw(7 + min(self(600), self(600), self(600)))
        return "".join(SYLLABLES[rank(len(SYLLABLES))] for _ in range(1 + rank(3)))

    def sentence(self):
        words = [self.word() for _ in range(4 + self(12))]
        return f"{words[0].capitalize()} {' '.join(words[1:])}."


def module(seed, length=6_000):
    """A Python module of about `length` characters: docstrings, comments, code. The seed decides every one of them."""
    draw = _Draw(seed)
    paragraph = lambda n: textwrap.fill(" ".join(draw.sentence() for _ in range(n)), 72)
    parts = [f'"""{draw.sentence()}\n\n{paragraph(8)}\n\n{paragraph(8)}\n"""\n\nimport {draw.word()}\n\n']
    while sum(map(len, parts)) < length:
        names = {k: f"{draw.word()}{k}" for k in "abcde"} | {k: draw.word().title() for k in "AB"} | {"n": draw(1_000)}
        doc = f'"""{draw.sentence()}\n\n{textwrap.indent(paragraph(2), " " * 4)}\n    """'
        parts.append(CODE[draw(len(CODE))].format(doc=doc, s=draw.sentence(), **names) + "\n\n")
    return "".join(parts)


def texts(n, skip=0, length=3_000):
    """`n` texts of `length` characters each."""
    return [module(seed)[:length] for seed in range(skip, skip + n)]
