"""A conversation with a chat model in the terminal, or one message a line from a pipe.

python -m tinyllama_jax.chat --checkpoint PATH
"""

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tinyllama_jax.base import files
from tinyllama_jax.base.errors import UserError, disk_error, run_main
from tinyllama_jax.data import chat
from tinyllama_jax.inference import options, retrieval
from tinyllama_jax.inference.engine import Engine, Request
from tinyllama_jax.inference.text import Text
from tinyllama_jax.inference.weights import Loaded

HELP = """\
/reset        forget the conversation, but not the system message
/system TEXT  set the system message, which stands before the conversation; without TEXT: remove it
/save FILE    write the conversation to a new .jsonl file, as data for fine-tuning
/help         these lines
/quit         leave, as Ctrl-D does
//TEXT        send a message that begins with /
Ctrl-C stops an answer."""


@dataclasses.dataclass
class Turn:
    """A question and its answer."""

    question: str
    answer: str
    whole: bool  # the model ended the answer itself: neither Ctrl-C nor a limit cut it short


@dataclasses.dataclass
class Conversation:
    """The turns so far, and the system message."""

    system: str | None
    turns: list[Turn] = dataclasses.field(default_factory=list)
    saved: set[Path] = dataclasses.field(default_factory=set)  # files that it was saved to, which it may overwrite

    def messages(self, turns: list[Turn]) -> list[chat.Message]:
        """`turns` as messages, after the system message."""
        pairs = [(role, text) for turn in turns for role, text in (("user", turn.question), ("assistant", turn.answer))]
        system = [] if self.system is None else [("system", self.system)]
        return [{"role": role, "content": text} for role, text in system + pairs]


def main(argv: list[str]) -> int:
    """Answers messages until the input ends; returns the exit code."""
    args = _arguments(argv)
    index = options.index(args)  # before the weights, which can take minutes
    with contextlib.redirect_stdout(sys.stderr):
        loaded, engine = options.load(args)
    template = chat.choose(Path(args.checkpoint).absolute(), loaded.tokenizer, args.template)
    conversation = Conversation(args.system or None)
    encode = _encoder(template, loaded)
    encode([*conversation.messages([]), {"role": "user", "content": "?"}])  # refuses a wrong system message at once
    model = loaded.model
    _note(options.introduced(args.checkpoint, args, loaded))
    _note(f"template {template.name} ({template.why}); {options.described(options.sampling(args))}, seed {args.seed}")
    _note(f"context of {model.seq_len:,} tokens; /help lists the commands")
    for line in _lines():
        if line.startswith("/") and not line.startswith("//"):
            if line.split()[0] in ("/quit", "/exit"):
                break
            with _errors_noted():
                _command(line, conversation, encode)
        elif line.strip():
            with _errors_noted():
                _answer(line[line.startswith("//") :], conversation, args, loaded, template, engine, index)
    return 0


@contextlib.contextmanager
def _errors_noted() -> Iterator[None]:
    """Prints a UserError, so that a mistake in one message does not end the conversation."""
    try:
        yield
    except UserError as error:
        _note(f"error: {error}")


def _encoder(template: chat.Template, loaded: Loaded) -> Callable[[list[chat.Message]], list[int]]:
    return lambda messages: chat.encode(template, loaded.tokenizer, messages, begin_with_bos=loaded.begin_with_bos)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # stdout is for the answers alone


# -- input --------------------------------------------------------------------------------------------------------------


def _lines() -> Iterator[str]:
    """Yields the lines of a terminal, with editing and a history, or of a pipe. Ends at Ctrl-D or at the input's end."""
    source = sys.stdin or io.StringIO()  # None: it was closed
    if hasattr(source, "reconfigure"):
        source.reconfigure(errors="surrogateescape")
    interactive = source.isatty() and sys.stdout.isatty()
    if interactive:
        with contextlib.suppress(ImportError):  # some builds of Python lack it
            import readline  # noqa: F401  gives `input` its editing and history
    while True:
        try:
            line = input("> ") + "\n" if interactive else source.readline()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            _note("\n[Ctrl-D or /quit leaves]")
            continue
        if not line:
            return
        if any("\ud800" <= character <= "\udfff" for character in line):
            _note("error: this message is not UTF-8, and was not sent")
        else:
            yield line.removesuffix("\n").removesuffix("\r")


def _command(line: str, conversation: Conversation, encode: Callable[[list[chat.Message]], list[int]]) -> None:
    """Carries out a line that begins with /."""
    name, _, value = line.partition(" ")
    value = value.strip()
    if name == "/reset" and not value:
        conversation.turns.clear()
        _note("[the conversation is empty]")
    elif name == "/system":
        before, conversation.system = conversation.system, value or None
        try:
            encode([*conversation.messages([]), {"role": "user", "content": "?"}])
        except UserError:
            conversation.system = before
            raise
        _note("[the system message is set]" if value else "[no system message]")
    elif name == "/save":
        _save(value, conversation)
    elif name == "/help":
        _note(HELP)
    else:
        raise UserError(f"{line}: is not a command; /help lists them; //... sends a message that begins with /")


