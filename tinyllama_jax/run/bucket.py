"""A run folder in an object store: its working copy on this machine, and the thread that uploads it.

With --workdir=s3://BUCKET/RUN (or gs://) a run trains in `Config.folder`, a run folder like any other. A thread of process 0
uploads it: descriptions at once, new lines of metrics every minute and before a checkpoint, and of a checkpoint the seal last.
At the start the working copy is made equal to the bucket; only a checkpoint that it had not uploaded yet is kept.

RUN/metrics.jsonl.parts/N   bytes of metrics.jsonl from N on, since objects cannot be appended to; events.jsonl likewise
RUN/locks/N.json            who trains: see lock.py. All else is as in a local run folder
"""

import concurrent.futures
import contextlib
import json
import os
import re
import secrets
import shutil
import sys
import threading
import time
import typing
from collections.abc import Iterator
from pathlib import Path

from tinyllama_jax.base import files, store
from tinyllama_jax.base.config import Config
from tinyllama_jax.base.errors import UserError, disk_error
from tinyllama_jax.base.files import exists
from tinyllama_jax.run import addresses, cluster, lock, seals
from tinyllama_jax.run.lock import Lock

MINUTE = 60.0  # seconds after which new lines are uploaded without a checkpoint
GIVE_UP = 600.0  # seconds for which uploads may fail before the run ends
PART = 1 << 20  # bytes of a full part of a file of lines; a smaller one is replaced by a longer one
PIECE = 1 << 24  # most bytes of a file of lines in one upload
LINES = ("metrics.jsonl", "events.jsonl")
DESCRIPTIONS = ("config.json", "data.json", "versions.json", "wandb.json", "programs.json", seals.NEWEST)
FOLDERS = ("tokenizer/", "compiled/")  # and set_aside/, which is uploaded and never downloaded
STATE = ".bucket"  # in the working copy: `State`; locked by the process that trains there
_open: "_Bucket | None" = None


class State(typing.TypedDict):
    """What a working copy knows of itself."""

    copy: str  # a random name
    sent: int  # the newest step whose checkpoint it has uploaded
    whole: bool  # false while it is being made equal to the bucket


@contextlib.contextmanager
def opened(config: Config) -> Iterator[list[str]]:
    """Makes the working copy of a run in an object store, and uploads what changes in it until the `with` block ends.

    Does nothing for a local folder, or inside another such block. Yields lines to print. Raises UserError if the bucket cannot
    be used, another process trains there, or the run has processes on several machines.
    """
    global _open
    if "://" not in config.workdir or _open:
        yield _open.notes if _open else []
        return
    index = _process_index(config)
    if index == 0:
        _open = _Bucket(config)
    try:
        if index == 0:
            _open.begin()
        if cluster.several():
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices("bucket")
        yield _open.notes if _open else []
    except BaseException:
        with contextlib.suppress(UserError, OSError):  # the first error is the one to show
            _open and _open.end()
        raise
    else:
        _open and _open.end()
    finally:
        _open = None


def _process_index(config: Config) -> int:
    if not cluster.several():
        return 0
    import jax

    what = f"--workdir={config.workdir}: the working copy of a run in an object store is on one machine, and "
    cure = "; mount the bucket (gcsfuse) or a shared disk on all, and name that folder"
    if not jax.distributed.is_initialized():
        raise UserError(f"{what}`sft` and `dpo` use it from one process{cure}")
    if not addresses.one_machine(jax.process_count()):
        raise UserError(f"{what}this run has {jax.process_count()} processes on several{cure}")
    return jax.process_index()


def push() -> None:
    """Uploads all that is new in the working copy, and waits for it. Raises UserError. Does nothing for a local run."""
    if _open:
        _open.push()


def check() -> None:
    """Raises the error of a failed upload or a lost lock."""
    if _open:
        _open.check()


def holds(step: int, wait: bool) -> bool:
    """Whether the checkpoint of `step` is in the bucket; true for a local run. `wait`: waits until it is. Raises UserError."""
    return _open is None or _open.holds(step, wait)


# -- the copy ---------------------------------------------------------------------------------------------------------------


