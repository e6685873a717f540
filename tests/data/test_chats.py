"""Conversations as blocks: what is learned under each template, what is cut and left out, packing, folders that are kept."""

import itertools
import json

import numpy as np
import pytest
from conftest import train

from tinyllama_jax.base.dims import FIRST, LEARNED
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.data import chat, control
from tinyllama_jax.data import tokenizer as tokenizer_lib
from tinyllama_jax.data.blocks import Blocks
from tinyllama_jax.data.chat import TEMPLATES, Template
from tinyllama_jax.data.export import added_tokens
from tinyllama_jax.data.prepare import chats

OWN = """\
{{ bos_token }}{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}{{ m.content }}[end]\
{% endgeneration %}{% else %}{{ m.content }}{% endif %}
{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"""
ENDS = {"guanaco": ("### Human:", "</s>"), "chatml": ("<|im_end|>",) * 2, "zephyr": ("</s>",) * 2, "its own": ("[end]",) * 2}


@pytest.fixture(scope="module")
def sp(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sp")
    (folder / "tokenizer.model").write_bytes(train("prefix"))
    (folder / "chat_template.jinja").write_text(OWN)
    return tokenizer_lib.load(folder)


def template(name, sp):
    return chat.choose(sp.folder, sp, None if name == "its own" else name)


def turns(*texts):
    return [{"role": role, "content": text} for role, text in zip(itertools.cycle(("user", "assistant")), texts, strict=False)]


def written(folder, rows, encoder):
    """(the folder that is made from rows of messages, the line about it)."""
    folder.mkdir(exist_ok=True)
    (folder / "talks.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return chats.prepared(str(folder / "talks.jsonl"), encoder, folder / "prepared", 5.0)


def conversations(blocks):
    """(ids, marks) of each conversation of a split, in order."""
    read, out = blocks.sequences(np.arange(len(blocks))), []
    for tokens, length, marks in zip(read.tokens, read.length, read.marks, strict=True):
        assert not marks[length:].any() and not tokens[length:].any()  # padding is never learned
        starts = [*np.flatnonzero(marks & FIRST).tolist(), int(length)]
        assert starts[0] == 0
        out += [(tokens[a:b].tolist(), marks[a:b]) for a, b in itertools.pairwise(starts)]
    return out


@pytest.mark.parametrize("grown", [False, True], ids=["as it is", "with ChatML's tokens"])
@pytest.mark.parametrize("name", ENDS)
def test_answers_are_learned_with_what_ends_them_and_nothing_else(name, grown, sp, tmp_path):
    tokenizer = added_tokens.extended(sp, "<|im_start|>,<|im_end|>", tmp_path / "grown") if grown else sp
    folder, line = written(
        tmp_path, [turns("Q1", "A1", "Q2", "A2", "Q3")], chats.Encoder(template(name, sp), tokenizer, True, 200)
    )
    ((ids, marks),) = conversations(Blocks(folder, "train"))
    ids, learned = np.array(ids), (marks & LEARNED) > 0
    assert ids[0] == tokenizer.bos_id and (ids == tokenizer.bos_id).sum() == 1 and not learned[0]
    spans = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(learned.astype(int))) + 1)
    parts = [[piece(tokenizer, i) for i in ids[span]] for span in spans if learned[span[0]]]
    assert ["".join(part).replace("▁", " ").strip() for part in parts] == [f"A{i}{end}" for i, end in enumerate(ENDS[name], 1)]
    if name == "chatml" and grown:
        assert [part[-1] for part in parts] == ["<|im_end|>"] * 2  # one token
    assert "1 conversations (0 held out)" in line and f"{learned.sum():,} of them learned" in line


def piece(tokenizer, i):
    text = tokenizer.pieces()[i]
    return chr(int(text[3:-1], 16)) if text.startswith("<0x") else text


