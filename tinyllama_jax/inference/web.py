"""Writes a folder for a static web server, whose page runs the model in the browser, on a phone too, and works offline.

The page is that of `serve`, page.html. Instead of the server, wllama computes the answers: llama.cpp compiled to WebAssembly.
"""

import base64
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import tarfile
import tempfile
import zlib
from importlib import resources
from pathlib import Path

import numpy as np

from tinyllama_jax.base import files
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.base.values import shown
from tinyllama_jax.data import chat
from tinyllama_jax.data.export import gguf_tokenizer
from tinyllama_jax.hub import gguf

VERSION = "3.13.0"
# npm's `dist.integrity` of wllama, and of its program for browsers without memory64 or JSPI, such as Safari
PACKAGES = {
    "wllama": "ZvoRdQAn+E+18EvQ9qS036gudiI9rbZRBJgG/qNICPPwrA0Y6SMMdbziz/j7K/0WxcbJlhaRraVIYsnEy732NA==",
    "wllama-compat": "MSWwyzVXpwkstvIGzOsQ9jlRm8kY5S5J0Gdw4E6M9mXqhgO/5tj+YNfxSoqN1GvsAOwui95JPtwX3hO6VZkbzg==",
}
NPM = " ".join(["npm pack", *(f"@wllama/{name}@{VERSION}" for name in PACKAGES), "--pack-destination"])
# files of each package -> their names in the folder
TAKEN = {
    "wllama": {"esm/index.min.js": "index.min.js", "esm/wasm/wllama.wasm": "wllama.wasm", "LICENCE": "LICENCE"},
    "wllama-compat": {"wasm/wllama.js": "compat.js", "wasm/wllama.wasm": "compat.wasm"},
}
CONTEXT = 1024  # the most tokens of prompt and answer: phones have little memory
START = "// -- where answers come from"  # in page.html: web.js replaces the script from here on


def packages(folder: str | Path | None = None) -> Path:
    """The folder with wllama's packages, checked: `folder`, or one in the user's cache, which npm fills if it is not yet full.

    Raises UserError: a package is missing or is not the one that is known; no npm; no network.
    """
    if folder is not None:
        files.check_local("--wllama", folder)
        for path in map(Path(folder).joinpath, map(_file, PACKAGES)):
            if not path.is_file():
                raise UserError(f"--wllama {folder}: has no {path.name}; make the folder with: {NPM} {folder}")
        _check(Path(folder))
        return Path(folder)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinyllama_jax"
    if all((cache / _file(name)).is_file() for name in PACKAGES):
        _check(cache)
        return cache
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        _npm(scratch)
        _check(Path(scratch))
        for name in PACKAGES:
            os.replace(Path(scratch, _file(name)), cache / _file(name))
    return cache


def _npm(folder: str) -> None:
    """Fetches the packages into `folder` from the registry that npm is configured for."""
    elsewhere = f"where there are both, run: {NPM} DIR; then add --wllama DIR"
    if (npm := shutil.which("npm")) is None:
        raise UserError(f"--format web: needs wllama's files, which npm gets from the network, and no npm is here; {elsewhere}")
    command = [npm, *NPM.split()[1:], folder]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=600)
    except subprocess.TimeoutExpired:
        raise UserError(f"--format web: npm did not get wllama's files within 10 minutes; {elsewhere}") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "notice" not in line]
        raise UserError(
            f"--format web: npm gets no wllama: {shown(' '.join(lines)[:300])}; without network or npm: {elsewhere}"
        )


def _file(name: str) -> str:
    return f"wllama-{name}-{VERSION}.tgz"


def _check(folder: Path) -> None:
    for name, known in PACKAGES.items():
        with files.open_regular(folder / _file(name)) as f:
            digest = base64.b64encode(hashlib.file_digest(f, "sha512").digest()).decode()
        if digest != known:
            remedy = f"remove it; {NPM} DIR gets it again"
            raise UserError(f"{folder / _file(name)}: is not {name} {VERSION}: sha512 {digest}, not {known}; {remedy}")


