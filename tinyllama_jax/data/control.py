"""Encodes a text in which control tokens are written out, such as "</s>", as those tokens: for chat templates only.

`Tokenizer.encode` reads them as plain characters. Here the ids are those of Transformers with an exported tokenizer: a control
token becomes its id, and the text after it is encoded as a separate text.
"""

import copy
import functools
import re

from tinyllama_jax.data.tokenizer import HuggingFaceTokenizer, Tokenizer, naming


@functools.lru_cache(maxsize=8)
def named(tokenizer: Tokenizer) -> dict[str, str]:
    """bos_token, eos_token, unk_token and so on -> the token, as the tokenizer's files name them."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return naming(tokenizer.path.parent, tokenizer.path.name).special
    sp = tokenizer._sp
    ids = {"bos_token": sp.bos_id(), "eos_token": sp.eos_id(), "unk_token": sp.unk_id(), "pad_token": sp.pad_id()}
    own = {name: sp.id_to_piece(i) for name, i in ids.items() if i >= 0}
    return own | (naming(tokenizer.folder).special if tokenizer.folder else {})


@functools.lru_cache(maxsize=8)
def tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Text -> id of the control tokens that `encode` looks for."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return {token.content: i for i, token in _reader(tokenizer).get_added_tokens_decoder().items()}
    sp = tokenizer._sp
    return {sp.id_to_piece(i): i for i in range(sp.vocab_size()) if sp.is_control(i) or sp.is_unknown(i)}


@functools.lru_cache(maxsize=8)
def _reader(tokenizer: HuggingFaceTokenizer):
    reader = copy.deepcopy(tokenizer._hf)  # a copy: other threads would see a changed setting of the original
    reader.encode_special_tokens = False
    added = {token.content for token in reader.get_added_tokens_decoder().values()}
    # as Transformers does, but without new ids: the model has no rows for them
    known = [token for token in named(tokenizer).values() if reader.token_to_id(token) is not None]
    reader.add_special_tokens([token for token in known if token not in added])
    return reader


def encode(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """(ids, offsets) of `text`, without bos and eos. offsets: the characters that each id stands for, [start, end)."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        encoded = _reader(tokenizer).encode(text, add_special_tokens=False)
        return encoded.ids, encoded.offsets
    ids, offsets, at = [], [], 0
    longest_first = sorted(tokens(tokenizer), key=len, reverse=True)
    for part in re.split(f"({'|'.join(map(re.escape, longest_first))})", text):
        if part in tokens(tokenizer):
            part_ids, part_offsets = [tokens(tokenizer)[part]], [(0, len(part))]
        else:
            encoded = tokenizer._sp.encode(part, out_type="offset_mapping")
            # SentencePiece gives a dummy prefix, and each byte of a character but the last, an empty span
            part_ids, part_offsets = encoded["ids"], [(start, max(end, start + 1)) for start, end in encoded["offsets"]]
        ids += part_ids
        offsets += [(at + start, at + end) for start, end in part_offsets]
        at += len(part)
    return ids, offsets
