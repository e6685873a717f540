"""Requests and errors of OpenAI's API: parses a body, and names the field that is wrong, as OpenAI's clients expect."""

import difflib
import re
import secrets
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from tinyllama_jax.base import files
from tinyllama_jax.base.errors import readable
from tinyllama_jax.base.values import shown
from tinyllama_jax.data import chat
from tinyllama_jax.inference.engine import Request
from tinyllama_jax.inference.sampling import Sampling
from tinyllama_jax.inference.text import first_tokens
from tinyllama_jax.inference.weights import Loaded

IGNORED = ("any",)  # stands for every value, of a field that does not change an answer
# OpenAI's fields that are not supported -> their values that ask for nothing, which are accepted
NEUTRAL = {
    **dict.fromkeys(("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"), IGNORED),
    **dict.fromkeys(("prompt_cache_retention", "parallel_tool_calls"), IGNORED),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),  # without tools
    "functions": ([],),
    "function_call": ("none", "auto"),
    "best_of": (1,),
    "suffix": ("",),
    **dict.fromkeys(("audio", "prediction", "reasoning_effort", "verbosity", "web_search_options"), (None,)),
}
NEUTRAL_OF_MESSAGE = {"name": IGNORED, "refusal": ("",), "annotations": ([],), "tool_calls": ([],)}
NEUTRAL_OF_MESSAGE |= dict.fromkeys(("audio", "function_call"), (None,))
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
PROMPTS = 1_024  # the most prompts of a request
TOP = 20  # the most tokens that are listed beside each token


class ApiError(Exception):
    """A response other than 200: HTTP status, message, the field that is wrong, and OpenAI's code for the mistake."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, retry: int = 0):
        super().__init__(message)
        self.status, self.param, self.code, self.retry = status, param, code, retry  # retry: seconds

    def body(self) -> dict:
        """The error in OpenAI's format."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": readable(str(self)), "type": kind, "param": self.param, "code": self.code}}


# -- a request ---------------------------------------------------------------------------------------------------------

Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Top = Annotated[int, Meta(ge=0, le=TOP)]
Id = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Stop = Annotated[str, Meta(min_length=1, max_length=500)]


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool = False


