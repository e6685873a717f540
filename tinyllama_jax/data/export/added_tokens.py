"""Adds control tokens to a tokenizer, such as ChatML's <|im_start|> and <|im_end|> to Llama's."""

import json
from pathlib import Path

from tinyllama_jax.base.errors import UserError
from tinyllama_jax.base.files import read_json
from tinyllama_jax.data import control
from tinyllama_jax.data import tokenizer as tokenizer_lib
from tinyllama_jax.data.export import gguf_tokenizer
from tinyllama_jax.data.export.tokenizer import CONTROL
from tinyllama_jax.data.tokenizer import SentencePieceTokenizer, Tokenizer


def extended(tokenizer: Tokenizer, added: str, folder: Path) -> Tokenizer:
    """`tokenizer` with the control tokens of `added`, "TOKEN,TOKEN", that it lacks; written into the new `folder`.

    They get the ids from `vocab_size` up. Without a new token: `tokenizer` itself. Raises UserError for a text that is a plain
    piece already.
    """
    names = [name for name in dict.fromkeys(added.split(",")) if name and name not in control.tokens(tokenizer)]
    if plain := set(names) & set(tokenizer.pieces()):
        raise UserError(f"--model.added_tokens={added}: {min(plain)} is a plain piece of {tokenizer.path}; name another text")
    if any(name.split() != [name] for name in names):
        raise UserError(f"--model.added_tokens={added}: a token has no white space; separate tokens by a comma alone")
    if not names:
        return tokenizer
    tokenizer.copy(folder)
    tokens = list(enumerate(names, tokenizer.vocab_size))
    others = {"tokenizer.model", "tokenizer.json", "added_tokens.json", "vocab.json", "merges.txt"} - {tokenizer.name}
    for name in others:  # they lack the tokens
        (folder / name).unlink(missing_ok=True)
    path = folder / tokenizer.name
    if isinstance(tokenizer, SentencePieceTokenizer):  # a repeated field of a protobuf message goes on at its end
        pieces = [gguf_tokenizer._message({1: gguf_tokenizer._message({1: name, 2: 0.0, 3: CONTROL})}) for name in names]
        path.write_bytes(path.read_bytes() + b"".join(pieces))
    else:
        content = read_json(path, dict)
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        content["added_tokens"] = [
            *content.get("added_tokens", ()),
            *({"id": i, "content": name, **flags} for i, name in tokens),
        ]
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    out = tokenizer_lib.load(folder)
    if [control.tokens(out).get(name) for _, name in tokens] != [i for i, _ in tokens]:
        raise UserError(f"--model.added_tokens={added}: {tokenizer.path} cannot be given these tokens")
    return out
