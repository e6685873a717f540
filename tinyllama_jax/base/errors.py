"""Errors that a user can fix, as one line and an exit code: UserError, the operating system's errors, missing devices."""

import contextlib
import errno
import os
import sys
import typing
from collections.abc import Callable

LONGEST = 4_000  # characters of a message; a message that repeats what the user typed could be longer


def readable(text: str) -> str:
    """`text` with control characters escaped, except line ends, and with its middle left out if it is long."""
    text = text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 4 :]}"
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


class UserError(Exception):
    """A mistake that the user must fix before the same command can work: one line, exit code 2, no traceback."""

    code = 2

    def __str__(self) -> str:
        return readable(super().__str__())


_DISK = {
    errno.ENOSPC: "the disk is full; free some room and run the same command again",
    errno.EDQUOT: "the disk quota is used up; free some room and run the same command again",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.EACCES: "permission denied; choose another folder or change its permissions",
    errno.ENOENT: "no such file or folder",
    errno.ENOTDIR: "part of this path is a file, not a folder",
    errno.EEXIST: "is a file; name a folder",
    errno.EPERM: "not permitted; choose another folder",
    errno.ENAMETOOLONG: "is too long a name",
    errno.EIO: "the disk failed to read or write",
    errno.EISDIR: "is a folder; name a file",
    errno.ESTALE: "the file server no longer knows it; mount it again and run the same command again",
    errno.EPIPE: "nobody reads the output any more",
}


def disk_error(error: OSError) -> str:
    """An OSError in one line: where, what, what to do."""
    # the second of two names is the target; the error of a failed write has no name
    where = error.filename2 or error.filename
    what = _DISK.get(error.errno) or error.strerror or (str(error).splitlines() or [type(error).__name__])[0]
    return readable((f"{where}: " if where else "") + what)


def open_streams() -> None:
    """Makes standard output and error writable: closed ones go to /dev/null, characters outside their encoding are escaped."""
    while (file := os.open(os.devnull, os.O_RDWR)) <= 2:  # else the next file opened would become standard output or error
        os.set_inheritable(file, True)
    os.close(file)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        if hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")


def close_stream(stream: typing.TextIO) -> None:
    """Flushes a standard stream. If that fails, redirects it to /dev/null, or Python would fail again at exit."""
    try:
        stream.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):  # ValueError: the stream has no file
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def no_platform(error: Exception) -> str | None:
    """The message if `error` means that JAX has no device of the kind in JAX_PLATFORMS, else None."""
    asked, jax = os.environ.get("JAX_PLATFORMS"), sys.modules.get("jax")
    if not (asked and jax and (isinstance(error, AssertionError) or "backend" in str(error))):
        return None
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as again:
        why = (str(again).splitlines() or ["JAX finds no such device, or its plugin is not installed"])[0]
        return f"JAX_PLATFORMS={asked}: {why.partition(' (set JAX_PLATFORMS')[0]}; unset it, or set it to cpu"
    return None


def run_main(main: Callable[[list[str]], int | None], returns: bool = False) -> None:
    """Runs an entry point and exits. A UserError or a disk error is one line and exit code 2; Ctrl-C is 130.

    `returns`: returns instead of exiting if `main` returns None.
    """
    open_streams()
    code, line = 2, ""
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        code, line = error.code, str(error) and f"error: {error}"  # empty: another process prints the message for all
    except OSError as error:
        line = f"error: {disk_error(error)}"
    except KeyboardInterrupt:
        code, line = 130, "\ninterrupted"
    except (RuntimeError, AssertionError) as error:
        if (line := no_platform(error)) is None:
            raise
        line = f"error: {line}"
    if line:
        with contextlib.suppress(OSError):
            print(line, file=sys.stderr)
    close_stream(sys.stdout)
    close_stream(sys.stderr)
    if not (returns and code is None):
        raise SystemExit(code or 0)
