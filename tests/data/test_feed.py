"""The data order: every block once an epoch, however many read, and a batch that depends on nothing but its step."""

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest

from tinyllama_jax.base import cli
from tinyllama_jax.base import config as c
from tinyllama_jax.base.errors import UserError
from tinyllama_jax.core import step as step_lib
from tinyllama_jax.core.losses import Batch
from tinyllama_jax.data import feed
from tinyllama_jax.data.blocks import Blocks
from tinyllama_jax.data.mixture import Mixture
from tinyllama_jax.run import initialize


def batches(config, sources, shape, rows, start=0):
    size = {"train.tokens_per_step": str(shape[0] * shape[1] * config.model.seq_len)}
    endless = cli.override(config, {"train.steps": "100_000", **size})
    return feed.training(endless, sources, shape[1], np.asarray(rows), start)


@pytest.mark.parametrize("readers", [1, 2, 3, 8, 16])
def test_each_block_exactly_once_an_epoch_over_all_readers(tiny_config, readers):
    sources = feed.open_sources(tiny_config)[:1]  # one source: its epochs are those of the run
    n, batch = len(sources[0]), 48
    everything, lengths = sources[0].read(np.arange(n))
    one = cli.override(tiny_config, {"data.sources": next(iter(tiny_config.data.sources))})
    epochs = 3
    steps = -(-epochs * n // batch)
    read = [batches(one, sources, (1, batch), np.arange(batch)[r::readers]) for r in range(readers)]
    seen = [[] for _ in range(readers)]
    for _ in range(steps):
        for r in range(readers):
            tokens, length, *_ = next(read[r])
            assert tokens.shape[:2] == length.shape == (1, batch // readers)
            seen[r] += [(t.tobytes(), int(n)) for t, n in zip(tokens[0], length[0], strict=True)]
    # the readers' rows, put back into the order of the global batch
    per_step = [[seen[r][s * (batch // readers) :][: batch // readers] for r in range(readers)] for s in range(steps)]
    stream = [row for step in per_step for rows in zip(*step, strict=True) for row in rows]
    wanted = sorted((t.tobytes(), int(n)) for t, n in zip(everything, lengths, strict=True))
    orders = [stream[e * n : (e + 1) * n] for e in range(epochs)]
    for order in orders:
        assert sorted(order) == wanted
    assert orders[0] != orders[1] != orders[2]  # each epoch has its own order


def test_the_batch_is_a_function_of_the_step_alone(tiny_config):
    sources = feed.open_sources(tiny_config)
    whole = list(itertools.islice(batches(tiny_config, sources, (4, 2), [0, 1]), 30))
    for start in (0, 1, 17, 29):  # a resume reads nothing of what came before
        tokens, length, *_ = next(batches(tiny_config, sources, (4, 2), [0, 1], start))
        np.testing.assert_array_equal(tokens, whole[start][0])
        np.testing.assert_array_equal(length, whole[start][1])
    for shape in ((1, 8), (2, 4), (8, 1)):  # other micro-batches: the same rows in the same order
        got = next(batches(tiny_config, sources, shape, np.arange(shape[1]), 17))
        np.testing.assert_array_equal(got[0].reshape(8, -1), whole[17][0].reshape(8, -1))
    threads = cli.override(tiny_config, {"data.workers": "7"})
    np.testing.assert_array_equal(next(batches(threads, sources, (4, 2), [0, 1], 17))[0], whole[17][0])
    other = cli.override(tiny_config, {"train.seed": "1"})
    assert not np.array_equal(next(batches(other, sources, (4, 2), [0, 1], 17))[0], whole[17][0])


def test_mixed_sources_have_exact_counts_and_no_block_twice_in_an_epoch(tiny_config):
    sources = feed.open_sources(tiny_config)
    order = feed.order(tiny_config, sources)
    source, block = order.locate(np.arange(1_000))
    assert np.bincount(source).tolist() == [700, 300]
    for j, n in enumerate(order.sizes):
        drawn = block[source == j]
        for epoch in range(len(drawn) // n):
            assert sorted(drawn[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_counts_leave_out_skipped_batches(tiny_config):
    config = cli.override(tiny_config, {"data.skip": "3:4,9:9,9:9", "train.batch_ramp": "1024:256"})
    order = feed.order(config, feed.open_sources(config))
    read = np.zeros(2, np.int64)
    assert order.counts(0).tolist() == [0, 0]
    for step in range(1, 20):
        read += np.bincount(order.at(step)[0], minlength=2)
        assert order.counts(step).tolist() == read.tolist()


@pytest.mark.parametrize("changes", [{}, {"data.skip": "3:4"}, {"train.batch_ramp": "1024:256"}])
def test_the_last_recorded_batches_are_read_again(tiny_config, tmp_path, changes):
    config = cli.override(tiny_config, changes | {"workdir": str(tmp_path)})
    sources = feed.open_sources(config)
    order, lines = feed.order(config, sources), []
    for step in range(1, 21):
        tokens, length, *_ = feed.gather(sources, *order.at(step))
        checksum = int(step_lib.checksum(Batch(tokens.reshape(2, -1, 17), length.reshape(2, -1))))
        lines.append({"step": step, "loss": None, "checksum": checksum})
    write = lambda lines, end="": (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + end)
    (line,) = initialize.check_batches(config, sources, 20)
    assert "records none of the steps up to 20: whether the data are the same was not checked" in line
    write([*lines, {"step": 20, "val_loss": 1.0}], '{"step": 2')
    assert initialize.check_batches(config, sources, 0) == []
    for step, n in ((1, 1), (15, 15), (20, 20)):
        assert initialize.check_batches(config, sources, step) == [f"the last {n} recorded batches are as they were"]
    for bad in (0, 13, 19):
        write([*lines[:bad], lines[bad] | {"checksum": lines[bad]["checksum"] ^ 1}, *lines[bad + 1 :]])
        with pytest.raises(UserError, match=rf"step {bad + 1}: its batch is not .* the newest of them: put the old one back"):
            initialize.check_batches(config, sources, 20)
        assert bad == 0 or initialize.check_batches(config, sources, bad)


@pytest.mark.parametrize(("tokens", "n"), [(0, 3), (8 * 16 * 4, 4), (1 << 22, 5)])
def test_at_least_three_batches_are_read_again_and_not_too_many_tokens(tiny_config, tmp_path, monkeypatch, tokens, n):
    config = cli.override(tiny_config, {"workdir": str(tmp_path)})
    sources = feed.open_sources(config)
    batches = [feed.gather(sources, *feed.order(config, sources).at(step)) for step in (1, 2, 3, 5, 7)]
    lines = [{"step": s, "checksum": feed.checksum(batch)} for s, batch in zip((1, 2, 3, 5, 7), batches, strict=True)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(initialize, "READ_AGAIN", tokens)
    assert initialize.check_batches(config, sources, 9) == [f"the last {n} recorded batches are as they were"]


def test_every_file_is_verified_if_asked(tiny_config, tiny_data, tmp_path):
    shutil.copytree(tiny_data / "a", tmp_path / "a")
    config = cli.override(tiny_config, {"data.sources": str(tmp_path / "a")})
    file = next((tmp_path / "a").glob("blocks-train*"))
    whole = file.read_bytes()
    file.write_bytes(bytes([*whole[:-1], whole[-1] ^ 1]))  # of the same size; what ArrayRecord pads with it does not look at
    assert feed.verify(config, feed.open_sources(config)) == []
    asked = cli.override(config, {"data.verify": "true"})
    with pytest.raises(UserError, match=rf"{file}: is not as it was prepared .*copy or prepare the data again"):
        feed.verify(asked, feed.open_sources(asked))
    file.write_bytes(whole)
    (line,) = feed.verify(asked, feed.open_sources(asked))
    assert line.startswith("data.verify: 1 files, ") and "GB/s" in line


def test_two_sources_may_not_share_a_file(tiny_config, tiny_data, tmp_path):
    (tmp_path / "link").symlink_to(tiny_data / "a")
    for other in (tmp_path / "link", tiny_data / "b" / ".." / "a"):
        config = cli.override(tiny_config, {"data.sources": f"{tiny_data}/a:1,{other}:1"})
        with pytest.raises(UserError, match=f"{other} and {tiny_data}/a both have "):
            feed.open_sources(config)


def test_the_order_is_the_same_for_ever(tiny_config):
    """Golden values: a change of them breaks the resume of every existing run."""
    order = feed.Order([1_000_003, 17], Mixture([0.7, 0.3]), 3407, [(0, 0, 4)])
    source, block = order.locate(np.array([0, 1, 2, 3, 1_000_000, 1_464_844_287]))
    assert source.tolist() == [0, 1, 0, 0, 0, 0]
    assert block.tolist() == [209751, 15, 534614, 723458, 981342, 809951]


def test_a_run_of_1_464_844_288_samples_has_random_access():
    order = feed.Order([900_000_000, 400_000_000], Mixture([0.693584, 0.306416]), 1, [(0, 0, 1_024)])
    source, block = order.locate(np.arange(1_464_843_264, 1_464_844_288))
    assert block.min() >= 0 and (block < np.asarray(order.sizes)[source]).all()
    assert len(set(zip(source.tolist(), block.tolist(), strict=True))) == 1_024


def test_a_data_set_of_one_block(tiny_config, tiny_data):
    config = cli.override(tiny_config, {"data.sources": str(tiny_data / "one")})
    sources = feed.open_sources(config)
    assert len(sources[0]) == 1
    tokens, length, *_ = next(batches(config, sources, (2, 4), np.arange(4)))
    assert (tokens == tokens[0, 0]).all() and (length == length[0, 0]).all() and length[0, 0] > 1


def test_validation_reads_each_block_once_and_masks_the_rest(tiny_config):
    blocks = Blocks(next(iter(tiny_config.data.sources)), "validation")
    n, batch = len(blocks), 5
    assert n % batch  # else this shows nothing
    parts = list(feed.validation(blocks, 0, batch, np.arange(batch)))
    length = np.concatenate([p[1] for p in parts])
    assert (length > 0).sum() == n and length[n:].tolist() == [0] * (-n % batch)
    np.testing.assert_array_equal(np.concatenate([p[0] for p in parts])[:n], blocks.read(np.arange(n))[0])
    assert sum((p[1] > 0).sum() for p in feed.validation(blocks, 3, batch, np.arange(batch))) == 3
    halves = [list(feed.validation(blocks, 0, 4, rows)) for rows in (np.arange(2), np.arange(2, 4))]
    assert sum(int(p[1].sum()) for half in halves for p in half) == length.sum()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.seq_len": "32", "train.tokens_per_step": "256"}, "was prepared with --seq-len 16; prepare it again, or"),
        ({"model.vocab_size": "50"}, "was prepared with a tokenizer of"),
    ],
)
def test_data_that_do_not_fit_the_model(tiny_config, change, words):
    with pytest.raises(UserError, match=words):
        feed.open_sources(cli.override(tiny_config, change))


def test_a_document_mask_needs_data_that_say_where_documents_end(tiny_config, monkeypatch):
    config = cli.override(tiny_config, {"data.document_mask": "true"})
    sources = feed.open_sources(config)
    assert feed.eos_id(config, sources) == sources[0].manifest["tokenizer"]["eos_id"] == 2
    monkeypatch.setitem(sources[1].manifest, "eos", False)
    with pytest.raises(UserError, match=r"--data.document_mask=true: needs eos after every document.*/b has 0 bos.*") as error:
        feed.eos_id(config, sources)
    assert f"{next(iter(config.data.sources))} has" not in str(error.value)  # it has eos
    assert feed.eos_id(tiny_config, sources) == 2  # who does not ask for it needs none


def test_sources_of_two_tokenizers_do_not_mix(tiny_config, tiny_data):
    path = str(tiny_data / "a")
    mixed = dataclasses.replace(tiny_config, data=c.Data({path: 1.0, str(tiny_data / "other"): 1.0}))
    with pytest.raises(UserError, match="were prepared with different tokenizers"):
        feed.open_sources(mixed)