def test_a_template_whose_end_is_not_learned_is_refused(sp):
    for name in TEMPLATES:
        chat.check_ends(TEMPLATES[name], sp)
    outside = OWN.replace("[end]{% endgeneration %}", "{% endgeneration %}[end]")
    with pytest.raises(UserError, match=r"what ends an answer \(\[end\] or </s>\) is outside \{% generation %\}"):
        chat.check_ends(Template("x", outside, ("[end]",)), sp)
    last = OWN.replace("[end]{%", "{% if loop.last %}[end]{% endif %}{%")  # only the last answer ends within
    with pytest.raises(UserError, match="so a model would not learn to stop"):
        chat.check_ends(Template("x", last, ("[end]",)), sp)
    with pytest.raises(UserError, match="does not mark the answers"):
        chat.check_ends(Template("x", "{{ messages[0].content }}", ()), sp)


def test_long_conversations_are_cut_after_an_answer_and_short_of_one_left_out(sp, tmp_path):
    long = "word " * 30
    rows = [
        turns("Q1", "A1", "Q2", "A2"),
        turns("Q1", "A1", long, "A2", "Q3", "A3"),  # its second turn does not fit
        turns(long, "A1"),
        turns("Q1"),
        [{"role": "assistant", "content": "x"}, *turns("Q1", "A1")],
        turns("Q1", "A1", "Q2", " "),
    ]
    refusing = "{% if messages[0].role == 'assistant' %}{{ raise_exception('a question comes first') }}{% endif %}"
    encoder = chats.Encoder(TEMPLATES["zephyr"]._replace(source=refusing + TEMPLATES["zephyr"].source), sp, True, 100)
    folder, line = written(tmp_path, rows, encoder)
    texts = ["".join(piece(sp, i) for i in ids).replace("▁", " ") for ids, _ in conversations(Blocks(folder, "train"))]
    assert [("A1" in text, "A2" in text) for text in texts] == [(True, True), (True, False)]
    assert all(text.rstrip().endswith("</s>") for text in texts)  # cut at a turn, with its end
    file = tmp_path / "talks.jsonl"
    kept, whole = (len(encoder._replace(width=1_000).encode(row)[0]) for row in (rows[1][:2], rows[1]))
    place = f"the first: {file}, line 2 ({kept} of {whole} tokens kept)"
    assert f"1 cut after an answer that fits, {place}" in line and "2 conversations" in line
    assert f"left out 1 refused by the chat template, the first: {file}, line 5: the chat template zephyr refuses" in line
    n = len(encoder._replace(width=1_000).encode(rows[2])[0])
    place = f"{file}, line 3 ({n} tokens, and there is room for 100: raise --model.seq_len=99)"
    assert f"left out 1 whose first turn does not fit, the first: {place}" in line
    assert f"left out 1 with an empty answer, the first: {file}, line 6" in line
    assert f"left out 1 without an assistant turn, the first: {file}, line 4" in line
    dropped = Blocks(folder, "train").manifest["splits"]["train"]["dropped"]
    assert sum(dropped.values()) == 4


def test_a_conversation_may_fill_a_block(sp):
    encoder = chats.Encoder(TEMPLATES["zephyr"], sp, True, 1_000)
    whole, *_ = encoder.encode(turns("Q1", "A1", "Q2", "A2"))
    for width, note in ((len(whole), ""), (len(whole) - 1, chats.CUT)):
        tokens, cut, _ = encoder._replace(width=width).encode(turns("Q1", "A1", "Q2", "A2"))
        assert cut == note and (len(tokens) == width) == (not note)


def test_nothing_to_learn_from_is_an_error(sp, tmp_path):
    encoder = chats.Encoder(TEMPLATES["zephyr"], sp, True, 100)
    with pytest.raises(UserError, match=r"no conversation to learn from \(2 without an assistant turn, the first: .*line 1\)"):
        written(tmp_path, [turns("Q1"), turns("Q2")], encoder)
    with pytest.raises(UserError, match=r"no conversation to learn from \(it is empty\)"):
        written(tmp_path, [], encoder)


