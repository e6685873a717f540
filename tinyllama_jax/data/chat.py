"""Chat templates: the token ids of messages, equal to Transformers' `apply_chat_template`, and the mask of the answers.

A template is Jinja source. `TEMPLATES` holds those of TinyLlama's chat models; a checkpoint may bring its own. The tag
`{% generation %}` marks what the assistant writes, the end of its answer included: fine-tuning trains on that part alone.
"""

import bisect
import functools
import json
import re
import secrets
import typing
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import jinja2
from jinja2 import ext, nodes, sandbox

from tinyllama_jax.base import files
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.data import control
from tinyllama_jax.data.tokenizer import Tokenizer

Message = dict[str, typing.Any]  # role: "system", "user" or "assistant"; content: its text
LARGEST = 1 << 20  # the most bytes of a template's file; published ones have up to 20 kB


class Template(typing.NamedTuple):
    """How a conversation is written as text."""

    name: str
    source: str  # Jinja
    stop: tuple[str, ...]  # what ends an answer besides eos: a token or a text
    why: str = ""  # why this template was chosen


# v0.1, as the data set openassistant-guanaco: turns follow one another without a line end, and eos ends the whole dialogue.
# An answer within it ends where the next question begins, so that mark belongs to what the assistant learns to write.
GUANACO = """\
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{{ message.content + '\\n' }}
{%- elif message.role == 'user' -%}
{{ ('' if loop.previtem is defined and loop.previtem.role == 'assistant' else '### Human:') + ' ' + message.content }}
{%- elif message.role == 'assistant' -%}
{{ '### Assistant:' }}
{%- generation -%}
{{ ' ' + message.content + (eos_token if loop.last else '### Human:' if loop.nextitem.role == 'user' else '') }}
{%- endgeneration -%}
{%- else -%}
{{ raise_exception('a message has the role ' + message.role + '; known are system, user and assistant') }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '### Assistant:' }}{%- endif -%}"""

# v0.2 to v0.4
CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' -%}
{%- generation -%}{{ message.content + '<|im_end|>' }}{%- endgeneration -%}
{%- else -%}
{{ message.content + '<|im_end|>' }}
{%- endif -%}
{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""

# v0.6 and v1.0
ZEPHYR = """\
{%- for message in messages -%}
{%- if message.role not in ('system', 'user', 'assistant') -%}
{{ raise_exception('a message has the role ' + message.role + '; known are system, user and assistant') }}
{%- endif -%}
{{ '<|' + message.role + '|>\\n' }}
{%- if message.role == 'assistant' -%}
{%- generation -%}{{ message.content + eos_token }}{%- endgeneration -%}
{%- else -%}
{{ message.content + eos_token }}
{%- endif -%}
{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}"""

TEMPLATES = {
    "guanaco": Template("guanaco", GUANACO, ("### Human:",)),
    "chatml": Template("chatml", CHATML, ("<|im_end|>",)),
    "zephyr": Template("zephyr", ZEPHYR, ()),
}
# names of TinyLlama's chat models -> template: the first ones were published without one
PUBLISHED = {r"chat-?v0\.1\b": "guanaco", r"chat-?v0\.[2-4]\b": "chatml", r"chat-?v(0\.[6-9]|1\.0)\b": "zephyr"}


# -- rendering ----------------------------------------------------------------------------------------------------------


class _Generation(ext.Extension):
    """The tag `{% generation %} ... {% endgeneration %}`: surrounds its text with the variable `generation_mark`, if set."""

    tags = {"generation"}  # noqa: RUF012  jinja2's own interface

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_surround"), [], [], body).set_lineno(line)

    @jinja2.pass_context
    def _surround(self, context, caller):
        mark = context.get("generation_mark", "")
        return mark + caller() + mark


class _Namespace(jinja2.utils.Namespace):
    """Jinja's `namespace`, without names that reach into Python: templates come from strangers."""

    def __init__(self, /, *args, **kwargs):
        super().__init__()
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __setitem__(self, name, value):
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name!r}")
        super().__setitem__(name, value)


