"""Serves a model over HTTP: OpenAI's API, and a page to chat with.

python -m tinyllama_jax.serve --checkpoint PATH
"""

import argparse
import contextlib
import ipaddress
import os
import signal
import socket
import sys
from pathlib import Path

from tinyllama_jax.base.errors import UserError, close_stream, run_main
from tinyllama_jax.data import chat
from tinyllama_jax.inference import options
from tinyllama_jax.inference.weights import Loaded


def main(argv: list[str]) -> int:
    """Serves until it is told to stop; returns the exit code."""
    args = _arguments(argv)
    try:
        from tinyllama_jax.inference import listen, server
    except ModuleNotFoundError as error:
        missing = error.name.partition(".")[0]
        if missing not in ("starlette", "uvicorn", "h11"):
            raise
        raise UserError(f"serve needs {missing}, which is not installed: pip install '.[serve]'") from None
    with _listener(args.host, args.port) as listener:  # before the weights are read, which takes longer
        with contextlib.redirect_stdout(sys.stderr):
            loaded, engine = options.load(args, args.slots)
        path = Path(args.checkpoint)
        settings = server.Options(
            name=args.name or path.resolve().name.removesuffix(".gguf"),
            template=_template(path, loaded, args.template),
            slots=args.slots,
            queue=args.queue,
            max_tokens=args.max_tokens or loaded.model.seq_len,
            hosts=tuple(host.lower() for host in (args.host, *args.allow_host)),
            origins=tuple(origin.lower() for origin in args.allow_origin),
        )
        http_server = listen.Server(server.Service(loaded, settings), engine)
        listener.listen(128)
        _introduce(settings, args, loaded, listener.getsockname()[1])
        return _run(http_server, listener)


def _template(path: Path, loaded: Loaded, name: str | None) -> chat.Template | None:
    """The chat template `name`, or without a name the checkpoint's own; None for a base model. Raises UserError."""
    path = path.absolute()  # a published model is known by its folder's name
    return chat.choose(path, loaded.tokenizer, name) if name else chat.of_folder(path, loaded.tokenizer)


def _introduce(settings, args: argparse.Namespace, loaded: Loaded, port: int) -> None:
    template, host = settings.template, args.host
    _note(options.introduced(settings.name, args, loaded))
    _note(f"template {template.name}: {template.why}" if template else "no chat template: a base model, which continues a text")
    _note(f"{settings.slots} requests at once, {settings.queue} may wait; context of {loaded.model.seq_len:,} tokens")
    if not _is_loopback(host):
        _note(f"warning: --host {host}: everybody who reaches this address can use the model; there is no password")
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    _note(f"{url} is a page to chat with; {url}/v1 is the API")


def _run(http_server, listener: socket.socket) -> int:
    """Serves; returns the exit code: 0 after SIGTERM, 130 after Ctrl-C, 1 if the engine failed."""
    signal.signal(signal.SIGTERM, _terminated)
    code = 0
    try:
        http_server.run([listener])  # once it has shut down, uvicorn raises the signal again that stopped it
    except SystemExit:
        pass
    except KeyboardInterrupt:
        code = 130
    worker = http_server.service.worker
    code = 1 if worker.failed else code
    worker.join(timeout=3)
    if worker.is_alive():  # in a step that cannot be interrupted, such as a compilation
        close_stream(sys.stdout)
        close_stream(sys.stderr)
        os._exit(code)
    return code


def _terminated(*_: object) -> None:
    raise SystemExit(0)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listener(host: str, port: int) -> socket.socket:
    """A socket bound to the address. Raises UserError if it cannot be bound."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with contextlib.ExitStack() as if_it_fails:
            listener = if_it_fails.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # else a restart fails for a minute
            listener.bind(address)
            if_it_fails.pop_all()
    except (OSError, UnicodeError, OverflowError) as error:
        what = getattr(error, "strerror", None) or str(error)
        raise UserError(f"--host {host} --port {port}: {what}; choose another address, or --port 0 for a free port") from None
    return listener


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tinyllama_jax.serve", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    options.add_checkpoint(parser)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all, so that other machines can use it (127.0.0.1)")
    add("--port", type=int, default=8000, help="port to listen on; 0: a free one (8000)")
    add("--slots", type=int, default=8, help="requests that run at once; each takes memory for a whole context (8)")
    add("--queue", type=int, default=64, help="most requests that may wait; further ones get status 503 (64)")
    add("--max-tokens", type=int, default=0, help="most tokens of an answer; 0: as many as the context holds (0)")
    add("--name", help="the model's name in the API (the checkpoint's name)")
    add("--template", help=f"the chat template: {', '.join(chat.TEMPLATES)}, or a .jinja file (the checkpoint's own)")
    add(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="answer to this name too; several times for more (none)",
    )
    add(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let pages of this origin use the server, such as https://example.com; *: all pages (none)",
    )
    args = parser.parse_args(argv)
    for name, low, high in (("port", 0, 65_535), ("slots", 1, 1_024), ("queue", 0, 100_000), ("max_tokens", 0, 2**31 - 1)):
        if not low <= (value := getattr(args, name)) <= high:
            raise UserError(f"--{name.replace('_', '-')} {value}: must lie between {low:,} and {high:,}")
    for name in args.allow_host:
        if not name or set(":/*") & set(name):
            raise UserError(f"--allow-host {name}: must be a name alone, without scheme, port and *, such as chat.example.com")
    for origin in args.allow_origin:
        if origin not in ("*", "null") and (origin.count("/") != 2 or "://" not in origin):
            raise UserError(f"--allow-origin {origin}: must be a scheme and a host without a path, such as https://example.com")
    return args


if __name__ == "__main__":
    run_main(main)
