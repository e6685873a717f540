"""A tiny chat model, a server for it in a thread of this process, and clients that use bare sockets."""

import contextlib
import functools
import inspect
import json
import json.decoder
import socket
import tempfile
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tiny import train_tokenizer

from tinyllama_jax.base import config as c
from tinyllama_jax.base import dims, sharding
from tinyllama_jax.core import model as model_lib
from tinyllama_jax.data import chat
from tinyllama_jax.data import tokenizer as tokenizer_lib
from tinyllama_jax.data.export import tokenizer as export_tokenizer
from tinyllama_jax.hub import llama
from tinyllama_jax.inference import listen, server, weights
from tinyllama_jax.inference.engine import Engine, Request
from tinyllama_jax.inference.sampling import Sampling

MODEL = c.Model(2, 24, 6, 2, 40, 420, 512, precision="params=float32,compute=float32,output=float32", residual="float32")


@functools.cache
def tiny_params(model: c.Model) -> dict:
    """Random parameters of a model whose text does not repeat itself."""
    rng = np.random.default_rng(3)
    arrays = {p.name: rng.normal(p.kind == "norm", 0.7, dims.shape(p, model)) for p in dims.PARAMETERS}
    return model_lib.unflatten({name: jnp.asarray(a, jnp.float32) for name, a in arrays.items()})


def load_tiny(folder: Path) -> weights.Loaded:
    """The tiny model on one device, with a tokenizer of 420 pieces written into `folder`."""
    tokenizer = tokenizer_lib.load(train_tokenizer(folder / "tokenizer.model", [inspect.getsource(json.decoder)], 420))
    mesh = sharding.make_mesh(c.Mesh(1, 1, 1), jax.devices()[:1])
    return weights.Loaded(weights.of_params(tiny_params(MODEL), MODEL, mesh), MODEL, tokenizer, True, folder, mesh)


def save_tiny(folder: Path, model: Path | None = None) -> None:
    """Writes the tiny model as a Hugging Face folder. `model`: its tokenizer's file."""
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = model or load_tiny(Path(scratch)).tokenizer.path
        export_tokenizer.write(tokenizer, folder, add_bos=True, seq_len=MODEL.seq_len)
    llama.save_folder(tiny_params(MODEL), MODEL, folder, "float32", 1, 2)


class Recorded(Engine):
    """An engine that remembers its requests."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.requests: list[Request] = []

    def submit(self, request: Request) -> None:
        super().submit(request)
        self.requests.append(request)


class Running:
    """A server in a thread."""

    def __init__(self, loaded: weights.Loaded, engine: Engine, **options):
        how = {"name": "tiny", "template": chat.TEMPLATES["zephyr"], "slots": 4, "queue": 12, "max_tokens": 500} | options
        self.loaded, self.engine = loaded, engine
        self.service = server.Service(loaded, server.Options(**how))
        self.server = listen.Server(self.service, engine)
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self.server.run, args=[[listener]], daemon=True)
        self._thread.start()
        until(lambda: self.service.state == "ready", 120)

    def stop(self) -> None:
        """Stops the server, as a signal would."""
        self.server.should_exit = True
        self._thread.join(30)
        self.service.worker.join(30)
        assert not self._thread.is_alive() and not self.service.worker.is_alive()

    def alone(self, prompt: list[int], n: int, **options) -> list[int]:
        """The most likely tokens, from an engine of its own without any other request."""
        stream = Engine(self.loaded).stream(Request(prompt, n, Sampling(0.0), **options))
        return [token for new in stream for token in new]


def until(true, seconds: float = 30.0):
    """Waits until `true()` gives a true value, and returns it; fails after `seconds`."""
    end = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)
    return value


def connect(port: int) -> socket.socket:
    """A connection to the server."""
    return socket.create_connection(("127.0.0.1", port), timeout=60)


def head(path: str, body: bytes = b"", method: str = "", **headers: str) -> bytes:
    """A request as bytes."""
    fields = {"Host": "localhost", "Content-Length": str(len(body)), **{k.replace("_", "-"): v for k, v in headers.items()}}
    lines = [
        f"{method or ('POST' if body else 'GET')} {path} HTTP/1.1",
        *(f"{k}: {v}" for k, v in fields.items() if v is not None),
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def read(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, body) of one response that ends when the connection does or has a length."""
    data = b""
    while b"\r\n\r\n" not in data:
        if not (more := connection.recv(65_536)):
            return 0, {}, data
        data += more
    top, _, body = data.partition(b"\r\n\r\n")
    first, *lines = top.decode("latin-1").split("\r\n")
    headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines)}
    length = 0 if " 204 " in first else int(headers.get("content-length", 1 << 60))
    while len(body) < length and not body.endswith(b"0\r\n\r\n"):
        if not (more := connection.recv(65_536)):
            break
        body += more
    return int(first.split()[1]), headers, body


def ask(port: int, path: str, body: object = None, **headers: str) -> tuple[int, dict[str, str], object]:
    """(status, headers, decoded body) of a request. `body`: bytes, or what becomes JSON."""
    raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    with contextlib.closing(connect(port)) as connection:
        connection.sendall(head(path, raw, **headers))
        status, headers, answer = read(connection)
    return status, headers, json.loads(answer) if headers.get("content-type") == "application/json" else answer


def events(body: bytes) -> list[dict]:
    """The events of a stream that was not cut into chunks at odd places."""
    lines = [line for line in body.decode().split("\n") if line.startswith("data: {")]
    return [json.loads(line[6:]) for line in lines]
