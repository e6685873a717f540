"""The demo's corpus and tokenizer: modules are split, whole modules are held out, and text is decoded exactly."""

import ast
import io
import json
import random
import sys
import textwrap
import tokenize
import unicodedata

import generated
import pytest
import sentencepiece

from examples import demo_corpus
from tinyllama_jax.base.errors import UserError

# (a module, its text, its code)
MODULES = {
    "docstrings of module, class, function, async function": (
        '''
        """A module.

        With more:
            indented.
        """
        import os


        class C(object):
            """A class."""

            x = 1

            @property
            def f(self):
                "A function."
                return os

            async def g(self):
                r\'\'\'A \\coroutine.\'\'\'
                await self
        ''',
        "A module.\n\nWith more:\n    indented.\n\nA class.\n\nA function.\n\nA \\coroutine.",
        """
        import os


        class C(object):

            x = 1

            @property
            def f(self):
                return os

            async def g(self):
                await self
        """,
    ),
    "a body of nothing but documentation keeps a statement": (
        '''
        class E(Exception):
            """An error."""
            # and a comment

        def f(): "One line."
        def g(): "Two statements."; return 1
        def h():
            (  # in parentheses
                "Three "  # in two
                # between
                "parts."
            )
        ''',
        "An error.\n\nand a comment\n\nOne line.\n\nTwo statements.\n\nThree parts.\n\nin parentheses\n\nin two\n\nbetween",
        """
        class E(Exception):
            pass

        def f(): pass
        def g(): pass; return 1
        def h():
            pass
        """,
    ),
    "strings that are no docstrings, and # in strings, are code": (
        '''
        x = 1
        """not a docstring"""
        url = "http://a#b"  # a comment with "quotes"
        y = """
        # not a comment

        """
        def f(a="# no"):
            return f"{a}#{a!r}"
        ''',
        'a comment with "quotes"',
        '''
        x = 1
        """not a docstring"""
        url = "http://a#b"
        y = """
        # not a comment

        """
        def f(a="# no"):
            return f"{a}#{a!r}"
        ''',
    ),
    "lines of a comment are one paragraph; rulers, shebang and encoding are none": (
        """
        #!/usr/bin/env python
        # -*- coding: utf-8 -*-
        ####################
        # First line
        # and second,
        #   indented.

        # Another.
        x = [1,  # one
             # two
             2]
        """,
        "First line\nand second,\n  indented.\n\nAnother.\n\none\n\ntwo",
        """
        x = [1,
             2]
        """,
    ),
    "columns are characters, not bytes": (
        """
        class Ä: "Ünï ☃"; ä = "é"  # 漢
        ü = "☃☃☃"; y = 2   # é☃
        """,
        "Ünï ☃\n\n漢\n\né☃",
        """
        class Ä: pass; ä = "é"
        ü = "☃☃☃"; y = 2
        """,
    ),
    "decorators, continuation lines and form feeds stay": (
        "@decorate(  # why\n    1)\ndef f(a,\n      b):\n    return a \\\n        + b\n\f\n# page\nx = 1\n",
        "why\n\npage",
        "@decorate(\n    1)\ndef f(a,\n      b):\n    return a \\\n        + b\n\f\nx = 1",
    ),
    "nothing but text": ('"""Only this."""\n# and this\n', "Only this.\n\nand this", ""),
    "nothing at all": ("", "", ""),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_split_into_text_and_code(name):
    source, text, code = (textwrap.dedent(part).strip("\n") for part in MODULES[name])
    document = demo_corpus.take_apart(source + "\n")
    assert document.text == text
    assert document.code == code
    ast.parse(document.code)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="comments within f-strings are of Python 3.12")
def test_f_strings_of_python_3_12():
    source = 'x = f"{\'#\' + "#"}"  # one\ny = f"""{\n    1  # two\n}#"""\n'
    document = demo_corpus.take_apart(source)
    assert document.text == "one\n\ntwo"
    assert document.code == 'x = f"{\'#\' + "#"}"\ny = f"""{\n    1\n}#"""'


