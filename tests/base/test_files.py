"""Reading and writing files safely: typed JSON with limits, regular files only, locks."""

import json
import os
import subprocess
import sys
import typing

import pytest

from tinyllama_jax.base import errors, files
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.data import blocks
from tinyllama_jax.run import metrics, seals


class Shard(typing.TypedDict):
    file: str
    blocks: files.Count


class Manifest(typing.TypedDict):
    splits: dict[str, list[Shard]]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b'{"splits": {"train": [{"file": "x", "blocks": -1}]}}', r"Expected `int` >= 0 - at `\$.splits\[...\]\[0\].blocks`"),
        (b'{"splits": {"train": [{"file": "x"}]}}', "missing required field `blocks`"),
        (b'{"splits": {"train": [{"file": "x", "blocks": 1e999}]}}', "out of range"),
        (b'{"splits": {"train": [{"file": "x", "blocks": NaN}]}}', "malformed"),
        (b"null", "Expected `object`, got `null`"),
        (b"", "truncated"),
        (b"\xff\xfe", "malformed"),
        (b'{"splits": {"\xff": []}}', "Invalid UTF-8"),
        (b'{"splits": {}, "x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested too deeply"),
        (b'{"splits": {}, "x": "' + b"a" * 2_000 + b'"}', "more than 1,000 bytes"),
    ],
)
def test_json_of_another_kind_is_one_line_that_names_the_key(tmp_path, text, says):
    path = tmp_path / "manifest.json"
    path.write_bytes(text)
    largest = 1_000 if "bytes" in says else files.LARGEST_JSON
    with pytest.raises(UserError, match=says) as error:
        files.read_json(path, Manifest, "copy it again", largest)
    assert str(error.value).startswith(f"{path}: is damaged (") and str(error.value).endswith("; copy it again")
    assert "\n" not in str(error.value)


def test_a_workplace_is_for_one_and_only_one_of_ours_is_removed(tmp_path):
    place = tmp_path / "below" / ".x.partial"
    with files.workplace(place, "somebody is there"):
        (place / "half").mkdir()
        (place / "half/made").touch()
        with pytest.raises(UserError, match="^somebody is there$"), files.workplace(place, "somebody is there"):
            pass
        assert (place / "half/made").is_file()
    assert not place.exists()
    place.mkdir()
    (place / files.MARK).touch()
    (place / "left").touch()  # by one that was killed
    with files.workplace(place, ""):
        assert (place / "left").is_file()
    assert not place.exists()
    for name in ("precious", ".precious"):
        place.mkdir()
        (place / name).touch()
        with pytest.raises(UserError, match="holds other files; move it away"), files.workplace(place, ""):
            pass
        assert [path.name for path in place.iterdir()] == [name]
        place.rename(tmp_path / name)
    (tmp_path / "precious" / files.MARK).touch()
    place.symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="move it away"), files.workplace(place, ""):
        pass
    assert len(list((tmp_path / "precious").iterdir())) == 2


def test_json_of_the_kind_comes_back_as_it_is(tmp_path):
    value = {"splits": {"train": [{"file": "é", "blocks": 3}]}}
    (tmp_path / "m.json").write_text(json.dumps(value))
    assert files.read_json(tmp_path / "m.json", Manifest) == value


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(UserError, match="is not a regular file"):
            files.read_json(path, dict)


def test_a_lock_is_of_one_process(tmp_path):
    code = (
        "import sys; from pathlib import Path; from tinyllama_jax.base import errors, files\n"
        "errors.run_main(lambda argv: files.claim(Path(argv[0]), 'busy', 0) and None)"
    )
    child = [sys.executable, "-c", code, str(tmp_path / "lock")]
    ours = files.claim(tmp_path / "lock", "busy")
    second = subprocess.run(child, capture_output=True, text=True)
    assert (second.returncode, second.stderr) == (2, "error: busy\n")
    os.close(ours)
    assert subprocess.run(child).returncode == 0


def test_what_file_managers_and_nfs_leave_is_not_listed(tmp_path):
    left = [".DS_Store", "._a", ".nfs0000000012", "lost+found", "@eaDir", ".snapshot", "Thumbs.db", "desktop.ini", "Icon\r"]
    for name in left:
        (tmp_path / name).touch()
    assert files.listed(tmp_path) == []
    for name in ("b", "a.partial", "a", "thumbs"):
        (tmp_path / name).touch()
    assert files.listed(tmp_path) == ["a", "a.partial", "b", "thumbs"]


@pytest.mark.parametrize(
    "reads", [metrics.read, blocks.read_manifest, seals.find_step, lambda p: files.check_local("--workdir", p)]
)
def test_a_name_that_is_not_utf8_is_refused_before_a_library_fails_at_it(tmp_path, reads):
    folder = os.fsencode(tmp_path) + b"/run\xff"
    os.mkdir(folder)
    with pytest.raises(UserError, match="udcff: is a name that is not UTF-8; rename") as error:
        reads(os.fsdecode(folder))
    assert "\n" not in str(error.value)


def test_a_message_of_whatever_was_typed_can_be_read():
    assert str(UserError("--x=a\x1b[31m\udcff: é\n  b")) == "--x=a\\x1b[31m\\udcff: é\n  b"  # no escape reaches the terminal
    long = str(UserError("--x=" + "a" * 100_000 + ": must be a number"))
    assert len(long) < 4_100 and long.startswith("--x=aaa") and long.endswith("aaa: must be a number")
    assert errors.disk_error(OSError(2, "", "a\x1bb")) == "a\\x1bb: no such file or folder"