def test_packing_fills_blocks_and_loses_nothing():
    lengths = np.minimum(np.random.default_rng(0).geometric(1 / 300, 3_000), 1_000)
    blocks = chats.pack(lengths, 1_000)
    assert sorted(i for block in blocks for i in block) == list(range(3_000))
    sizes = [lengths[block].sum() for block in blocks]
    assert max(sizes) <= 1_000 and 1 - sum(sizes) / (1_000 * len(blocks)) < 0.01
    assert blocks == chats.pack(lengths, 1_000) and [block[0] for block in blocks] == sorted(block[0] for block in blocks)


def test_packing_has_windows(monkeypatch):
    monkeypatch.setattr(chats, "WINDOW", 10)
    lengths = np.full(25, 1)
    assert [len(block) for block in chats.pack(lengths, 100)] == [10, 10, 5]


def test_a_share_is_held_out_and_copies_stay_together():
    digests = np.random.default_rng(0).integers(0, 2**63, 1_000).astype(np.uint64)
    assert chats.held_out(digests).sum() == 20
    assert (chats.held_out(np.tile(digests, 2)).reshape(2, -1) == chats.held_out(np.tile(digests, 2))[:1_000]).all()
    assert chats.held_out(digests[:10]).sum() == 1 and not chats.held_out(digests[:9]).any()
    assert not chats.held_out(np.ones(50, np.uint64)).any()  # copies of one conversation


ROWS = [turns(f"What is {i}?", f"It is {i * i}.") for i in range(40)]


def test_the_folder_is_kept_until_something_changes(sp, tmp_path):
    encoder = chats.Encoder(TEMPLATES["zephyr"], sp, True, 60)
    folder, line = written(tmp_path / "a", ROWS, encoder)
    again, also = written(tmp_path / "a", ROWS, encoder)
    assert again == folder and line.replace("written in", "kept in") == also
    bytes_of = lambda folder: {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    elsewhere, _ = written(tmp_path / "b", ROWS, encoder)
    assert elsewhere.name == folder.name and bytes_of(elsewhere) == bytes_of(folder)  # the same bytes each time
    others = {
        written(tmp_path / "a", ROWS[:-1], encoder)[0],
        written(tmp_path / "a", ROWS, encoder._replace(template=TEMPLATES["guanaco"]))[0],
        written(tmp_path / "a", ROWS, encoder._replace(width=61))[0],
        written(tmp_path / "a", ROWS, encoder._replace(begin_with_bos=False))[0],
    }
    assert len(others | {folder}) == 5
    assert {p.name for p in (tmp_path / "a/prepared").iterdir()} == {".lock", folder.name, *(o.name for o in others)}
    train_, held = (conversations(Blocks(folder, split)) for split in ("train", "validation"))
    assert (len(train_), len(held)) == (39, 1)
    own = chat.of_folder(folder, tokenizer_lib.load(folder / "tokenizer"))
    assert own.source == TEMPLATES["zephyr"].source


def test_several_processes_write_the_same(sp, tmp_path, monkeypatch):
    encoder = chats.Encoder(TEMPLATES["zephyr"], sp, True, 60)
    alone, _ = written(tmp_path / "a", ROWS, encoder)
    monkeypatch.setattr(chats, "ONE_PROCESS", 0)
    monkeypatch.setattr(chats, "CHUNK", 7)
    several, _ = written(tmp_path / "b", ROWS, encoder)
    assert Blocks(several, "train").manifest == Blocks(alone, "train").manifest


def test_a_half_written_folder_is_written_again(sp, tmp_path):
    encoder = chats.Encoder(TEMPLATES["zephyr"], sp, True, 60)
    folder, _ = written(tmp_path, ROWS, encoder)
    folder.rename(folder.with_name(folder.name + ".partial"))
    assert written(tmp_path, ROWS, encoder)[0] == folder and Blocks(folder, "train")
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"is in the way, and has no manifest.json; delete it"):
        written(tmp_path, ROWS, encoder)


