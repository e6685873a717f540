"""Filters keep what they should, patterns replace what they should and no more, and a mistyped one is one clear line."""

from collections import Counter
from pathlib import Path

import pytest

from tinyllama_jax.base.errors import UserError
from tinyllama_jax.data.prepare import clean

ENGLISH = "The river runs past the old mill, and people sit on its banks in summer to read and to talk about the weather."
GERMAN = "Der Fluss fließt an der alten Mühle vorbei, und im Sommer sitzen die Leute am Ufer, lesen und reden über das Wetter."
MODEL = Path(__file__).parent / "good_or_bad.fasttext.bin"  # two labels, of some words on books and some of junk mail


def keeps(spec: str, *parts: str) -> bool:
    return not clean.rejected_by([clean.parse_filter(spec)], parts)


def test_length():
    assert [keeps("length:3:5", "x" * n) for n in range(2, 7)] == [False, True, True, True, False]
    assert keeps("length:3:", "ab", "c" * 9) and not keeps("length::10", "ab", "c" * 9)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("en", ENGLISH),
        ("de", GERMAN),
        ("zh", "这条河流过古老的磨坊，夏天人们坐在河边看书，谈论天气。"),
        ("ru", "Река течёт мимо старой мельницы, и летом люди сидят на берегу, читают и говорят о погоде."),
        ("ar", "يجري النهر بجانب الطاحونة القديمة ويجلس الناس على ضفافه في الصيف للقراءة والحديث عن الطقس."),
    ],
)
def test_language(code, text):
    assert keeps(f"language:{code}:0.8", text) and not keeps("language:fr:0.2", text)
    control = "".join(map(chr, range(32))) + "\x7f\x85\ufffe\ufdd0\U0010ffff"
    assert keeps(f"language:{code}:0.8", control + text)  # CLD2 alone raises on these


def test_language_is_a_share_of_the_text(odd):
    both = ENGLISH * 3 + "\n" + GERMAN
    assert keeps("language:en:0.6", both) and not keeps("language:en:0.9", both) and keeps("language:de:0.1", both)
    for text in odd:
        keeps("language:en:0.5", text)
    assert not keeps("language:en:0.5", "12345")


@pytest.mark.parametrize(
    ("text", "varied"),
    [
        (ENGLISH, True),
        ("\n".join(f"line {i} says {i * i}" for i in range(50)), True),
        # of 10 lines, 3 repeat one before, and 4
        ("\n".join([*(f"{i}{'y' * 30}" for i in range(7)), *"xxx"]), True),
        ("\n".join([*(f"{i}{'y' * 30}" for i in range(5)), *"xxxxx"]), False),
        # of 11 lines, 1 repeats one before, with 16 (32 in both), 5 and 80% of the characters
        ("\n".join(["y" * 30, "y" * 30, *(f"{i}{'z' * 13}" for i in range(9))]), True),
        ("\n".join(["y" * 9, "y" * 9, *(f"{i}{'z' * 18}" for i in range(9))]), True),
        ("\n".join([*[" ".join(f"word{i}" for i in range(60))] * 2, *(f"n{i}" for i in range(9))]), False),
        # "one two" four times is 24 of 124 characters, and of 104
        (" ".join(f"one two {i:025}" for i in range(4)), True),
        (" ".join(f"one two {i:020}" for i in range(4)), False),
        ("word", True),
        ("\n\n", True),
    ],
)
def test_repetition(text, varied):
    assert keeps("repetition", text) is varied