def _refuse(message: object) -> typing.NoReturn:
    raise jinja2.TemplateError(str(message))


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # Jinja's own filter escapes the characters of HTML
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=32)
def _compiled(source: str) -> jinja2.Template:
    """The template with the settings, filters, functions and tags that Transformers 5 gives it."""
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": lambda format: datetime.now().strftime(format),
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
        "namespace": _Namespace,
    }
    return environment.from_string(source)


def render(template: Template, tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt=True, **more) -> str:
    """The conversation as text. Raises UserError if there is no message, or if the template refuses it or is damaged.

    `add_generation_prompt`: ends with the beginning of an answer.
    """
    if not messages:
        raise UserError("a conversation needs at least one message")
    variables = {**control.named(tokenizer), "tools": None, "documents": None, **more}
    present = [{key: value for key, value in message.items() if value is not None} for message in messages]
    try:
        return _compiled(template.source).render(messages=present, add_generation_prompt=add_generation_prompt, **variables)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"the chat template {template.name} is damaged: line {error.lineno}: {error.message}") from None
    except Exception as error:  # a template is a program, and can fail in any way
        what = str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
        raise UserError(f"the chat template {template.name} refuses this conversation: {what}") from None


# -- token ids ----------------------------------------------------------------------------------------------------------


def encode(
    template: Template,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    begin_with_bos: bool,
) -> list[int]:
    """Token ids of a conversation, as `apply_chat_template` gives them; with `begin_with_bos` they begin with exactly one bos.

    As there, control tokens that a user writes in a message become control tokens. Raises UserError as `render` does.
    """
    ids, _ = control.encode(tokenizer, render(template, tokenizer, messages, add_generation_prompt))
    return [tokenizer.bos_id, *ids] if _lacks_bos(tokenizer, ids, begin_with_bos) else ids


def _lacks_bos(tokenizer: Tokenizer, ids: list[int], begin_with_bos: bool) -> bool:
    return begin_with_bos and tokenizer.bos_id >= 0 and ids[:1] != [tokenizer.bos_id]


def encode_with_mask(
    template: Template, tokenizer: Tokenizer, messages: Sequence[Message], *, begin_with_bos: bool
) -> tuple[list[int], list[bool]]:
    """(ids, mask) of a whole conversation. The mask is true where the assistant writes, the end of each answer included.

    A token that lies partly in an answer belongs to it, as in Transformers' `return_assistant_tokens_mask`. Raises UserError as
    `render` does, and if the template does not mark the assistant's part.
    """
    if not marks_answers(template):
        how = "add the tag {% generation %} around what the assistant writes, or name another template"
        raise UserError(f"the chat template {template.name} does not mark the answers; {how} ({', '.join(TEMPLATES)})")
    mark = f"\ufdd0{secrets.token_hex(8)}\ufdd0"  # nobody can write it in a message
    parts = render(template, tokenizer, messages, False, generation_mark=mark).split(mark)
    ids, offsets = control.encode(tokenizer, "".join(parts))
    spans, at = [], 0
    for i, part in enumerate(parts):
        if i % 2:
            spans.append((at, at + len(part)))
        at += len(part)
    mask, k = [], 0
    for start, end in offsets:
        while k < len(spans) and start >= spans[k][1]:
            k += 1
        mask.append(k < len(spans) and end > spans[k][0])
    if _lacks_bos(tokenizer, ids, begin_with_bos):
        return [tokenizer.bos_id, *ids], [False, *mask]
    return ids, mask


def marks_answers(template: Template) -> bool:
    """Whether the template has the tag `{% generation %}`."""
    return re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", template.source) is not None