class Common(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The fields that both kinds of request have. top_k, min_p and repetition_penalty are not OpenAI's."""

    model: str = ""
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: Annotated[int, Meta(ge=1, le=128)] = 1
    stop: Stop | Annotated[list[Stop], Meta(max_length=4)] = []
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Meta(ge=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] = 1.0


class Part(msgspec.Struct):
    type: str
    text: str = ""


class Message(msgspec.Struct, forbid_unknown_fields=True):
    role: str
    content: str | list[Part] = ""


class Chat(Common):
    """POST /v1/chat/completions"""

    messages: Annotated[list[dict[str, object]], Meta(min_length=1)]
    max_tokens: Count = 2**31 - 1
    max_completion_tokens: Count = 2**31 - 1
    logprobs: bool = False
    top_logprobs: Top = 0


class Completion(Common):
    """POST /v1/completions"""

    prompt: str | Annotated[list[str | Id | Annotated[list[Id], Meta(min_length=1)]], Meta(min_length=1)] = ""
    max_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 16  # OpenAI's default
    echo: bool = False
    logprobs: Top | None = None


class Query(NamedTuple):
    """What a request asks of the engine."""

    chat: bool
    model: str  # "": whichever is served
    prompts: list[list[int]]  # token ids
    bos: bool  # whether bos was put before each prompt; `echo` does not show it
    n: int  # answers to each prompt
    max_tokens: int
    sampling: Sampling
    seed: int
    stop: tuple[str, ...]
    stop_ids: tuple[int, ...]
    top: int  # most likely tokens to list beside each token; -1: no log-probabilities
    echo: bool
    stream: bool
    usage: bool  # whether a stream ends with the number of tokens

    def requests(self, context: int) -> list[Request]:
        """One for each answer, in OpenAI's order: all answers to the first prompt, then those to the second."""
        return [
            Request(
                prompt=prompt,
                max_new_tokens=min(self.max_tokens, context - len(prompt)),
                sampling=self.sampling,
                seed=self.seed,
                sample=i,
                stop_ids=self.stop_ids,
                top_logprobs=self.top,
                score_prompt=self.echo and self.top >= 0,
            )
            for prompt in self.prompts
            for i in range(self.n)
        ]


def _wrong(param: str, what: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, f"{shown(param)}: {what}", shown(param), code)


def _typed(value: dict, kind: type, where: str = "") -> msgspec.Struct:
    """`value` as `kind`; null fields count as absent. Raises ApiError with the path of the field that does not fit."""
    value = {name: field for name, field in value.items() if field is not None}
    neutral = NEUTRAL_OF_MESSAGE if kind is Message else NEUTRAL
    for name in value.keys() & neutral.keys() - set(kind.__struct_fields__):
        if value[name] not in neutral[name] and neutral[name] is not IGNORED:
            raise _wrong(where + name, "is not supported; leave it out", "unsupported_parameter")
        del value[name]
    try:
        return files.typed(value, kind)
    except ValueError as error:
        what, _, path = str(error).replace(" | null`", "`").partition(" - at `$")
        path = (where + path.strip("`.")).rstrip(".")
        if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", what, re.DOTALL):
            near = difflib.get_close_matches(unknown[1], kind.__struct_fields__, 1)
            path, what = where + unknown[1], "is not a field of this request" + (f"; did you mean {near[0]}?" if near else "")
        elif missing := re.fullmatch(r"Object missing required field `(.*)`", what):
            path, what = where + missing[1], "is missing"
        raise _wrong(path, what[:1].lower() + what[1:]) from None


def parse(body: bytes, kind: type[Common], loaded: Loaded, template: chat.Template | None) -> Query:
    """The request in `body`. Raises ApiError naming the field that is wrong, and UserError for messages that do not fit."""
    try:
        fields = _typed(files.decode_json(body, dict[str, object]), kind)
    except ValueError as error:
        raise ApiError(400, f"the body is not a JSON object: {error}", code="invalid_json") from None
    is_chat = kind is Chat
    if is_chat:
        prompts, bos = [_encode_chat(fields.messages, loaded, template)], False
        most, top = min(fields.max_tokens, fields.max_completion_tokens), fields.top_logprobs if fields.logprobs else -1
        if fields.top_logprobs and not fields.logprobs:
            raise _wrong("top_logprobs", "needs logprobs: true")
    else:
        prompts, bos = _encode_prompts(fields.prompt, loaded)
        most, top = fields.max_tokens, -1 if fields.logprobs is None else fields.logprobs
    eos = loaded.tokenizer.eos_id
    stop = (fields.stop,) if isinstance(fields.stop, str) else tuple(fields.stop)
    return Query(
        chat=is_chat,
        model=fields.model,
        prompts=prompts,
        bos=bos,
        n=fields.n,
        max_tokens=most,
        # top_p = 0 means the most likely token alone; `Sampling` needs more than 0, and 1e-6 has the same effect
        sampling=Sampling(fields.temperature, fields.top_k, max(fields.top_p, 1e-6), fields.min_p, fields.repetition_penalty),
        seed=secrets.randbits(31) if fields.seed is None else fields.seed % 2**31,
        stop=stop + (chat.stop_texts(template, loaded.tokenizer) if is_chat else ()),
        stop_ids=tuple({*(chat.stop_ids(template, loaded.tokenizer) if is_chat else ()), *((eos,) if eos >= 0 else ())}),
        top=top,
        echo=not is_chat and fields.echo,
        stream=fields.stream,
        usage=fields.stream_options.include_usage,
    )


def _encode_chat(messages: list[dict], loaded: Loaded, template: chat.Template | None) -> list[int]:
    if template is None:
        raise ApiError(400, "this model has no chat template; use /v1/completions, or start serve with --template", "messages")
    out = []
    for i, fields in enumerate(messages):
        message = _typed(fields, Message, f"messages[{i}].")
        if message.role not in ROLES:
            raise _wrong(f"messages[{i}].role", f"must be one of {', '.join(ROLES)}")
        parts = [Part("text", message.content)] if isinstance(message.content, str) else message.content
        if other := [part.type for part in parts if part.type != "text"]:
            raise _wrong(f"messages[{i}].content", f"{shown(other[0])!r} is not supported, only text", "unsupported_parameter")
        out.append({"role": ROLES[message.role], "content": "".join(part.text for part in parts)})
    return chat.encode(template, loaded.tokenizer, out, begin_with_bos=loaded.begin_with_bos)


def _encode_prompts(prompt: str | list, loaded: Loaded) -> tuple[list[list[int]], bool]:
    """(ids of each prompt, whether bos was put before them). Prompts of ids are taken as they are."""
    tokenizer = loaded.tokenizer
    if isinstance(prompt, list) and len({type(part) for part in prompt}) > 1:
        raise _wrong("prompt", "must be one text, a list of texts, a list of token ids or a list of such lists, not a mixture")
    prompts = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    if len(prompts) > PROMPTS:
        raise _wrong("prompt", f"has {len(prompts):,} prompts, and the most is {PROMPTS:,}")
    if isinstance(prompts[0], list):
        if (largest := max(max(ids) for ids in prompts)) >= tokenizer.vocab_size:
            raise _wrong("prompt", f"the token id {largest} is outside the vocabulary of {tokenizer.vocab_size:,} tokens")
        return prompts, False
    ids = [first_tokens(tokenizer, loaded.begin_with_bos, text) for text in prompts]
    return ids, loaded.begin_with_bos and tokenizer.bos_id >= 0