class WithoutDocstrings(ast.NodeTransformer):
    """Removes docstrings from a syntax tree, so that trees can be compared without lines and columns."""

    def visit(self, node):
        self.generic_visit(node)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body
            if body and isinstance(body[0], ast.Expr) and isinstance(getattr(body[0].value, "value", None), str):
                others = body[1:]
                node.body = others if others or isinstance(node, ast.Module) else [ast.Pass()]
            node.body = [n for n in node.body if not isinstance(n, ast.Pass)]  # whether one was added beside other statements
        return node


def test_code_keeps_its_meaning_and_has_no_comments():
    for name in map(str, range(100)):
        source = generated.module(int(name))
        code = demo_corpus.take_apart(source).code
        compile(code, name, "exec", dont_inherit=True)
        assert all(token.type != tokenize.COMMENT for token in tokenize.generate_tokens(io.StringIO(code).readline)), name
        trees = [ast.dump(WithoutDocstrings().visit(ast.parse(s))) for s in (source, code)]
        assert trees[0] == trees[1], name


def library(folder, n=12):
    """Writes `n` modules with text and code, and other files that a library has."""
    for i in range(n):
        path = folder / ("package" if i % 2 else ".") / f"module_{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""Documentation {i}."""\nx = {i}\n')
    return folder


def corpus(folder):
    """Returns (source, split) -> {module: text}."""
    return {
        (source, split): {
            row["module"]: row["text"]
            for row in map(json.loads, (folder / f"{source}.{split}.jsonl").read_text(encoding="utf-8").splitlines())
        }
        for source in demo_corpus.SOURCES
        for split in demo_corpus.SPLITS
    }


def test_gather_decodes_counts_and_skips(tmp_path):
    files = library(tmp_path / "library")
    (files / "latin.py").write_bytes('# coding: latin-1\n"""Grüße."""\ny = 1\n'.encode("latin-1"))
    (files / "bom.py").write_bytes(b'\xef\xbb\xbf"""With a mark."""\r\nz = """a\r\nb"""\r\n')
    (files / "undecodable.py").write_bytes(b'"""\xff"""\n')
    (files / "two.py").write_text("print 'Python 2'\n")
    (files / "unknown.py").write_text("# coding: no-such-encoding\n")
    (files / "half_pair.py").write_text('"""Half a pair: \\ud800."""\nx = 1\n')
    for name in demo_corpus.LEFT_OUT:
        (files / name).mkdir()
        (files / name / "left_out.py").write_text('"""Not this."""\nx = 1\n')
    out = tmp_path / "out"
    out.mkdir()
    assert demo_corpus.gather(out, files) == {"modules": 14, "held out": 1, "skipped": 4}
    texts = corpus(out)
    text = texts["text", "train"] | texts["text", "validation"]
    code = texts["code", "train"] | texts["code", "validation"]
    assert text["latin"] == "Grüße." and code["latin"] == "y = 1"
    assert text["bom"] == "With a mark." and code["bom"] == 'z = """a\nb"""'
    assert text["package.module_3"] == "Documentation 3." and code["package.module_3"] == "x = 3"
    assert not any("left_out" in name for name in text | code)


def test_whole_modules_are_held_out_of_both_sources(tmp_path):
    demo_corpus.gather(tmp_path, library(tmp_path / "library", 300))
    texts = corpus(tmp_path)
    assert len(texts["text", "validation"]) == 3  # 1%
    for one in demo_corpus.SOURCES:
        for other in demo_corpus.SOURCES:
            assert not texts[one, "train"].keys() & texts[other, "validation"].keys()
    assert list(texts["text", "train"]) == sorted(texts["text", "train"])


def test_held_out_modules_hardly_depend_on_the_others():
    names = [f"module_{i}" for i in range(600)]
    few = demo_corpus.held_out(names)
    assert len(few) == 6
    more = demo_corpus.held_out([*names, "another"])
    assert len(few & more) >= 5
    assert demo_corpus.held_out(names[::-1]) == few
    assert demo_corpus.held_out(list("abcdefghij")) == {"j"}  # of the smallest SHA-256 by `sha256sum`


def test_a_library_without_sources_is_an_error_of_one_line(tmp_path):
    with pytest.raises(UserError, match=r"holds 0 documented modules; 2 are needed"):
        demo_corpus.gather(tmp_path, tmp_path)


