"""Trains in 2 processes with real checkpoints and injects faults at random moments until the run is done.

    python tests/chaos.py --faults 200 --seed 1 --json FILE
    python tests/chaos.py --faults 30 --workdir s3      # the run folder on a local stand-in for S3 (or gs), killed with -9

After each fault the same command is run again. In the end every loss, gradient norm and batch checksum must equal those of an
undisturbed run bit for bit. Prints a table of faults by kind; exit code 1 if anything was wrong. Some faults need root: a small
file system to fill, two network namespaces joined by a cable to cut. Without root they are left out, with a line.
"""

import argparse
import collections
import contextlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import stand_ins
from array_record.python import array_record_module
from cluster import Cluster, signal_to
from tiny import make_tiny_data

from tinyllama_jax.base.store import working_copy

WAIT = 20  # --train.wait: six of it for starting, which a busy machine may need
BUSY = 600  # seconds more in which every process has to end
EXACT = ("step", "loss", "grad_norm", "checksum", "lr", "skipped")
KINDS = {
    "kill -9 of one process": "kill_one",
    "kill -9 of one process during a save": "kill_one_saving",
    "kill -9 of all processes": "kill_all",
    "kill -9 of all processes during a save": "kill_all_saving",
    "loss of a host": "kill_host",
    "SIGTERM to one process": "preempt_one",
    "SIGTERM to all processes": "preempt_all",
    "a bit flipped in the newest checkpoint": "flip",
    "newest checkpoint truncated": "truncate",
    "data shard damaged": "damage_data",
    "process stopped": "hang",
    "SIGHUP to one process": "hang_up",
    "SIGUSR1 to all processes": "warn_all",
    "checkpoints gone": "lose_checkpoints",
    "stray files": "stray_files",
    "write error in a save": "fail_a_save",
    "data shard swapped for one of its size": "swap_data",
    "not finite for good": "poison",
    "kill -9 of all processes while a checkpoint is sent": "kill_all_sending",
    "loss of the machine with its disk": "lose_disk",
    "loss of the machine with its disk while a checkpoint is sent": "lose_disk_sending",
    "disk full": "fill_disk",
    "network cut": "cut_network",
}


ON_A_BUCKET = ("kill_", "lose_disk")  # the faults that are tried with the run folder in an object store
NEED_A_BUCKET = ("kill_all_sending", "lose_disk", "lose_disk_sending")


class Wrong(Exception):
    """The run did not behave as it should."""


