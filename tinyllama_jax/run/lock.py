"""The lock of a run folder in an object store: RUN/locks/N.json, created only if it does not exist; the highest N counts."""

import json
import os
import re
import socket
import sys
import time
import typing

from tinyllama_jax.base import files, store
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.run.cluster import BUSY

BEAT = 30.0  # seconds between two heartbeats
STALE = 120.0  # seconds without a heartbeat after which another machine takes over


class Holder(typing.TypedDict):
    """The process that trains, or the last one that did."""

    host: str
    pid: int
    copy: str  # the name of its working copy: see bucket.py
    time: float  # of its last heartbeat, seconds since 1970
    ended: bool


class Taken(UserError):
    """Another process trains in the folder now."""


class Lock:
    """The lock of one process. It may train as long as its lock has the highest number."""

    def __init__(self, url: store.Remote, copy: str):
        self._folder, self._copy, self._number, self._beat = url / "locks", copy, 0, 0.0
        self._busy = f"{url}: {BUSY}"

    def take(self) -> tuple[bool, list[str]]:
        """Takes the lock. Returns (whether this working copy was the last to train, lines to print). Raises UserError."""
        begun, first = time.monotonic(), None
        while True:
            number, last = self._newest()
            own = last is not None and last["copy"] == self._copy
            if last is None or own or last["ended"] or time.time() - last["time"] > STALE or time.monotonic() - begun > STALE:
                break
            if first and last != first:
                raise UserError(f"{self._busy} ({last['host']}, pid {last['pid']})")
            if first is None:
                who = f"{last['host']}, pid {last['pid']}, which has not reported its end"
                print(f"waits up to {STALE:g} s for a heartbeat of {who}", file=sys.stderr, flush=True)
            first = last
            time.sleep(min(BEAT / 3, 5))
        self._number, text = number + 1, self._text()
        if not store.create(self._file(), text):
            raise UserError(self._busy)
        notes = []
        if store.create(self._file(), text + "\n"):  # it exists
            what = "the store overwrites an object that must not exist (no conditional writes)"
            notes.append(f"{self._folder}: {what}: of two runs started within a second both may train; start only one")
        for old in store.names(self._folder) - {self._file().name}:
            store.remove_object(self._folder / old)
        return own, notes

    def hold(self, ended: bool = False) -> None:
        """Writes a heartbeat if it is time, or that this process `ended`. Raises UserError if another one took over."""
        if time.monotonic() - self._beat < BEAT and not ended:
            return
        self.check()
        store.write(self._file(), self._text(ended))
        self._beat = time.monotonic()

    def check(self) -> None:
        """Raises UserError if another process took over."""
        number, last = self._newest()
        if number != self._number or last is None or (last["copy"], last["pid"]) != (self._copy, os.getpid()):
            who = f"{last['host']}, pid {last['pid']}, has" if last else "somebody has removed its lock, or"
            raise Taken(f"{self._folder}: {who} taken over this run; this process ends")

    def _newest(self) -> tuple[int, Holder | None]:
        numbers = [int(name[:-5]) for name in store.names(self._folder) if re.fullmatch(r"[0-9]{1,9}\.json", name)]
        if not numbers:
            return 0, None
        file = self._folder / f"{max(numbers)}.json"
        try:
            return max(numbers), files.decode_json(store.read(file), Holder)
        except FileNotFoundError:  # a process that took over has just removed it
            return self._newest()
        except ValueError as error:
            raise UserError(f"{file}: is damaged ({error}); remove it if no process trains there") from None

    def _file(self) -> store.Remote:
        return self._folder / f"{self._number}.json"

    def _text(self, ended: bool = False) -> str:
        return json.dumps(Holder(host=socket.gethostname(), pid=os.getpid(), copy=self._copy, time=time.time(), ended=ended))