def check_ends(template: Template, tokenizer: Tokenizer) -> None:
    """Raises UserError unless what ends an answer lies in the mask of `encode_with_mask`: else a model never learns to stop."""
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")]
    encode_with_mask(template, tokenizer, turns, begin_with_bos=False)  # refuses a template that marks nothing
    ends = tuple(dict.fromkeys([*template.stop, control.named(tokenizer).get("eos_token")]))
    parts = render(template, tokenizer, turns, False, generation_mark="\ufdd0").split("\ufdd0")
    if not all(part.rstrip().endswith(tuple(filter(None, ends))) for part in parts[1::2]):
        what = f"what ends an answer ({' or '.join(filter(None, ends))}) is outside {{% generation %}}"
        raise UserError(f"the chat template {template.name}: {what}, so a model would not learn to stop; move it inside")


def keep(template: Template, folder: Path) -> None:
    """Makes `template` the one that a tokenizer's folder brings, in place of any other."""
    files.write(folder / "chat_template.jinja", template.source)
    (folder / "chat_template.json").unlink(missing_ok=True)
    config = folder / "tokenizer_config.json"
    if config.is_file() and "chat_template" in (content := files.read_json(config, dict)):
        content.pop("chat_template")
        files.write(config, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def stop_ids(template: Template, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end an answer: eos, and the template's own token if the tokenizer has it."""
    ids = {tokenizer.eos_id} | {control.tokens(tokenizer).get(text, -1) for text in template.stop}
    return tuple(sorted(ids - {-1}))


def stop_texts(template: Template, tokenizer: Tokenizer) -> tuple[str, ...]:
    """The texts that end an answer, because the tokenizer has no token for them."""
    return tuple(text for text in template.stop if text not in control.tokens(tokenizer))


# -- which template -----------------------------------------------------------------------------------------------------


class _Named(typing.TypedDict):
    name: str
    template: str


class _Config(typing.TypedDict, total=False):
    chat_template: str | list[_Named] | dict[str, str] | None


class _GenerationConfig(typing.TypedDict, total=False):
    eos_token_id: int | list[int] | None


def own_sources(folder: Path | None) -> dict[str, str]:
    """Name -> source of the templates that a folder brings, as Transformers finds them; "default" is the one for chats."""
    if folder is None:
        return {}
    sources = {path.stem: _text(path) for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        sources["default"] = _text(folder / "chat_template.jinja")
    for name in ("tokenizer_config.json", "chat_template.json"):
        if not sources and (folder / name).is_file():
            given = files.read_json(folder / name, _Config).get("chat_template") or {}
            given = {each["name"]: each["template"] for each in given} if isinstance(given, list) else given
            sources = {"default": given} if isinstance(given, str) else given
    return sources


def _text(path: Path) -> str:
    with files.open_regular(path) as f:
        content = f.read(LARGEST + 1)
    try:
        if len(content) > LARGEST:
            raise ValueError(f"has more than {LARGEST:,} bytes")
        return content.decode()
    except ValueError as error:
        raise UserError(f"{path}: is not a chat template: {error}") from None


def of_folder(folder: Path, tokenizer: Tokenizer) -> Template | None:
    """The template of a checkpoint: its tokenizer's own, or the one that its name or its tokens tell; otherwise None.

    `folder`: a run folder, a Hugging Face folder or a GGUF file. Raises UserError for a damaged template.
    """
    sources = own_sources(tokenizer.folder)
    if "default" in sources:
        return _own(name_of(sources["default"], f"of {folder}"), sources["default"], tokenizer, "its own chat_template")
    if sources:
        raise UserError(f"{folder}: has the chat templates {', '.join(sources)}, and no default; choose one: --template NAME")
    for pattern, name in PUBLISHED.items():
        if re.search(pattern, folder.name, re.IGNORECASE):
            return TEMPLATES[name]._replace(why=f"the template of models named {folder.name}")
    if {"<|im_start|>", "<|im_end|>"} <= control.tokens(tokenizer).keys():
        return TEMPLATES["chatml"]._replace(why="its tokenizer has <|im_start|> and <|im_end|>")
    return None


def choose(folder: Path, tokenizer: Tokenizer, name: str | None = None, option: str = "--template") -> Template:
    """The template `name` (of `TEMPLATES`, one of the checkpoint's own, or a .jinja file); without a name the checkpoint's.

    `option`: what error messages call `name`. Raises UserError if there is no such template, or if the checkpoint has none.
    """
    if name is None:
        if template := of_folder(folder, tokenizer):
            return template
        why = "has no chat template, and neither its name nor its tokens tell which it was trained with; a base model has none"
        raise UserError(f"{folder}: {why}: say {option} NAME ({', '.join(TEMPLATES)}, or a .jinja file)")
    sources = own_sources(tokenizer.folder)
    if name in TEMPLATES:
        template = TEMPLATES[name]
    elif name in sources:
        template = _own(name, sources[name], tokenizer, option)
    elif name.endswith(".jinja"):
        files.check_local(option, name)
        template = _own(name, _text(Path(name)), tokenizer, option)
    else:
        raise UserError(f"{option} {name}: is none of {', '.join([*TEMPLATES, *sources])}, and not a .jinja file")
    other = sources.get("default", template.source) != template.source
    return template._replace(why=f"{option}; the weights bring {name_of(sources['default'], 'another')}" if other else option)


def name_of(source: str, otherwise: str) -> str:
    """The name in `TEMPLATES` of a template with this source, or else `otherwise`."""
    return next((name for name, template in TEMPLATES.items() if template.source == source), otherwise)


def _own(name: str, source: str, tokenizer: Tokenizer, why: str) -> Template:
    """A template that is not in `TEMPLATES`. Its text and generation_config.json tell what ends an answer."""
    template = Template(name, source, (), why)
    render(template, tokenizer, [{"role": "user", "content": "?"}])  # refuses a damaged one before anything else is done
    config = tokenizer.folder / "generation_config.json" if tokenizer.folder else None
    eos = files.read_json(config, _GenerationConfig).get("eos_token_id") if config and config.is_file() else None
    eos = [eos] if isinstance(eos, int) else eos or []
    named = [token for token, id_ in control.tokens(tokenizer).items() if id_ in eos]
    return template._replace(stop=tuple(dict.fromkeys([*_ending(template, tokenizer), *named])))


def _ending(template: Template, tokenizer: Tokenizer) -> list[str]:
    """What the template writes between an answer and the next question: its first control token, or else its first line."""
    turns = (("user", "Hello."), ("assistant", "ThisIsTheAnswer"), ("user", "ThisIsTheQuestion"))
    try:
        text = render(template, tokenizer, [{"role": role, "content": content} for role, content in turns])
    except UserError:  # it refuses such a conversation, so only eos ends an answer
        return []
    between = text.partition("ThisIsTheAnswer")[2].partition("ThisIsTheQuestion")[0]
    if tokens := [token for token in control.tokens(tokenizer) if token in between]:
        return [min(tokens, key=lambda token: (between.index(token), -len(token)))]
    return between.strip().splitlines()[:1]


# -- the context --------------------------------------------------------------------------------------------------------


def fit(messages: Sequence[Message], count: typing.Callable[[list[Message]], int], limit: int) -> tuple[list[Message], int]:
    """(messages, turns cut): whole oldest turns are left out until `count(messages)` is at most `limit`.

    A turn is a question and what follows it. System messages at the beginning and the last turn stay. Raises UserError if
    that is still too long.
    """
    system = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    starts = [system, *(i for i, message in enumerate(messages) if message["role"] == "user" and i > system)]
    left = lambda cut: [*messages[:system], *messages[starts[cut] :]]
    cut = bisect.bisect_left(range(len(starts) - 1), True, key=lambda cut: count(left(cut)) <= limit)
    if (n := count(left(cut))) > limit:
        what = f"the last message and any system message have {n:,} tokens, and there is room for {limit:,}"
        raise UserError(f"{what}; shorten the message or the system message")
    return left(cut), cut