class Chaos:
    def __init__(self, folder, seed, steps, devices, store=None):
        """`store`: s3 or gs, for a run folder in a stand-in for that object store."""
        self.rng, self.folder, self.steps, self.devices = random.Random(seed), Path(folder), steps, devices
        (self.folder / "data").mkdir()
        self.data = make_tiny_data(self.folder / "data")
        self.disk, self.cable = self.folder / "disk", None
        self.disk.mkdir()
        self.small = not root("mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(self.disk))
        self.url = self.run = self.disk / "run"
        self.end_servers = contextlib.ExitStack()
        self.nonfinite = ",".join(map(str, sorted(self.rng.sample(range(2, steps), max(2, steps // 100)))))
        self.recomputed = collections.Counter()
        if store:
            self.use(store)
        else:
            self.lay_cable()

    def use(self, store):
        os.environ |= self.end_servers.enter_context(stand_ins.servers())
        os.environ |= {"XDG_CACHE_HOME": str(self.disk), "CHAOS_STALE": "4"}
        self.url = f"{store}://bucket/run"
        self.run = working_copy(self.url)

    def lay_cable(self):
        """Two hosts on this machine: namespaces with an address each and a veth pair between them."""
        a, b = names = [f"chaos{os.getpid()}{x}" for x in "ab"]
        commands = [["netns", "add", a], ["netns", "add", b], ["link", "add", a, "type", "veth", "peer", "name", b]]
        for name, address in zip(names, ("10.77.0.1/24", "10.77.0.2/24"), strict=True):
            inside = ["-n", name]
            commands += [["link", "set", name, "netns", name], [*inside, "addr", "add", address, "dev", name]]
            commands += [[*inside, "link", "set", name, "up"], [*inside, "link", "set", "lo", "up"]]
        try:
            for name, address in zip(names, ("10.77.0.1", "10.77.0.2"), strict=True):
                hosts = Path("/etc/netns") / name / "hosts"  # what the namespace sees as /etc/hosts
                hosts.parent.mkdir(parents=True)
                hosts.write_text(f"127.0.0.1 localhost\n{address} {name}\n")
        except OSError:
            return
        if not any(root("ip", *command) for command in commands) and not root("unshare", "-u", "true"):
            self.cable = names

    def close(self):
        self.end_servers.close()
        for name in self.cable or ():
            root("ip", "netns", "del", name)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)
        if self.small:
            root("umount", "-l", str(self.disk))

    def start(self, workdir=None, nan_from=2**31 - 1):
        """The command, in 2 processes; every loss from the step `nan_from` on is NaN."""
        keys = {
            "train__steps": self.steps,
            "train__give_up": 8,
            "train__wait": WAIT,
            "log__eval_every": 1_000_000,
            "train__seqs_per_device": 2,
        }
        if self.cable:
            named = ("unshare", "-u", "sh", "-c", 'hostname "$0"; exec "$@"')
            keys |= {"prefix": lambda i: ("ip", "netns", "exec", self.cable[i], *named, self.cable[i]), "address": "10.77.0.1"}
        os.environ |= {
            "CHAOS_NONFINITE": self.nonfinite,
            "CHAOS_NONFINITE_FROM": str(nan_from),
            "CHAOS_WRITE_ERROR": str(self.folder / "write error"),
            "PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{Path(__file__).parents[1]}",
        }
        workdir = workdir or self.url
        return Cluster(
            self.data / "tiny.py", workdir, 2, self.devices, module="chaos_train", out=self.folder, checkpoint__keep=4, **keys
        )

    # -- moments ------------------------------------------------------------------------------------------------------

    def some_time(self, cluster):
        """Waits for a random moment: while it starts, or some steps on."""
        before = cluster.steps()
        if self.rng.random() < 0.3:
            time.sleep(self.rng.uniform(0, 8))
        else:
            cluster.until(before + self.rng.randint(1, 12))
            time.sleep(self.rng.uniform(0, 0.2))

    def a_save(self, cluster):
        """Waits until a checkpoint is half written."""
        partial = lambda: {*(self.run / "checkpoints").glob("*.orbax-checkpoint-tmp*")}
        before, deadline = partial(), time.monotonic() + BUSY  # before: left by an earlier fault
        while time.monotonic() < deadline and all(p.poll() is None for p in cluster.processes):
            if partial() - before:
                time.sleep(self.rng.uniform(0, 0.05))
                return

    # -- faults: each ends with no process left ---------------------------------------------------------------------------

    def ended(self, cluster, *allowed, words=None):
        """Waits until all have ended; raises unless their exit codes are among `allowed` and one of them said `words`."""
        started = time.monotonic()
        codes = cluster.wait(WAIT * 6 + BUSY)
        output = "\n".join(cluster.output(i) for i in range(2))
        if not set(codes) <= {0, *allowed}:
            raise Wrong(f"exit codes {codes} after {time.monotonic() - started:.0f} s:\n{shown(output)}")
        if words and words not in output and codes != [0, 0]:
            raise Wrong(f"nobody said {words!r}:\n{shown(output)}")

    def kill_one(self, cluster, moment=None):
        (moment or self.some_time)(cluster)
        who = self.rng.randrange(2)
        if pid := cluster.child(who):
            signal_to(pid, signal.SIGKILL)
        self.ended(cluster, 75, 137, words=f"process {who}" if pid else None)

    def kill_one_saving(self, cluster):
        self.kill_one(cluster, self.a_save)

    def kill_all(self, cluster, moment=None):
        (moment or self.some_time)(cluster)
        cluster.kill()
        self.ended(cluster, -9)

    def kill_all_saving(self, cluster):
        self.kill_all(cluster, self.a_save)

    def a_sending(self, cluster):
        """Waits until a checkpoint is whole here, and is being sent to the bucket."""
        before, deadline = self.checkpoints(), time.monotonic() + BUSY
        while time.monotonic() < deadline and all(p.poll() is None for p in cluster.processes):
            if not set(self.checkpoints()) <= set(before):
                time.sleep(self.rng.uniform(0, 0.5))
                return
            time.sleep(0.01)

    def kill_all_sending(self, cluster):
        self.kill_all(cluster, self.a_sending)

    def lose_disk(self, cluster, moment=None):
        self.kill_all(cluster, moment)
        reached = cluster.steps()
        shutil.rmtree(self.run, ignore_errors=True)
        seals = stand_ins.names(f"{self.url}/checkpoints/*/seal.json")
        kind = {method: kind for kind, method in KINDS.items()}["lose_disk_sending" if moment else "lose_disk"]
        self.recomputed[kind] += reached - max((int(name.split("/")[-2]) for name in seals), default=0)

    def lose_disk_sending(self, cluster):
        self.lose_disk(cluster, self.a_sending)

    def kill_host(self, cluster):
        self.some_time(cluster)
        who = self.rng.randrange(2)
        for pid in (cluster.child(who), cluster.processes[who].pid):
            signal_to(pid, signal.SIGKILL) if pid else None
        self.ended(cluster, 75, -9)

    def preempt_one(self, cluster, who=None, number=signal.SIGTERM):
        self.some_time(cluster)
        running = cluster.steps()
        for i in [self.rng.randrange(2)] if who is None else who:
            with contextlib.suppress(ProcessLookupError):
                cluster.processes[i].send_signal(number)
        self.ended(cluster, 128 + number, 75, -number)
        if running and f"stopped by {number.name}" in cluster.output(0):
            saved = max(self.checkpoints())
            if saved != cluster.steps():
                raise Wrong(f"stopped at step {cluster.steps()}, and saved {saved}")

    def preempt_all(self, cluster):
        self.preempt_one(cluster, (0, 1))

    def hang_up(self, cluster):
        self.preempt_one(cluster, number=signal.SIGHUP)

    def warn_all(self, cluster):
        self.preempt_one(cluster, (0, 1), signal.SIGUSR1)

    def checkpoints(self):
        """The steps of the checkpoints that are there, in order."""
        names = (p.name for p in (self.run / "checkpoints").glob("*") if (p / "seal.json").is_file())
        return sorted(int(name) for name in names if name.isdecimal())

    def lose_checkpoints(self, cluster):
        """A disk that is not mounted: the run is refused, and keeps all it has."""
        if self.with_checkpoints(cluster) is None:
            raise Wrong(f"no two checkpoints came:\n{cluster.output(0)}")
        metrics = (self.run / "metrics.jsonl").read_bytes()
        shutil.move(self.run / "checkpoints", self.folder / "gone")
        try:
            self.ended(self.start(), 2, words=str(self.run))
        finally:
            shutil.rmtree(self.run / "checkpoints", ignore_errors=True)
            shutil.move(self.folder / "gone", self.run / "checkpoints")
        if (self.run / "metrics.jsonl").read_bytes() != metrics:
            raise Wrong("without its checkpoints the run changed its metrics")

    def stray_files(self, cluster):
        """Files of people, file managers and NFS are left alone, and no checkpoint is taken for damaged."""
        newest = self.with_checkpoints(cluster)
        if newest is None:
            raise Wrong(f"no two checkpoints came:\n{cluster.output(0)}")
        folder, last = newest.parent, int(newest.name)
        strays = [folder / str(last + 3), folder / f"00{last + 1}", folder / "²", folder / f"{last}.old", newest / "@eaDir"]
        for stray in strays:
            stray.mkdir(exist_ok=True)
        for stray in (
            folder / str(last + 4),
            folder / ".DS_Store",
            newest / "params" / ".nfs000000001",
            self.run / "Thumbs.db",
        ):
            stray.write_bytes(b"left by others")
        again = self.start()
        again.until(max(again.steps(), last) + 1)
        again.kill()
        again.wait()
        if f"weights: step {last:,} of" not in again.output(0):
            raise Wrong(f"checkpoint {last} is whole, and was not gone on from:\n{shown(again.output(0))}")

    def fail_a_save(self, cluster):
        """The disk fails while a checkpoint is being sealed: see chaos_train.py."""
        self.some_time(cluster)
        switch = self.folder / "write error"
        before = self.checkpoints()
        switch.touch()
        try:
            self.ended(cluster, 2, 75, words="the disk failed to read or write")
        finally:
            switch.unlink()
        if before and not set(self.checkpoints()) & set(before[-1:]):
            raise Wrong(f"checkpoint {before[-1]} went with the save that failed")

    def swap_data(self, cluster):
        """The same blocks in another order, which no checksum of a record can tell."""
        self.with_checkpoints(cluster)
        file = next((self.data / self.rng.choice("ab")).glob("blocks-train.array_record-*"))
        whole = file.read_bytes()
        reader = array_record_module.ArrayRecordReader(str(file))
        records = reader.read_all()
        reader.close()
        while file.read_bytes() == whole or file.stat().st_size != len(whole):
            self.rng.shuffle(records)
            writer = array_record_module.ArrayRecordWriter(str(file), "group_size:1")
            for record in records:
                writer.write(record)
            writer.close()
        try:
            self.ended(self.start(), 2, words=str(file.parent))
        finally:
            file.write_bytes(whole)

    def poison(self, cluster):
        """Every loss is NaN from some moment on; a person then goes back to the checkpoint before it."""
        if self.with_checkpoints(cluster) is None:
            raise Wrong(f"no two checkpoints came:\n{cluster.output(0)}")
        first = cluster.steps() + self.rng.randint(1, 6)
        self.ended(self.start(nan_from=first), 3, words="were skipped as not finite")
        for step in self.checkpoints():
            if step >= first:
                shutil.rmtree(self.run / "checkpoints" / str(step))

    def with_checkpoints(self, cluster):
        """Waits until there are two checkpoints to choose from, and ends the cluster; returns the newest."""
        deadline = time.monotonic() + BUSY
        while len(self.checkpoints()) < 2 and time.monotonic() < deadline and cluster.processes[0].poll() is None:
            time.sleep(0.05)
        self.some_time(cluster)
        cluster.kill()
        cluster.wait()
        return self.run / "checkpoints" / str(self.checkpoints()[-1]) if len(self.checkpoints()) > 1 else None

    def damage_checkpoint(self, cluster, how):
        newest = self.with_checkpoints(cluster)
        if newest is None:
            raise Wrong(f"no two checkpoints came:\n{cluster.output(0)}")
        files = [f for f in newest.rglob("*") if f.is_file() and f.stat().st_size]
        file = self.rng.choices(files, [f.stat().st_size for f in files])[0]
        if file.name in ("_CHECKPOINT_METADATA", "commit_success.txt"):  # see UNSEALED in checkpoint.py
            file = newest / "seal.json"
        content = bytearray(file.read_bytes())
        if how == "flip":
            content[self.rng.randrange(len(content))] ^= 1 << self.rng.randrange(8)
        else:
            del content[self.rng.randrange(len(content)) :]
        file.write_bytes(content)
        again = self.start()
        again.until(again.steps() + 1)
        resumed = "weights: " in again.output(0)
        again.kill()
        again.wait()
        if not resumed or f"checkpoint {newest.name} is not used" not in again.output(0):
            raise Wrong(f"{file} was damaged, and nobody said so:\n{again.output(0)}")

    def flip(self, cluster):
        self.damage_checkpoint(cluster, "flip")

    def truncate(self, cluster):
        self.damage_checkpoint(cluster, "truncate")

    def damage_data(self, cluster):
        cluster.kill()
        cluster.wait()
        file = next((self.data / self.rng.choice("ab")).glob("blocks-train.array_record-*"))
        whole = file.read_bytes()
        bad = bytearray(whole)
        for _ in range(200):
            bad[self.rng.randrange(len(bad) // 10, len(bad) * 9 // 10)] ^= 0x55
        file.write_bytes(bad)
        try:
            again = self.start()
            self.ended(again, 2, 75, words=f"{file}, record ")
        finally:
            file.write_bytes(whole)

    def hang(self, cluster):
        self.some_time(cluster)
        who = self.rng.randrange(2)
        pid = cluster.child(who)
        signal_to(pid, signal.SIGSTOP) if pid else None
        self.ended(cluster, 75, 137)

    def fill_disk(self, cluster):
        self.some_time(cluster)
        free = shutil.disk_usage(self.disk).free
        ballast = self.disk / "ballast"
        try:
            with ballast.open("wb", buffering=0) as f, contextlib.suppress(OSError):
                for _ in range(free // 4096 - self.rng.randrange(200)):
                    f.write(bytes(4096))
            self.ended(cluster, 2, 75, words="the disk is full")
        finally:
            ballast.unlink()

    def cut_network(self, cluster):
        self.some_time(cluster)
        name = self.cable[1]
        root("ip", "-n", name, "link", "set", name, "down")
        try:
            self.ended(cluster, 75, 137)
        finally:
            root("ip", "-n", name, "link", "set", name, "up")

    # -- the whole ------------------------------------------------------------------------------------------------------

    def possible(self):
        on_bucket = self.url != self.run
        out = {kind: m for kind, m in KINDS.items() if (m.startswith(ON_A_BUCKET) if on_bucket else m not in NEED_A_BUCKET)}
        if on_bucket:
            return out
        for kind, there, why in (
            ("disk full", self.small, "needs leave to mount a file system"),
            ("network cut", self.cable, "needs leave to make network namespaces"),
        ):
            if not there:
                print(f"left out: {kind}: {why}")
                del out[kind]
        return out

    def faults(self, n, only=None):
        """Does `n` of them; returns the number of each kind."""
        kinds, done = [(k, m) for k, m in self.possible().items() if only in (None, k)], collections.Counter()
        self.rng.shuffle(kinds)
        for i in range(n):
            kind, method = kinds[i % len(kinds)] if i < len(kinds) else self.rng.choice(kinds)
            cluster = self.start()
            before = cluster.steps()
            if before >= self.steps:
                cluster.kill()
                print("the run is done: no more faults")
                break
            started = time.monotonic()
            try:
                getattr(self, method)(cluster)
            finally:
                cluster.kill()
            reached = cluster.steps()
            lost = max(reached - max(self.checkpoints(), default=0), 0)
            done[kind] += 1
            self.recomputed[kind] += lost
            print(
                f"{i + 1}/{n}: {kind}: step {before} to {reached}, {lost} to do again, {time.monotonic() - started:.0f} s",
                flush=True,
            )
        return done

    def finish(self, workdir):
        cluster = self.start(workdir)
        if cluster.wait(1_200) != [0, 0]:
            raise Wrong(f"the run did not end well:\n{cluster.output(0)}\n{cluster.output(1)}")
        if workdir == self.url != self.run:  # the bucket alone holds all of it
            shutil.rmtree(self.run)
            if (again := self.start(workdir)).wait(1_200) != [0, 0]:
                raise Wrong(f"the bucket cannot be read again:\n{again.output(0)}\n{again.output(1)}")
        lines = [json.loads(line) for line in (working_copy(str(workdir)) / "metrics.jsonl").read_text().splitlines()]
        return [[line[name] for name in EXACT] for line in lines if "checksum" in line]


def shown(output):
    """Of what processes printed the end, and the errors before."""
    lines = output.splitlines()
    return "\n".join([*(line for line in lines if "Error" in line and "loop is closed" not in line), "...", *lines[-60:]])


def root(*command):
    """Runs a command that may not be allowed; returns its exit code."""
    try:
        return subprocess.run(command, capture_output=True).returncode
    except FileNotFoundError:
        return 127


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--devices", type=int, default=2, help="virtual devices a process")
    parser.add_argument("--only", help="one kind of fault")
    parser.add_argument("--workdir", choices=("s3", "gs"), help="the run folder is in a stand-in for this object store")
    parser.add_argument("--json", help="adds the result to this file's list")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it, and so would the processes of the run
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        chaos = Chaos(folder, args.seed, 20 * args.faults + 40, args.devices, args.workdir)
        try:
            quiet = chaos.finish(Path(folder) / "quiet")
            done = chaos.faults(args.faults, args.only)
            ours = chaos.finish(chaos.url)
        finally:
            chaos.close()
    differing = sum(a != b for a, b in zip(ours, quiet, strict=True))
    result = {
        "seed": args.seed,
        "workdir": args.workdir or "local",
        "steps": len(quiet),
        "steps_not_finite": sum(1 for line in quiet if line[1] is None),
        "faults": dict(done),
        "steps_recomputed": dict(chaos.recomputed),
        "steps_differing": differing,
        "seconds": round(time.monotonic() - started),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }
    print("\n| fault | injected | survived | steps done again |\n|---|---|---|---|")
    for kind, n in done.items():
        print(f"| {kind} | {n} | {n} | {chaos.recomputed[kind]} |")
    print(f"| all | {sum(done.values())} | {sum(done.values())} | {sum(chaos.recomputed.values())} |")
    print(f"{len(quiet)} steps, {result['steps_not_finite']} of them not finite; {differing} differ; {result['seconds']} s")
    if args.json:
        file = Path(args.json)
        everything = json.loads(file.read_text()) if file.is_file() else []
        file.write_text(json.dumps([*everything, result], indent=1) + "\n")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