def test_a_users_own_function(tmp_path):
    file = tmp_path / "my:rules.py"
    file.write_text("import re\nLEAST = 2\ndef keep(text):\n    return len(re.findall('a', text)) >= LEAST\n")
    spec = f"python:{file}:keep"
    assert keeps(spec, "ba", "nana") and not keeps(spec, "b" * clean.HEAD, "a") and keeps(spec, "b" * clean.HEAD, "aa")
    filter_ = clean.parse_filter(spec)
    file.unlink()  # a worker on another machine has not got it
    clean._predicate.cache_clear()
    assert not clean.rejected_by([filter_], ["aa"]) and clean.rejected_by([filter_], ["a"]) == spec
    assert not keeps("python:keyword:iskeyword", "text") and keeps("python:keyword:iskeyword", "pass")
    file.write_text("def keep(text):\n    return text[99]\n")
    with pytest.raises(UserError, match="keep: IndexError: string index out of range, for the text that begins with 'short'"):
        keeps(spec, "short")
    assert clean.parse_filter(spec).sha256 != filter_.sha256
    file.write_text("def keep(text):\n    raise SystemExit('bye')\n")
    with pytest.raises(UserError, match="keep: SystemExit: bye, for the text that begins with 'short'"):
        keeps(spec, "short")


def test_fasttext():
    good, bad = "people read and write letters about history", "buy cheap pills now"
    for label in ("good", "__label__good"):
        assert keeps(f"fasttext:{MODEL}:{label}:0.9", good, "\n", good) and not keeps(f"fasttext:{MODEL}:{label}:0.9", bad)
    assert keeps(f"fasttext:{MODEL}:bad:0.9", bad) and keeps(f"fasttext:{MODEL}:bad:0", good)


def test_the_first_filter_that_drops_is_named_and_none_keeps_all():
    filters = [clean.parse_filter(spec) for spec in ("length:5:", "language:en:0.5")]
    assert clean.rejected_by(filters, ["abc"]) == "length:5:"
    assert clean.rejected_by(filters, [GERMAN]) == "language:en:0.5"
    assert clean.rejected_by(filters, [ENGLISH]) == "" == clean.rejected_by([], ["abc"])


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("", "--filter : no such filter; there are length:MINIMUM:MAXIMUM .*, repetition, python:.*, fasttext:"),
        ("lenght:1:2", "--filter lenght:1:2: no such filter; there are length:MINIMUM:MAXIMUM"),
        ("length", "must be length:MINIMUM:MAXIMUM"),
        ("length:200", "must be length:MINIMUM:MAXIMUM"),
        ("length::", "must be length:MINIMUM:MAXIMUM"),
        ("length:1k:2k", "'1k' is not a whole number; must be length:MINIMUM"),
        ("length:9:1", "no document is that long"),
        ("language:en", "must be language:CODE:MINIMUM"),
        ("language:english:0.5", "'english' is no language that CLD2 knows; it knows .* en eo "),
        ("language:en:65", "'65' is not a number from 0 to 1"),
        ("language:en:nan", "'nan' is not a number from 0 to 1"),
        ("repetition:0.3", "must be repetition$"),
        ("python:rules.py", "must be python:MODULE_OR_FILE.py:FUNCTION"),
        ("python:gone.py:keep", "there is no file gone.py"),
        ("python:gone:keep", "there is no module gone"),
        ("python:gone.far:keep", "there is no module gone.far"),
        ("python:json:keep", "json has no function keep"),
        ("python:json:__name__", "__name__ of json is not a function"),
        ("python:bad.py:keep", "bad.py cannot be run: SyntaxError: "),
        ("python:latin.py:keep", "latin.py is not UTF-8"),
        ("fasttext:gone.bin:good", "must be fasttext:MODEL.bin:LABEL:MINIMUM"),
        ("fasttext:gone.bin:good:0.5", "there is no file gone.bin"),
        ("fasttext:bad.py:good:0.5", "bad.py: is not a fastText classifier"),
        (f"fasttext:{MODEL}:fine:0.5", "has no label 'fine'; it has bad good"),
    ],
)
def test_invalid_filters_are_errors(tmp_path, monkeypatch, spec, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.py").write_text("def keep(\n")
    (tmp_path / "latin.py").write_bytes(b"#\xff")
    with pytest.raises(UserError, match=says) as error:
        clean.parse_filter(spec)
    assert "\n" not in str(error.value)


def scrub(text: str, *specs: str) -> tuple[str, dict[str, int]]:
    counts = Counter()
    return "".join(clean.scrubbed([clean.parse_scrub(spec) for spec in specs], [text], counts)), +counts


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("email", "to a.b+c@mail.example.co.uk, <x_y@z.org>.", "to <EMAIL>, <<EMAIL>>."),
        ("email", "jose\u0301 écrit à josé@exemple.fr", "jose\u0301 écrit à <EMAIL>"),
        ("email", "@handle me@localhost a@b.c @x.org user@@x.org f@1.2", ...),
        ("ip", "from 93.184.216.34:80 and http://8.8.4.4/x", "from <IP_ADDRESS>:80 and http://<IP_ADDRESS>/x"),
        ("ip", "2001:4860:4860::8888 is one", "<IP_ADDRESS> is one"),
        # private, loopback, documentation, link-local
        ("ip", "10.0.0.1 192.168.1.254 172.16.0.1 127.0.0.1 0.0.0.0 255.255.255.0 fe80::1 ::1 2001:db8::1", ...),
        ("ip", "v1.2.3.4 version 1.2.3.4, Version: 1.2.3.4 pkg==1.2.3.4 lib-1.2.3.4.tar.gz App/4.3.2.1 release 5.6.7.8", ...),
        ("ip", "1.2.3.4.5 1.2.3 300.1.1.1 01.2.3.4 12:30:45 std::vector a::b 3.14159", ...),
        ("phone", "call +49 30 1234567, (555) 234-5678 or 1-800-555-0199.", "call <PHONE>, <PHONE> or <PHONE>."),
        ("phone", "+1 (415) 555-2671 +442079460958", "<PHONE> <PHONE>"),
        ("phone", "2024-01-02 12345678901 3.14159 978-3-16-148410-0 192.168.100.200 x+1 2+2222 +1234 1,000,000 555-1234", ...),
    ],
)
def test_scrub(name, text, expected):
    found, counts = scrub(text, name)
    assert found == (text if expected is ... else expected)
    assert counts.get(name, 0) == found.count("<" + {"ip": "IP_ADDRESS"}.get(name, name.upper()) + ">")