def write(folder: Path, parts: list[Path], source: Path, wllama: Path) -> None:
    """Writes the page and what it needs into `folder`, below which the model's GGUF files `parts` are.

    `source`: the checkpoint, whose name may tell the chat template. `wllama`: what `packages` returns. Raises UserError.
    """
    (folder / "wllama").mkdir()
    for name, taken in TAKEN.items():
        with tarfile.open(wllama / _file(name)) as archive:
            for member, target in taken.items():
                (folder / "wllama" / target).write_bytes(archive.extractfile(f"package/{member}").read())
    metadata = gguf.read(parts[0]).metadata
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = gguf_tokenizer.from_gguf(metadata, Path(scratch), str(source))
        template = chat.of_folder(source, tokenizer)
    name = str(metadata["general.name"])
    paths = [path.relative_to(folder).as_posix() for path in parts]
    needed = [*paths, *(f"wllama/{target}" for taken in TAKEN.values() for target in taken.values())]
    export = {
        "name": name,
        "chat": template is not None,
        "template": template.source if template else "",
        "stop": list(template.stop) if template else [],
        "context": min(CONTEXT, int(metadata["llama.context_length"])),
        "parts": paths,
        "files": {path: (folder / path).stat().st_size for path in needed},
    }
    whole = "".join([_index(export), _text("web_offline.js"), *map(files.sha256, parts)])
    version = hashlib.sha256(whole.encode()).hexdigest()[:16]
    (folder / "index.html").write_text(_index(export | {"version": version}), encoding="utf-8")
    (folder / "sw.js").write_text(f"const VERSION = {json.dumps(version)};\n{_text('web_offline.js')}", encoding="utf-8")
    sizes = (192, 512)  # of the icons: what Chrome asks for
    for size in sizes:
        (folder / f"icon-{size}.png").write_bytes(_icon(size))
    icons = [{"src": f"icon-{size}.png", "sizes": f"{size}x{size}", "type": "image/png"} for size in sizes]
    manifest = {"name": name, "short_name": name[:12], "start_url": "./", "scope": "./", "display": "standalone"}
    manifest |= {"icons": icons, "theme_color": "#0b57b0", "background_color": "#17181a"}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def _text(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _index(export: dict) -> str:
    """page.html with web.js and `export` in place of the part that asks a server."""
    page = _text("page.html")
    data = json.dumps(export).replace("<", "\\u003c")  # no text of a checkpoint can end the script
    page = page[: page.index(START)] + f"const EXPORT = {data};\n{_text('web.js')}" + page[page.index("</script>") :]
    own = policy(page).replace("script-src", "script-src 'self' 'wasm-unsafe-eval'")
    sources = "default-src 'none'; connect-src 'self' blob:; worker-src 'self' blob:; img-src 'self'; manifest-src 'self'"
    head = f"""<meta http-equiv="Content-Security-Policy" content="{sources}; base-uri 'none'; form-action 'none'{own}">
<link rel="manifest" href="manifest.json">
<link rel="icon" href="icon-192.png">
<link rel="apple-touch-icon" href="icon-192.png">"""
    return page.replace('<link rel="icon" href="data:,">', head)


def policy(page: str) -> str:
    """The part of a Content-Security-Policy by which a page runs its own script and style alone."""
    inner = {name: re.search(f"<{name}>(.*?)</{name}>", page, re.DOTALL)[1] for name in ("script", "style")}
    digest = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return "".join(f"; {name}-src 'sha256-{digest(text)}'" for name, text in inner.items())


def _icon(size: int) -> bytes:
    """A PNG of `size` x `size` pixels: a speech bubble."""
    y, x = (np.mgrid[:size, :size] + 0.5) / size
    bubble = np.hypot(np.maximum(abs(x - 0.5) - 0.2, 0), np.maximum(abs(y - 0.43) - 0.1, 0)) < 0.12
    tail = (x > 0.34) & (y > 0.6) & (y - 0.6 < 0.52 - x)
    dots = np.hypot(abs(abs(x - 0.5) - 0.08) - 0.08, y - 0.43) < 0.045
    pixels = np.where((bubble | tail) & ~dots, 255, 0)[..., None] | np.array([11, 87, 176])
    rows = np.insert(pixels.astype(np.uint8).reshape(size, -1), 0, 0, axis=1).tobytes()  # each row begins with its filter: none
    header = struct.pack(">2I5B", size, size, 8, 2, 0, 0, 0)  # 8 bits a colour, RGB
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(rows, 9), b"IEND": b""}
    made = (struct.pack(">I", len(v)) + k + v + struct.pack(">I", zlib.crc32(k + v)) for k, v in chunks.items())
    return b"\x89PNG\r\n\x1a\n" + b"".join(made)