class _Copy:
    """Downloads and uploads a run folder, and knows what of it is in the bucket. Used by one thread at a time."""

    def __init__(self, config: Config, url: store.Remote, state: State, held: Lock):
        self._config, self._url, self._folder, self._state, self._lock = config, url, config.folder, state, held
        self.steps: set[int] = set()  # of the whole checkpoints in the bucket
        self._fetched: set[str] | None = None  # what was in both places before the first `send`
        self._small: dict[str, tuple[int, int]] = {}  # descriptions in the bucket -> (bytes, time of change) when uploaded
        self._parts: dict[str, list[tuple[int, int]]] = {name: [] for name in LINES}  # (first byte, bytes)

    def fetch(self, objects: dict[str, int], own: bool) -> list[str]:
        """Makes the working copy equal to the bucket, which has `objects`. `own`: this copy was the last one to train."""
        notes, url, folder = [], self._url, self._folder
        checkpoints: dict[int, list[str]] = {}
        for path in objects:
            if match := re.fullmatch(r"checkpoints/(0|[1-9][0-9]{0,17})/.+", path):
                checkpoints.setdefault(int(match[1]), []).append(path)
        self.steps = {step for step, paths in checkpoints.items() if f"checkpoints/{step}/{seals.SEAL}" in paths}
        for step in checkpoints.keys() - self.steps:  # its upload or removal was interrupted
            _each(lambda path: store.remove_object(url / path), checkpoints[step])
        if not (own and self._state["whole"]):
            self._note(whole=False, sent=0)
            for path in folder.iterdir():
                if path.name not in (STATE, "processes"):  # the second is in use: see supervise.py
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        small = [path for path in objects if path in DESCRIPTIONS or path.startswith(FOLDERS)]
        _each(lambda path: store.get(url / path, folder / path), [p for p in small if not exists(folder / p)])
        large = [path for path in objects if path.startswith(("compiled/", "set_aside/")) and exists(folder / path)]
        status = {path: (folder / path).stat() for path in large}  # these never change
        self._small |= {path: (s.st_size, s.st_mtime_ns) for path, s in status.items() if s.st_size == objects[path]}
        for name in LINES:
            self._fetch_lines(name, objects)
        newest = max([self._state["sent"], *self.steps])
        local = {step for step in seals.steps_in(folder) if step in self.steps or step > newest}
        for step in {*seals.steps_in(folder)} - local:
            path = folder / "checkpoints" / str(step)
            if step in seals.expired(sorted({*self.steps, step}), self._config.checkpoint):
                shutil.rmtree(path)
            else:
                notes.append(f"checkpoint {step} is no longer on the bucket, and is now {seals.set_aside(folder, path)}")
        if ahead := local - self.steps:
            what = f"checkpoint {max(ahead)} was not on the bucket yet"
            notes.append(f"{what}: it is taken from the working copy, and uploaded")
        for step in sorted(self.steps | local, reverse=True):  # older ones stay in the bucket
            path = folder / "checkpoints" / str(step)
            reason = seals.unusable(path, self._config)
            if reason and step in self.steps and seals.damage(path):  # not here, or not whole
                self._fetch_checkpoint(path, checkpoints[step])
                reason = seals.unusable(path, self._config)
            if not reason:
                break
        self._fetched = {*small, *(f"checkpoints/{step}" for step in seals.steps_in(folder) if step in self.steps)}
        self._note(whole=True)
        return notes

    def _note(self, **values: int | bool) -> None:
        self._state |= values
        with (self._folder / STATE).open("r+b") as f:  # in place: the file is locked
            f.write(json.dumps(self._state).encode().ljust(100))

    def _fetch_checkpoint(self, path: Path, objects: list[str]) -> None:
        partial = path.with_name(f"{path.name}{seals.PARTIAL}-fetched")
        for old in (partial, path):
            shutil.rmtree(old, ignore_errors=True)
        _each(lambda name: store.get(self._url / name, partial / name.partition("/")[2].partition("/")[2]), objects)
        files.settle(partial)
        partial.rename(path)

    def _fetch_lines(self, name: str, objects: dict[str, int]) -> None:
        """Makes a file of lines from its parts, unless the local file already begins with them."""
        folder, end = f"{name}.parts", 0
        pattern = re.compile(re.escape(folder) + r"/(\d+)")
        parts = sorted((int(match[1]), n) for path, n in objects.items() if (match := pattern.fullmatch(path)))
        for start, n in parts:
            if start != end:
                what = f"the bytes {end:,} to {start:,} are missing"
                raise UserError(f"{self._url / folder}: {what}; restore them from a copy, or remove the parts after them")
            end += n
        self._parts[name], file = parts, self._folder / name
        read = lambda start: store.read(self._url / folder / _part(start))
        if parts and exists(file) and file.stat().st_size >= end:
            with files.open_regular(file) as f:
                f.seek(parts[-1][0])
                if f.read(parts[-1][1]) == read(parts[-1][0]):
                    return
        elif not parts:
            return
        partial = file.with_name(f"{name}.partial")
        with partial.open("wb") as f, concurrent.futures.ThreadPoolExecutor(8) as pool:
            f.writelines(pool.map(read, (start for start, _ in parts)))
        partial.replace(file)

    def send(self) -> None:
        """Uploads what is new. After a kill at any moment, the run in the bucket can be resumed."""
        folder, ready = self._folder, [step for step in seals.steps_in(self._folder) if step not in self.steps]
        self._lock.check()
        small = [path for path in map(folder.joinpath, DESCRIPTIONS) if exists(path) and path.name != seals.NEWEST]
        small += [path for name in ("set_aside/", *FOLDERS) for path in sorted((folder / name).rglob("*")) if path.is_file()]
        self._send_small(small[:1])  # config.json: `begin` refuses a folder that holds others and not this one
        self._send_small(small[1:])
        if self._fetched is not None:
            self._remove_gone()
        for name in LINES:
            self._send_lines(name)
        for step in ready:
            self._send_checkpoint(step)
        self._send_small([folder / seals.NEWEST] if exists(folder / seals.NEWEST) else [])
        for step in seals.expired(sorted(self.steps), self._config.checkpoint):
            self._remove_checkpoint(step)

    def _send_small(self, paths: list[Path]) -> None:
        status = {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}
        name = lambda path: str(path.relative_to(self._folder))
        new = [path for path in paths if self._small.get(name(path)) != status[path] and ".partial" not in path.name]
        _each(lambda path: store.put(path, self._url / name(path), keep=True), new)
        self._small |= {name(path): status[path] for path in new}

    def _remove_gone(self) -> None:
        """Removes from the bucket what `seals.recover` or `seals.start_over` has moved to set_aside/, which is uploaded."""
        for name in self._fetched:
            if not exists(self._folder / name):
                if step := re.fullmatch(r"checkpoints/(\d+)", name):
                    self._remove_checkpoint(int(step[1]))
                else:
                    store.remove_object(self._url / name)
        self._fetched = None

    def _send_lines(self, name: str) -> None:
        """Uploads the whole lines of a file since the last time. Removes parts beyond the end of the file, which was cut."""
        file, parts, place = self._folder / name, self._parts[name], self._url / f"{name}.parts"
        size = file.stat().st_size if exists(file) else 0
        while parts and parts[-1][0] >= size:
            store.remove_object(place / _part(parts[-1][0]))
            parts.pop()
        end = sum(parts[-1]) if parts else 0
        cut = size < end
        while cut or end < size:
            again, cut = parts and (cut or parts[-1][1] < PART), False
            start = parts[-1][0] if again else end
            with files.open_regular(file) as f:
                f.seek(start)
                content = f.read(PIECE)
            content = content[: content.rfind(b"\n") + 1]
            if start + len(content) == end or not content:  # a line that is being written
                return
            store.write(place / _part(start), content)
            parts[-1 if again else len(parts) :] = [(start, len(content))]
            end = start + len(content)

    def _send_checkpoint(self, step: int) -> None:
        path, place = self._folder / "checkpoints" / str(step), self._url / "checkpoints" / str(step)
        names = [str(f.relative_to(path)) for f in path.rglob("*") if f.is_file() and f.name != seals.SEAL]
        _each(lambda name: store.put(path / name, place / name, keep=True), names)
        arrived = store.sizes(place)
        for name in names:
            if arrived.get(name) != (size := (path / name).stat().st_size):
                raise UserError(f"{place}/{name}: has {arrived.get(name, 0):,} bytes of {size:,} after its upload")
        self._lock.check()  # the upload may have taken long
        store.put(path / seals.SEAL, place / seals.SEAL, keep=True)
        self.steps.add(step)
        self._note(sent=max(step, self._state["sent"]))

    def _remove_checkpoint(self, step: int) -> None:
        place = self._url / "checkpoints" / str(step)
        self.steps.discard(step)
        store.remove_object(place / seals.SEAL)  # first: without it the others are not taken for a checkpoint
        _each(lambda name: store.remove_object(place / name), [*store.sizes(place)])


