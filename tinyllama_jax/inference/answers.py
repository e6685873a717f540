"""Answers in OpenAI's format, whole or as chunks of a stream: the text and log-probabilities that new tokens complete."""

import functools
import json
from typing import NamedTuple

from tinyllama_jax.data.tokenizer import Tokenizer
from tinyllama_jax.inference.engine import Request
from tinyllama_jax.inference.openai import Query
from tinyllama_jax.inference.text import Text

FINISH = {"stop": "stop", "length": "length", "context": "length"}  # the engine's reason -> OpenAI's


class Token(NamedTuple):
    """A token with its log-probability. The texts of an answer's tokens add up to its text."""

    text: str  # of a character of several tokens only the last one has it, the others have ""
    offset: int  # characters of the answer before it
    logprob: float | None  # None: the first token of a prompt
    top: list[tuple[str, float]]


class Piece(NamedTuple):
    """What new tokens complete."""

    text: str = ""
    tokens: tuple[Token, ...] = ()  # those whose text has begun in the pieces so far
    finish: str | None = None

    def __add__(self, later: "Piece") -> "Piece":
        return Piece(self.text + later.text, self.tokens + later.tokens, later.finish or self.finish)


class Choice:
    """One answer: turns the growing list of a request's tokens into pieces that no later token changes."""

    def __init__(self, index: int, request: Request, query: Query, tokenizer: Tokenizer):
        self.index, self.request, self.n_tokens, self.finish = index, request, 0, None
        self._query, self._tokenizer = query, tokenizer
        # with the prompt before it: SentencePiece leaves out the space before a text's first word
        self._text, self._names = Text(tokenizer, query.stop, request.prompt), Text(tokenizer, (), request.prompt)
        self._shown = self._listed = 0  # characters of the answer that were returned; characters of the tokens in `_list`
        self._waiting: list[Token] = []
        self._echoed = False

    def take(self, n: int, finish: str | None) -> Piece:
        """The piece that the request's tokens up to the n-th complete. `finish`: why the engine ended it, or None."""
        if self.finish or not (n or finish):
            return Piece()
        echo = self._echo() if self._query.echo and not self._echoed else ""
        self._echoed = True
        tokens = self.request.tokens[self.n_tokens : n]
        ends = finish == "stop"  # the last token is a stop id, which has no text
        if not self._query.stop and self._query.top < 0:
            text, self.n_tokens = self._text.add(tokens[:-1] if ends else tokens), self.n_tokens + len(tokens)
        else:
            text = self._one_by_one(tokens, ends)
        if self._text.stopped:
            self.finish = "stop"
        elif finish:
            self.finish = FINISH[finish]
            text += self._text.add([], last=True)
            self._list_rest()
        self._shown += len(echo + text)
        done = bool(finish) and not self._text.stopped
        whole = [token for token in self._waiting if done or token.offset < self._shown]
        self._waiting = self._waiting[len(whole) :]
        return Piece(echo + text, tuple(whole), self.finish)

    def _one_by_one(self, tokens: list[int], ends: bool) -> str:
        text = ""
        for i, token in enumerate(tokens):
            control = ends and i == len(tokens) - 1
            if self._query.top >= 0:
                request, at = self.request, self.n_tokens
                self._list("" if control else self._names.add([token]), request.logprobs[at], request.top[at])
            self.n_tokens += 1
            text += "" if control else self._text.add([token])
            if self._text.stopped:
                break
        return text

    def _echo(self) -> str:
        """The text of the prompt; lists its tokens if log-probabilities are asked for."""
        prompt = self.request.prompt[self._query.bos :]
        if self._query.top < 0:
            return Text(self._tokenizer).add(prompt)
        self._names = Text(self._tokenizer)
        log, top = (a[self._query.bos :] for a in (self.request.prompt_logprobs, self.request.prompt_top))
        for token, logprob, others in zip(prompt, log, top, strict=True):
            self._list(self._names.add([token]), logprob, others)
        return "".join(token.text for token in self._waiting)

    def _list(self, text: str, logprob: float | None, top: list[tuple[int, float]] | None) -> None:
        top = [(alone(self._tokenizer, token), finite(p)) for token, p in top or ()]
        self._waiting.append(Token(text, self._listed, None if logprob is None else finite(logprob), top))
        self._listed += len(text)

    def _list_rest(self) -> None:
        if self._waiting and (half := self._names.add([], last=True)):  # half a character, shown as U+FFFD
            self._waiting[-1] = self._waiting[-1]._replace(text=self._waiting[-1].text + half)


def finite(logprob: float) -> float:
    """`logprob`, but -9999 for -inf, as OpenAI has it: JSON has no infinity."""
    return max(-9999.0, logprob)


@functools.lru_cache(maxsize=1 << 16)
def alone(tokenizer: Tokenizer, token: int) -> str:
    """The text of one token within a text. A part of a character is U+FFFD."""
    before = tokenizer.encode("a")
    return tokenizer.decode([*before, token]).removeprefix(tokenizer.decode(before))


# -- OpenAI's format ---------------------------------------------------------------------------------------------------


def _logprobs(query: Query, tokens: tuple[Token, ...]) -> dict | None:
    if query.top < 0:
        return None
    if query.chat:
        entry = lambda text, p: {"token": text, "logprob": p, "bytes": list(text.encode())}
        content = [entry(t.text, t.logprob) | {"top_logprobs": [entry(*other) for other in t.top]} for t in tokens]
        return {"content": content, "refusal": None}
    return {
        "tokens": [t.text for t in tokens],
        "token_logprobs": [t.logprob for t in tokens],
        # tokens with the same text share a key; the most likely one comes last, and so keeps it
        "top_logprobs": [None if t.logprob is None else dict([(t.text, t.logprob), *t.top[::-1]]) for t in tokens],
        "text_offset": [t.offset for t in tokens],
    }


def choice(query: Query, index: int, piece: Piece, first: bool = False) -> dict:
    """One entry of `choices`, in a chunk if the request asks for a stream, otherwise in the whole answer."""
    out = {"index": index, "logprobs": _logprobs(query, piece.tokens), "finish_reason": piece.finish}
    if not query.chat:
        return out | {"text": piece.text}
    if not query.stream:
        return out | {"message": {"role": "assistant", "content": piece.text, "refusal": None}}
    role = {"role": "assistant"} if first else {}
    return out | {"delta": role | ({"content": piece.text} if piece.text or first else {})}


def usage(query: Query, choices: list[Choice]) -> dict:
    """The field `usage`: numbers of tokens. A prompt counts once, however many answers it has."""
    prompt, answer = sum(map(len, query.prompts)), sum(c.n_tokens for c in choices)
    cached = {"cached_tokens": sum(c.request.cached for c in choices[:: query.n])}
    total = {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
    return total | {"prompt_tokens_details": cached}


def kind(query: Query) -> str:
    """The field `object`: the type of the response."""
    return ("chat.completion.chunk" if query.stream else "chat.completion") if query.chat else "text_completion"


def encode(value: dict) -> bytes:
    """`value` as JSON in UTF-8, without escapes."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def event(value: dict) -> bytes:
    """`value` as one server-sent event."""
    return b"data: " + encode(value) + b"\n\n"
