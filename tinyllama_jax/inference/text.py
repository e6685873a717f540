"""Encodes a prompt, and decodes a growing list of ids to text that is never taken back."""

from collections.abc import Sequence

from tinyllama_jax.data.tokenizer import Tokenizer


def first_tokens(tokenizer: Tokenizer, begin_with_bos: bool, prompt: str) -> list[int]:
    """The prompt's ids, with bos in front if the documents of training (or Hugging Face's settings) had it.

    An empty prompt begins a new document: it is bos, or else eos, which separated documents.
    """
    ids = tokenizer.encode(prompt)
    if tokenizer.bos_id >= 0 and begin_with_bos:
        return [tokenizer.bos_id, *ids]
    return ids or ([tokenizer.eos_id] if tokenizer.eos_id >= 0 else [])


def eos_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end a text that is no chat: the tokenizer's eos, if it has one."""
    return (tokenizer.eos_id,) if tokenizer.eos_id >= 0 else ()


class Text:
    """Decodes a growing list of tokens into parts that no later token changes. Ends before a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), before: Sequence[int] = ()):
        """`stop`: strings that end the text and are not part of it. `before`: the tokens before it, not part of it either.

        Without `before`, SentencePiece leaves out the space in front of the text's first word.
        """
        self._tokenizer, self._stop, self.stopped = tokenizer, [], False
        self._tokens: list[int] = []  # the newest ones: first `_n` whose text has been given, then those that wait
        self._n = 0
        self._held = ""  # decoded text that may be the beginning of a stop string
        self.add(before[-16:])
        self._stop = [s for s in stop if s]

    def add(self, tokens: Sequence[int], last: bool = False) -> str:
        """The text that `tokens` complete; all the remaining text if they are the `last`. "" once `stopped`.

        A character of several byte tokens waits for its last one: until then it decodes to U+FFFD. The beginning of a stop
        string waits until it is clear whether the rest follows. Of several stop strings, the one that is complete first counts.
        """
        if self.stopped:
            return ""
        text = self._held + "".join(map(self._decoded, tokens)) + (self._take(len(self._tokens)) if last else "")
        starts = [(text.find(s), len(s)) for s in self._stop]
        ends = [(at + n, at) for at, n in starts if at >= 0]
        if ends:
            self.stopped, end = True, min(ends)[1]
        else:
            end = len(text) - (0 if last else max((_overlap(text, s) for s in self._stop), default=0))
        self._held = text[end:]
        return text[:end]

    def _decoded(self, token: int) -> str:
        """The text that one more token completes."""
        self._tokens.append(token)
        whole = not self._text(len(self._tokens)).endswith("\ufffd")
        if not whole and len(self._tokens) - self._n < 4:  # a character has at most four bytes
            return ""
        return self._take(len(self._tokens) if whole else self._n + 1)

    def _take(self, end: int) -> str:
        text = self._text(end)
        if text:
            del self._tokens[: self._n]
            end -= self._n
        self._n = end
        return text

    def _text(self, end: int) -> str:
        """The text of the waiting tokens up to `end`, decoded after those before them: a token's text depends on these."""
        before, text = (self._tokenizer.decode(self._tokens[:n]) for n in (self._n, end))
        # some decoders turn all bytes before a byte that belongs to no character into U+FFFD
        return text[len(before) :] if text.startswith(before) else self._tokenizer.decode(self._tokens[self._n : end])


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