def _part(start: int) -> str:
    return f"{start:015d}"


def _each(do: typing.Callable[[typing.Any], object], items: list) -> None:
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(do, items))


# -- the thread -------------------------------------------------------------------------------------------------------------


class _Bucket:
    """The open bucket of process 0."""

    def __init__(self, config: Config):
        self._config, self._folder, self._url = config, config.folder, store.place(config.workdir, "--workdir")
        self._changed = threading.Condition()
        self._asked = self._done = 0  # how many times `send` was asked for, and how many of these are done
        self._error: Exception | None = None
        self._closing = False
        self._file: int | None = None
        self.notes: list[str] = []  # lines to print
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Takes the lock, and makes the working copy equal to the bucket. Raises UserError."""
        files.make_folder("--workdir", self._config.workdir, self._folder)
        self._file = files.claim(self._folder / STATE, f"{self._config.workdir}: {cluster.BUSY}")
        objects = store.sizes(self._url)
        if not objects and seals.steps_in(self._folder):
            what = f"{self._folder} holds checkpoints of it; send them back with the store's own tool, or remove that folder"
            raise UserError(f"{self._url}: is empty, and its working copy {what}")
        others = [path for path in objects if not path.startswith(("locks/", "."))]  # hidden: see `files.listed`
        if others and "config.json" not in objects:
            raise UserError(f"--workdir={self._url}: holds {others[0]}, and no config.json of a run; name a new folder")
        try:
            state = files.read_json(self._folder / STATE, State)
        except UserError:  # new
            state = State(copy=secrets.token_hex(8), sent=0, whole=False)
        self._lock = Lock(self._url, state["copy"])
        own, notes = self._lock.take()
        self._copy = _Copy(self._config, self._url, state, self._lock)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()
        notes += self._copy.fetch(store.sizes(self._url), own)  # listed again: from here on nobody else writes
        self.notes = [f"the run folder is {self._url}; its working copy on this machine is {self._folder}", *notes]

    def push(self) -> None:
        with self._changed:
            self._asked += 1
            asked = self._asked
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._done >= asked or self._error)
        self.check()

    def holds(self, step: int, wait: bool) -> bool:
        self.check()
        if step not in self._copy.steps:
            if wait:
                self.push()
            elif self._asked == self._done:
                with self._changed:
                    self._asked += 1
                    self._changed.notify_all()
        return step in self._copy.steps

    def check(self) -> None:
        if self._error:
            raise self._error

    def end(self) -> None:
        """Uploads the rest, records in the lock that this process has ended, and unlocks the working copy."""
        try:
            if self._asked and not self._error:  # else the run has not begun
                self.push()
            with self._changed:
                self._closing = True
                self._changed.notify_all()
            if self._thread:
                self._thread.join()
                self._lock.hold(ended=True)
        finally:
            os.close(self._file) if self._file is not None else None

    def _work(self) -> None:
        """Writes heartbeats, and uploads what is new: when asked, and every minute after the first time."""
        well = sent = time.monotonic()
        while not self._closing:
            pause = lock.BEAT / 3
            try:
                self._lock.hold()
                asked = self._asked
                if asked > self._done or (asked and time.monotonic() - sent > MINUTE):
                    with concurrent.futures.ThreadPoolExecutor(1) as pool:  # a checkpoint may take longer than lock.STALE
                        sending = pool.submit(self._copy.send)
                        while concurrent.futures.wait([sending], pause).not_done:
                            self._lock.hold()
                    sending.result()
                    sent, self._done = time.monotonic(), asked
                well = time.monotonic()
            except Exception as error:  # the main thread raises it again
                error = UserError(disk_error(error)) if isinstance(error, OSError) else error
                passes = self._done and isinstance(error, UserError) and not isinstance(error, lock.Taken)
                if not passes or time.monotonic() - well > GIVE_UP:
                    self._error = error
                else:
                    print(f"{error}; tries again", file=sys.stderr, flush=True)
                    time.sleep(pause)
            with self._changed:
                self._changed.notify_all()
                if self._error:
                    return
                self._changed.wait_for(lambda: self._closing or self._asked > self._done, pause)