def test_several_patterns_and_one_of_the_users():
    text = "id=AB123 of x@y.org, id=AB999"
    assert scrub(text, "email", r"regex:AB\d+=\1 <ID>") == (
        r"id=\1 <ID> of <EMAIL>, id=\1 <ID>",
        {"email": 1, r"regex:AB\d+=\1 <ID>": 2},
    )
    assert scrub(text, r"regex:id=\w+=")[0] == " of x@y.org, "


def test_a_match_is_found_wherever_the_parts_of_a_document_end(monkeypatch):
    text = "\n".join(f"mail me{i}@mail.example.org now" for i in range(50))
    whole, _ = scrub(text, "email")
    for size in (1, 7, 64):
        parts = [text[i : i + size] for i in range(0, len(text), size)]
        counts = Counter()
        assert "".join(clean.scrubbed([clean.parse_scrub("email")], parts, counts)) == whole and counts["email"] == 50
    monkeypatch.setattr(clean, "CHUNK", 100)
    monkeypatch.setattr(clean, "LONGEST", 1_000)  # of a line without end, no more is held than this and a part
    assert [len(chunk) for chunk in clean.chunks(["x" * 64] * 100)] == [1_100] * 5 + [900]
    text = (
        "mail me@mail.example.org, " * 500 + "\nor\nyou@mail.example.org\n" * 90
    )  # a line of 13,000 characters, and short ones
    for size in (1, 63, 64, 2_000, len(text)):
        parts, counts = [text[i : i + size] for i in range(0, len(text), size)], Counter()
        done = "".join(clean.scrubbed([clean.parse_scrub("email")], parts, counts))
        assert counts["email"] == 590 and "@" not in done
        assert list(clean.chunks(parts)) == list(clean.chunks([text]))


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("name", "no such pattern; there are email, ip, phone, regex:PATTERN=REPLACEMENT"),
        ("regex:abc", "no such pattern"),
        ("regex:(=x", r"'\(' is not a regular expression: "),
        ("regex:a*=x", "matches an empty text"),
    ],
)
def test_invalid_patterns_are_errors(spec, says):
    with pytest.raises(UserError, match=says):
        clean.parse_scrub(spec)
