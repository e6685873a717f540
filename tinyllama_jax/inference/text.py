"""From a prompt to ids, and from a growing list of ids to text that is never taken back."""

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


class Text:
    """Decodes a growing list of tokens into parts that no later token changes. Ends before a stop string."""

    RECENT = 64  # tokens kept of a text: each new one is decoded after them, since its text may depend on them

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), before: Sequence[int] = ()):
        """`stop`: strings that end the text; not part of it. `before`: tokens that it continues, not part of it either.

        Without those before it, SentencePiece leaves out the space in front of a text's first word.
        """
        self._tokenizer, self._stop, self.stopped = tokenizer, [], False
        self._tokens: list[int] = []
        self._given = ""  # what `add` has returned of their text
        self.add(before[-self.RECENT :])
        self._stop = [s for s in stop if s]

    def add(self, tokens: Sequence[int], last: bool = False) -> str:
        """The text that `tokens` complete; all the remaining text if they are the `last`. "" once `stopped`.

        A character of several byte tokens waits for its last one: until then it decodes to up to three U+FFFD. The beginning
        of a stop string waits until it is clear whether the whole follows.
        """
        if self.stopped:
            return ""
        self._tokens += tokens
        text = self._tokenizer.decode(self._tokens)
        if not last:
            waiting = len(text) - len(text.rstrip("\ufffd"))
            text = text[: len(text) - min(waiting, 3)]
            if not text.startswith(self._given):  # some decoders show whole characters as U+FFFD beside half of one
                return ""
        ends = [at for at in (text.find(s, len(self._given)) for s in self._stop) if at >= 0]
        if ends:
            self.stopped, text = True, text[: min(ends)]
        elif not last:
            held = max((_overlap(text[len(self._given) :], s) for s in self._stop), default=0)
            text = text[: len(text) - held]
        new, self._given = text[len(self._given) :], text
        self._forget()
        return new

    def _forget(self) -> None:
        """Drops all but the last tokens if their text has been returned, so that each token takes as long as the first."""
        recent = self._tokens[-self.RECENT :]
        if len(self._tokens) >= 2 * self.RECENT and self._tokenizer.decode(self._tokens) == self._given:
            text = self._tokenizer.decode(recent)
            if self._given.endswith(text.lstrip(" \ufffd")):
                self._tokens, self._given = recent, text


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are a beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