def _save(name: str, conversation: Conversation) -> None:
    """Writes the turns before the first answer that was cut short, as a line of JSON: {"messages": [...]}. Raises UserError."""
    turns = list(itertools.takewhile(lambda turn: turn.whole, conversation.turns))
    if not name:
        raise UserError("/save needs the name of a file, such as /save chat.jsonl")
    if not turns:
        raise UserError("/save: no question has a whole answer yet, so there is nothing to save")
    files.check_local("/save", name)
    path = Path(name).expanduser().absolute()
    if path not in conversation.saved and files.exists(path):
        raise UserError(f"/save {name}: exists already; name a new file")
    try:
        files.write(path, json.dumps({"messages": conversation.messages(turns)}, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"/save {name}: {disk_error(error)}") from None
    conversation.saved.add(path)
    left = len(conversation.turns) - len(turns)
    _note(f"[{name}: {len(turns)} turns" + (f"; not the last {left}, since an answer was cut short]" if left else "]"))


# -- an answer ----------------------------------------------------------------------------------------------------------


def _answer(
    question: str,
    conversation: Conversation,
    args: argparse.Namespace,
    loaded: Loaded,
    template: chat.Template,
    engine: Engine,
    index: retrieval.Index | None,
) -> None:
    """Prints the answer as it comes, and adds the turn to the conversation. Raises UserError if the question does not fit.

    Passages of `index` stand before the question, within their budget, and history is cut to fit what is left. In later turns
    only the question stays.
    """
    encode, tokenizer, context = _encoder(template, loaded), loaded.tokenizer, loaded.model.seq_len
    room = max(min(args.max_new_tokens, context // 4), 1)  # for the answer
    asked = lambda passages: {"role": "user", "content": retrieval.asked(question, passages)}
    count = lambda passages: len(encode([*conversation.messages([]), asked(passages)]))
    passages = index.before(question, count, context - room, context) if index else []
    messages = [*conversation.messages(conversation.turns), asked(passages)]
    messages, cut = chat.fit(messages, lambda part: len(encode(part)), context - room)
    if cut:
        _note(f"[the context of {context:,} tokens is full: the oldest {cut} turns are left out]")
    stop_ids = chat.stop_ids(template, tokenizer)
    request = Request(
        encode(messages), args.max_new_tokens, options.sampling(args), args.seed, len(conversation.turns), stop_ids
    )
    if args.show_prompt:
        _note(f"prompt: {request.prompt}")
    text, answer, started = Text(tokenizer, [*chat.stop_texts(template, tokenizer), *args.stop]), "", time.perf_counter()
    engine.submit(request)
    with _interruptible() as interrupted:
        while not (request.finish or text.stopped or interrupted):
            n = len(request.tokens)
            engine.step()
            more = text.add([token for token in request.tokens[n:] if token not in stop_ids])
            more = more if answer else more.lstrip()  # without a dummy prefix the first word's token begins with a space
            print(more, end="", flush=True)
            answer += more
    engine.cancel(request)
    more = text.add([], last=True)
    print(more, flush=True)
    answer = (answer + more).strip()
    reasons = {"length": "stopped: --max-new-tokens", "context": f"stopped: the context of {context:,} tokens is full"}
    if not text.stopped and (interrupted or request.finish in reasons):
        _note(f"[{'stopped: Ctrl-C' if interrupted else reasons[request.finish]}]")
    if index:
        _note(retrieval.sources(passages) or "[no passage matches, or none fits]")
    if sys.stderr.isatty():
        n = len(request.tokens)
        _note(f"[{n:,} tokens, {n / (time.perf_counter() - started):,.1f} tokens/s{options.drafted(request, engine)}]")
    if answer:
        conversation.turns.append(Turn(question, answer, whole=text.stopped or request.finish == "stop"))
    else:
        _note("[an empty answer; the question is forgotten]")


@contextlib.contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Yields a list to which Ctrl-C appends: a KeyboardInterrupt within a step could leave the engine's state half updated."""
    signals: list[int] = []

    def receive(number: int, frame: object) -> None:
        if signals:  # the second time
            raise KeyboardInterrupt
        signals.append(number)

    before = signal.signal(signal.SIGINT, receive)
    try:
        yield signals
    finally:
        signal.signal(signal.SIGINT, before)


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tinyllama_jax.chat", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    options.add_checkpoint(parser)
    parser.add_argument("--system", metavar="TEXT", help="the system message (none)")
    parser.add_argument(
        "--template", metavar="NAME", help=f"{', '.join(chat.TEMPLATES)}, or a .jinja file (what the checkpoint brings)"
    )
    options.add_sampling(parser, max_new_tokens=512)
    options.add_retrieval(parser)
    args = parser.parse_args(argv)
    options.check(args)
    return args


if __name__ == "__main__":
    run_main(main)
