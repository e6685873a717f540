"""How a command ends: one line for what a person must mend, whatever its output and error are connected to."""

import os
import subprocess
import sys

import pytest

from tinyllama_jax.base import errors

COMMAND = """
import os, sys
from tinyllama_jax.base import errors

def main(argv):
    print("first", flush=True)
    exec(argv[0])

errors.run_main(main)
"""


def run(code, shell='"$@"', **env):
    """(exit code, output, error) of a command that prints a line and then does `code`, as a shell runs it."""
    argv = ["sh", "-c", shell, "sh", sys.executable, "-W", "error", "-c", COMMAND, code]
    done = subprocess.run(argv, capture_output=True, env=os.environ | env, timeout=300)
    return done.returncode, done.stdout.decode("latin-1"), done.stderr.decode("latin-1")


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("raise errors.UserError('mend it')", "error: mend it"),
        ("open('/')", "error: /: is a folder; name a file"),
        ("raise OSError('a library says\\nmore')", "error: a library says"),
        ("raise OSError()", "error: OSError"),
        ("raise OSError(116, 'Stale file handle', 'x')", "error: x: the file server no longer knows it; mount it again"),
        ("raise BrokenPipeError(32, 'Broken pipe')", "error: nobody reads the output any more"),
    ],
)
def test_one_line_and_exit_code_2(code, line):
    status, _, error = run(code)
    assert status == 2 and error.startswith(line) and error.count("\n") == 1, error


@pytest.mark.parametrize("shell", ['"$@" >/dev/full', '{ "$@"; echo $? >&2; } | true'])
def test_output_that_cannot_be_written(shell):
    status, _, error = run("for i in range(100_000): print(i)", shell)
    assert error.startswith("error: ") and error.count("\n") <= 2 and "2" in (str(status), *error.split()), error


def test_closed_output_is_written_nowhere(tmp_path):
    """And no file that is opened later takes its place, to be written into by who prints."""
    code = f"f = open({str(tmp_path / 'x')!r}, 'w'); print('a'); print('b', file=sys.stderr); os.system('echo c; echo d >&2')"
    for shell in ('"$@" >&-', '"$@" >&- 2>&-', '"$@" >&- 2>&- <&-'):
        assert run(code, shell)[0] == 0
        assert (tmp_path / "x").read_text() == ""


def test_characters_that_a_terminal_lacks_are_escaped():
    status, output, _ = run("print('\\u00e9 \\u4e2d \\udc80')", PYTHONIOENCODING="latin-1")
    assert (status, output) == (0, "first\n\xe9 \\u4e2d \\udc80\n")


@pytest.mark.parametrize("platform", ["cuda", "nonsense"])
def test_a_platform_that_is_not_here(platform):
    status, _, error = run("import jax; jax.numpy.ones(3) + 1", JAX_PLATFORMS=platform)
    if status == 0:
        pytest.skip(f"there is {platform} here")
    assert status == 2 and error.startswith(f"error: JAX_PLATFORMS={platform}: ") and error.count("\n") == 1, error


def test_other_errors_are_raised(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x"])
    for error in (RuntimeError("a backend of ours"), AssertionError()):
        with pytest.raises(type(error)):
            errors.run_main(lambda argv, error=error: (_ for _ in ()).throw(error))