def test_fingerprint_changes_with_a_module(tmp_path):
    before = demo_corpus.fingerprint(library(tmp_path))
    assert demo_corpus.fingerprint(tmp_path) == before
    (tmp_path / "module_0.py").write_text("x = 12345\n")
    assert demo_corpus.fingerprint(tmp_path)["modules"] != before["modules"]


# -- tokenizer -----------------------------------------------------------------------------------------------------------

SHARES = {"text": 0.7, "code": 0.3}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Returns a tokenizer of a hundred modules, made as in the demo."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "library").mkdir()
    for i in range(100):
        (folder / "library" / f"module_{i}.py").write_text(generated.module(i))
    demo_corpus.gather(folder, folder / "library")
    return folder, demo_corpus.train_tokenizer(folder, SHARES, 2_048)


@pytest.fixture(scope="module")
def tokenizer(model):
    return sentencepiece.SentencePieceProcessor(model_proto=model[1])


def test_ids_bytes_and_digits(tokenizer):
    assert tokenizer.vocab_size() == 2_048
    assert (tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id()) == (0, 1, 2, -1)
    assert [tokenizer.id_to_piece(i) for i in range(3)] == ["<unk>", "<s>", "</s>"]
    assert [tokenizer.id_to_piece(i) for i in range(3, 259)] == [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = [tokenizer.id_to_piece(i) for i in range(259, 2_048)]
    assert not any(len(piece) > 1 and any(c.isdigit() for c in piece) for piece in pieces)
    assert "▁▁▁▁" in pieces and any(piece.endswith("\n") for piece in pieces)


def test_training_again_gives_the_same_bytes(model):
    folder, first = model
    assert demo_corpus.train_tokenizer(folder, SHARES, 2_048) == first


def test_every_character_is_decoded_exactly(tokenizer):
    every = [chr(c) for c in range(sys.maxunicode + 1) if not 0xD800 <= c < 0xE000]  # NUL among them; no half pairs
    lost = [c for c, back in zip(every, tokenizer.decode(tokenizer.encode(every)), strict=True) if back != c]
    assert lost == ["▁"]  # SentencePiece's own sign for a space; no setting of it keeps the two apart


def test_every_text_is_decoded_exactly(tokenizer):
    chosen = [
        "",
        " ",
        "   leading and trailing   ",
        "\n\n\ta\n    b\r\n\n",
        "\x00a\x00",
        "e\u0301 \u00e9 \ufb01 \u212b ｆｕｌｌ",  # would change under any Unicode normalisation
        "<s> </s> <unk> <0x41>",
        "한국어 👩‍👩‍👧‍👦 \u202eabc \ufeff \u00a0\u3000",
        "x" * 100_000,
        " " * 1_000 + "\n" * 1_000,
    ]
    draw = random.Random(0)
    kinds = [
        "abc XYZ",
        " \t\n\r\x0b\x0c\x00\u2028",
        "0123456789",
        "ääǻ",
        "漢字한글",
        "".join(map(chr, range(0x1F600, 0x1F640))),
    ]
    anywhere = [chr(draw.choice([draw.randrange(0xD800), draw.randrange(0xE000, 0x110000)])) for _ in range(500)]
    for _ in range(2_000):
        alphabet = "".join(draw.sample(kinds, 3)) + "".join(draw.sample(anywhere, 5))
        chosen.append("".join(draw.choice(alphabet) for _ in range(draw.randrange(40))).replace("▁", ""))
    assert sum(unicodedata.normalize("NFKC", text) != text for text in chosen) > 100  # the test can tell
    assert tokenizer.decode(tokenizer.encode(chosen)) == chosen
    assert all(0 not in ids for ids in tokenizer.encode(chosen))


def test_shares_choose_the_training_text(model):
    folder, _ = model
    text, code = (
        sentencepiece.SentencePieceProcessor(model_proto=demo_corpus.train_tokenizer(folder, shares, 2_048))
        for shares in ({"text": 0.99, "code": 0.01}, {"text": 0.01, "code": 0.99})
    )
    texts = corpus(folder)
    for source, better, worse in (("text", text, code), ("code", code, text)):
        documents = list(texts[source, "train"].values())
        assert sum(map(len, better.encode(documents))) < 0.95 * sum(map(len, worse.encode(documents)))