def test_one_process_writes_and_the_others_wait(sp, tmp_path, monkeypatch):
    encoder = chats.Encoder(TEMPLATES["zephyr"], sp, True, 60)
    folder, _ = written(tmp_path, ROWS, encoder)
    lock = chats.claim(folder.parent / ".lock", "busy")
    with pytest.raises(UserError, match="the process that writes there has not moved for 0.3 s"):
        chats.prepared(str(tmp_path / "talks.jsonl"), encoder, folder.parent, 0.3)
    chats.os.close(lock)
    assert chats.prepared(str(tmp_path / "talks.jsonl"), encoder, folder.parent, 0.3)[0] == folder


def test_added_tokens(sp, tmp_path):
    grown = added_tokens.extended(sp, "<|im_start|>,<|im_end|>", tmp_path / "a")
    assert (sp.vocab_size, grown.vocab_size) == (700, 702) and grown.sha256 != sp.sha256
    assert control.tokens(grown)["<|im_end|>"] == 701 and (grown.bos_id, grown.eos_id) == (sp.bos_id, sp.eos_id)
    assert grown.encode("def x():\n  y") == sp.encode("def x():\n  y")
    assert added_tokens.extended(grown, "<|im_end|>", tmp_path / "b") is grown and added_tokens.extended(sp, "", tmp_path) is sp
    for added, words in {"de": "is a plain piece", "a b": "has no white space"}.items():
        with pytest.raises(UserError, match=f"--model.added_tokens={added}: .*{words}"):
            added_tokens.extended(sp, added, tmp_path / "c")
    from tinyllama_jax.data.export import tokenizer as exporter

    exporter.export(sp, tmp_path / "hf", True, 128)
    (tmp_path / "hf/tokenizer.model").unlink()
    hf = added_tokens.extended(tokenizer_lib.load(tmp_path / "hf"), "<|im_start|>,<|im_end|>", tmp_path / "d")
    text = "<|im_start|>user\nQ<|im_end|>\n"
    assert control.encode(hf, text)[0] == control.encode(grown, text)[0]


def test_packed_conversations_have_the_loss_of_each_alone(sp, tmp_path):
    import jax

    from tinyllama_jax.base import config as c
    from tinyllama_jax.core import model
    from tinyllama_jax.core.losses import Answers, Batch

    width = 129
    precision = {"precision": "params=float32,compute=float32,output=float32", "residual": "float32", "loss_chunk": 64}
    cfg = c.Model(1, 32, 4, 2, 48, sp.vocab_size, width - 1, **precision)
    data = c.Data({"a": 1}, document_mask=True)
    config = c.Config("w", cfg, data, c.Optim(1e-3, 1e-4, 1, 0.1, 1.0), c.Train(3, width - 1, 1), c.Checkpoint(1))
    params = jax.tree.map(lambda w: 5 * w, model.init(jax.random.key(0), cfg))
    folder, _ = written(
        tmp_path, [turns("Q", "A " * i, "Q2", "x") for i in range(1, 7)], chats.Encoder(TEMPLATES["zephyr"], sp, True, width)
    )
    blocks = Blocks(folder, "train")
    read = blocks.sequences(np.arange(len(blocks)))
    assert len(blocks) < 6
    total = lambda batch: [Answers().sums(params, batch, config).loss, Answers().predicted(batch, config).sum()]
    packed = total(Batch(read.tokens, read.length, marks=read.marks))
    apart = np.zeros(2)
    for ids, marks in conversations(blocks):
        pad = lambda a, dtype: np.pad(np.array(a, dtype), (0, width - len(a)))[None]
        apart += total(Batch(pad(ids, np.uint16), np.full(1, len(ids), np.int32), marks=pad(marks, np.uint8)))
    np.testing.assert_allclose(packed, apart, rtol=1e-5)


def test_an_audit_counts_conversations(sp, tmp_path):
    from tinyllama_jax.data.audit.report import audit

    folder, _ = written(tmp_path, ROWS, chats.Encoder(TEMPLATES["zephyr"], sp, True, 60))
    assert not audit([str(folder)], tmp_path / "page.html", samples=0)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["train"]["documents"] += 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert audit([str(folder)], tmp_path / "page.html", samples=0)
    assert "says 40 conversations; there are 39" in (tmp_path / "page.html").read_text()
