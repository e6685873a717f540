"""Many clients at once, some of which disconnect: no answer is lost or mixed up, and memory does not grow.

python tests/serve_load.py --clients 64 --requests 1000
"""

import argparse
import concurrent.futures
import contextlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "inference")]

import serving  # noqa: E402
from serving import ask, connect, head, until  # noqa: E402

WORDS = "def return if for in x y z = ( ) : 1 2 import json None True the of a".split()  # noqa: SIM905


def prompts(n: int, seed: int) -> list[str]:
    """Texts, some with a common prefix, which the engine reuses."""
    rng = random.Random(seed)
    text = lambda: " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 60)))
    beginnings = [text() for _ in range(5)]
    return [f"{rng.choice(beginnings)} {text()}" if rng.random() < 0.5 else text() for _ in range(n)]


def body(prompt: str, stream: bool) -> dict:
    """Greedy, so that the answer is known."""
    return {"prompt": prompt, "temperature": 0, "max_tokens": 40, "stream": stream}


def one(port: int, prompt: str, seed: int) -> str | None:
    """The text of an answer; None if this client went away half way."""
    rng = random.Random(seed)
    stream, leaves = rng.random() < 0.5, rng.random() < 0.1
    if not leaves:
        while True:
            status, headers, answer = ask(port, "/v1/completions", body(prompt, stream))
            if status == 200:
                break
            assert status == 503 and int(headers["retry-after"]) > 0, (status, answer)
            time.sleep(0.05)
        if not stream:
            return answer["choices"][0]["text"]
        assert b"data: [DONE]" in answer
        parts = [json.loads(line[6:]) for line in answer.decode().split("\n") if line.startswith("data: {")]
        return "".join(part["choices"][0]["text"] for part in parts)
    with contextlib.closing(connect(port)) as connection:
        connection.sendall(head("/v1/completions", json.dumps(body(prompt, stream)).encode()))
        if rng.random() < 0.5 and stream:
            connection.recv(300)
    return None


def load(port: int, expected: dict[str, str], clients: int, requests: int, seed: int) -> int:
    """Asks for `requests` answers from as many threads as there are clients; returns how many clients went away."""
    rng = random.Random(seed)
    asked = [rng.choice(list(expected)) for _ in range(requests)]
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda i: one(port, asked[i], seed * requests + i), range(requests)))
    wrong = [(p, a, expected[p]) for p, a in zip(asked, answers, strict=True) if a not in (None, expected[p])]
    assert not wrong, f"{len(wrong)} answers differ from the answer alone, the first: {wrong[0]}"
    return answers.count(None)


def memory(pid: int) -> float:
    """MiB of a process."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


def main() -> None:
    """Serves a tiny model in a process of its own, and asks each prompt alone first."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clients", type=int, default=64, help="at once (64)")
    parser.add_argument("--requests", type=int, default=1000, help="in all (1000)")
    parser.add_argument("--seed", type=int, default=1, help="of what is asked (1)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        serving.save_tiny(Path(folder))
        line = [sys.executable, "-m", "tinyllama_jax.serve", "--checkpoint", folder, "--port", "0", "--queue", "40"]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        with subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=env) as process:
            try:
                port = next(int(m[1]) for text in process.stderr if (m := re.search(r":(\d+)/v1 is", text)))
                until(lambda: ask(port, "/health")[0] == 200, 300)
                texts = prompts(40, args.seed)
                alone = lambda text: ask(port, "/v1/completions", body(text, False))[2]["choices"][0]["text"]
                expected = {text: alone(text) for text in texts}
                # the first rounds compile, and fill caches
                for _ in range(2):
                    load(port, expected, args.clients, args.requests // 4, args.seed + 1)
                before = memory(process.pid)
                gone = load(port, expected, args.clients, args.requests, args.seed)
                until(lambda: b"serve_requests_running 0\n" in ask(port, "/metrics")[2])
                after = memory(process.pid)
                assert after - before < 32, f"memory grew from {before:.0f} to {after:.0f} MiB"
                print(f"{args.requests} requests of {args.clients} clients, {gone} of which went away: all other answers right")
                print(f"memory {before:.0f} MiB before, {after:.0f} MiB after")
            finally:
                process.terminate()
                process.wait(30)


if __name__ == "__main__":
    main()
