"""GGUF files: what is written and read, in whole files and in parts, in damaged ones, and in llama.cpp's other types."""

import dataclasses
import random
import re
import resource
import struct
import sys
import tracemalloc

import numpy as np
import pytest
from test_hf import GQA, MODELS, assert_same, random_params

from tinyllama_jax.base.errors import UserError
from tinyllama_jax.hub import gguf, gguf_header, gguf_keys, llama

package = pytest.importorskip("gguf", reason="the package that writes GGUF")

WIDE = dataclasses.replace(GQA, d_model=96, d_ff=64)  # rows of 32: heads of 16
Q, K = (f"model.layers.1.self_attn.{p}_proj.weight" for p in "qk")


def vocabulary(n: int) -> dict:
    return {"tokenizer.ggml.model": "llama", gguf.TOKENS: [f"t{i}" for i in range(n)], "tokenizer.ggml.bos_token_id": 1}


def write(path, cfg=WIDE, params=None, quantize="f32", tokens=None, **options):
    params = params or random_params(cfg)
    return gguf.write(path, llama.to_hf(params, cfg), cfg, vocabulary(tokens or cfg.vocab_size), quantize, "it", **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "whole.gguf"
    write(path)
    return path


# -- there and back -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", MODELS.values(), ids=MODELS)
def test_fp32_comes_back_bit_for_bit(cfg, tmp_path):
    params = random_params(cfg)
    params["final_norm"]["scale"][:4] = [np.nan, np.inf, -0.0, 1e-45]
    assert write(tmp_path / "it.gguf", cfg, params) == [tmp_path / "it.gguf"]
    back, model, metadata = gguf.load(tmp_path / "it.gguf", allow_non_finite=True)
    assert_same(back, params)
    assert dataclasses.replace(model, precision=cfg.precision, residual=cfg.residual) == cfg
    assert metadata[gguf.TOKENS][-1] == f"t{cfg.vocab_size - 1}" and metadata["general.name"] == "it"
    with pytest.raises(UserError, match=r"it.gguf: model.norm.weight has 2 numbers that are NaN or infinite"):
        gguf.load(tmp_path / "it.gguf")


@pytest.mark.parametrize("quantize", gguf.TYPES)
def test_the_packages_own_reader_reads_what_was_written(quantize, tmp_path):
    params = random_params(WIDE)
    tensors = dict(llama.to_hf(params, WIDE))
    write(tmp_path / "it.gguf", params=params, quantize=quantize)
    reader = package.GGUFReader(tmp_path / "it.gguf")
    values = {key: field.contents() for key, field in reader.fields.items()}
    assert values["general.architecture"] == "llama" and values["general.file_type"] == gguf.TYPES[quantize][0]
    expected = {"block_count": 3, "context_length": 64, "embedding_length": 96, "feed_forward_length": 64, "vocab_size": 101}
    expected |= {"attention.head_count": 6, "attention.head_count_kv": 2, "rope.dimension_count": 16, "rope.freq_base": 1e4}
    assert {key: values[f"llama.{key}"] for key in expected} == expected
    ours = gguf.read(tmp_path / "it.gguf").tensors
    by_name = {tensor.name: tensor for tensor in reader.tensors}
    assert len(by_name) == len(ours) == len(tensors)
    for theirs, name in (("blk.1.attn_q.weight", Q), ("blk.1.ffn_down.weight", "model.layers.1.mlp.down_proj.weight")):
        kind = by_name[theirs].tensor_type
        assert kind.name.lower() == quantize
        read = package.quants.dequantize(by_name[theirs].data, kind)
        if name == Q:  # a head's rows 0, 1, 2, 3 are ours 0, 8, 1, 9: pairs side by side
            read = np.stack([read[16 * (row // 16) + 2 * (row % 8) + row % 16 // 8] for row in range(96)])
        assert np.array_equal(read, np.asarray(ours[name]))
        assert np.abs(read - tensors[name]).max() <= {"f32": 0, "f16": 1e-3, "bf16": 1e-2, "q8_0": 0.01, "q4_0": 0.2}[quantize]
    norm = by_name["blk.1.attn_norm.weight"]
    assert norm.tensor_type.name == "F32" and np.array_equal(norm.data, tensors["model.layers.1.input_layernorm.weight"])


def test_a_tied_head_and_rows_without_a_token_are_left_out(tmp_path):
    params = random_params(WIDE)
    params["lm_head"]["kernel"] = params["embed"]["embedding"].T.copy()
    write(tmp_path / "it.gguf", params=params, tokens=90, tied=True)
    read = gguf.read(tmp_path / "it.gguf")
    assert read.tied and read.model.vocab_size == 90
    assert "output.weight" not in {tensor.name for tensor in package.GGUFReader(tmp_path / "it.gguf").tensors}
    params["embed"]["embedding"] = params["embed"]["embedding"][:90]
    params["lm_head"]["kernel"] = params["lm_head"]["kernel"][:, :90]
    assert_same(gguf.load(tmp_path / "it.gguf")[0], params)


def test_every_type_that_the_package_converts_is_read(tmp_path):
    rng, types = np.random.default_rng(0), 0
    for kind in package.GGMLQuantizationType:
        block, size = package.GGML_QUANT_SIZES[kind]
        raw = rng.integers(0, 60, (4, 256 // block * size), np.uint8)
        writer = package.GGUFWriter(tmp_path / "it.gguf", "llama")
        writer.add_tensor("x", raw, raw_dtype=kind)
        for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
            step()
        try:
            expected = package.quants.dequantize(raw, kind)
        except NotImplementedError:
            with pytest.raises(
                UserError, match=f"the tensor x is of type {kind.name}, which the package gguf does not convert"
            ):
                gguf._read_file(tmp_path / "it.gguf")
            continue
        ((_, tensor),) = gguf._read_file(tmp_path / "it.gguf")[1].items()
        assert tensor.shape == (4, 256) and np.array_equal(np.asarray(tensor), expected, equal_nan=True), kind.name
        types += 1
    assert types >= 20


def test_a_damaged_scale_is_named_without_a_warning(tmp_path):
    write(tmp_path / "it.gguf", quantize="q8_0")
    data = bytearray((tmp_path / "it.gguf").read_bytes())
    start = len(data) - gguf_header.parse(np.frombuffer(data, np.uint8)).body.size
    data[start : start + 34] = np.float16(np.inf).tobytes() + bytes(32)  # the first block: infinity times 0
    (tmp_path / "it.gguf").write_bytes(data)
    with pytest.raises(UserError, match="model.embed_tokens.weight has 32 numbers that are NaN or infinite"):
        gguf.load(tmp_path / "it.gguf")


def test_what_a_type_cannot_hold_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--quantize q4_0: model.embed_tokens.weight has rows of 24 numbers, .* blocks of 32"):
        write(tmp_path / "it.gguf", GQA, quantize="q4_0")
    params = random_params(WIDE)
    params["layers"]["q"]["kernel"][1, 0, 0, 0] = 1e6
    with pytest.raises(UserError, match=rf"--quantize f16: {re.escape(Q)} holds 1e\+06, which f16 cannot; use bf16 or f32"):
        write(tmp_path / "it.gguf", params=params, quantize="f16")
    write(tmp_path / "it.gguf", params=params, quantize="q8_0")


def test_a_full_disk_is_named(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="No space left on device"):
            write(tmp_path / "it.gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_without_the_package_one_line_says_what_to_install(whole, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    for use in (lambda: gguf.read(whole), lambda: write(whole.with_name("other.gguf"))):
        with pytest.raises(UserError, match="pip install gguf"):
            use()


# -- RoPE ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("factor", "theta", "head"), [(8.0, 5e5, 128), (32.0, 5e5, 64)], ids=["Llama 3.1", "Llama 3.2"])
def test_llama_3s_numbers_come_back_from_its_factors(factor, theta, head):
    rope = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 8_192
    factors = gguf_keys.factors_of({"rope_scaling": rope, "rope_theta": theta}, head)
    assert factors[0] == 1 and factors[-1] == factor and factors.shape == (head // 2,)
    assert gguf_keys._llama3(factors, {"rope_theta": theta}, head, "it") == rope
    with pytest.raises(UserError, match="rope_freqs.weight is not of Llama 3's form"):
        gguf_keys._llama3(factors + 0.1, {"rope_theta": theta}, head, "it")
    torch = pytest.importorskip("torch", reason="Transformers' functions for RoPE need it")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(head_dim=head, rope_parameters={**rope, "rope_theta": theta}, max_position_embeddings=131_072)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    np.testing.assert_allclose(theta ** (-np.arange(0, head, 2) / head) / factors, scaled.numpy(), rtol=1e-5)


# -- parts --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path):
    return write(tmp_path / "it.gguf", quantize="f16", shard_bytes=150_000)


def test_a_split_file_is_read_from_any_part(parts, tmp_path):
    names = [f"it-{i:05}-of-{len(parts):05}.gguf" for i in range(1, len(parts) + 1)]
    assert len(parts) > 2 and [path.name for path in parts] == names
    assert all(path.stat().st_size <= 150_000 for path in parts)
    write(tmp_path / "one.gguf", quantize="f16")
    for path in parts:
        assert_same(gguf.load(path)[0], gguf.load(tmp_path / "one.gguf")[0])
    assert write(tmp_path / "few.gguf", shard_bytes=10_000_000) == [tmp_path / "few.gguf"]  # one suffices
    with pytest.raises(UserError, match=r"--shard-size 0.1: model.embed_tokens.weight and the vocabulary have 1\d\d,\d+ bytes"):
        write(tmp_path / "it.gguf", shard_bytes=100_000)


def test_parts_that_do_not_fit_are_refused(parts, tmp_path):
    one, two, three = parts[:3]
    content = two.read_bytes()
    two.unlink()
    with pytest.raises(UserError, match=r"it-00002-of-0000\d.gguf: no such file; .* which must be in one folder"):
        gguf.read(one)
    two.write_bytes(three.read_bytes())
    with pytest.raises(UserError, match=r"it-00002-of-0000\d.gguf: says that it is part 2 of \d, counted from 0"):
        gguf.read(one)
    two.write_bytes(content)
    lone = one.rename(tmp_path / "renamed.gguf")
    with pytest.raises(UserError, match=r"renamed.gguf: is one of \d parts; llama.cpp's name for such is NAME-00001-of-0000N"):
        gguf.read(lone)


# -- damage -------------------------------------------------------------------------------------------------------------


def test_a_file_cut_short_anywhere_is_refused(whole, tmp_path):
    data, cut = whole.read_bytes(), tmp_path / "cut.gguf"
    for n in [*range(0, 8_000, 61), *range(8_000, len(data), 20_011), len(data) - 33]:
        cut.write_bytes(data[:n])
        with pytest.raises(UserError, match="is not a whole GGUF file: it ") as caught:
            gguf.read(cut)
        assert str(caught.value).count("\n") == 0


def patched(data: bytes, key: str, value: bytes) -> bytes:
    at = data.index(key.encode()) + len(key)
    return data[:at] + value + data[at + len(value) :]


number = lambda letter, value: struct.pack(f"<{letter}", value)
DAMAGES = {
    "magic": (lambda d: b"GGML" + d[4:], "it does not begin with GGUF"),
    "big-endian": (lambda d: d[:4] + b"\0\0\0\3" + d[8:], "or big-endian; only 2 and 3 are read"),
    "tensors": (lambda d: d[:8] + number("Q", 2**62) + d[16:], "it says that it has 4,611,686,018,427,387,904 tensors"),
    "keys": (lambda d: d[:16] + number("Q", 2**40) + d[24:], "it says that it has 1,099,511,627,776 keys"),
    "more keys": (lambda d: d[:16] + number("Q", 60_000) + d[24:], "is not a whole GGUF file"),
    "texts": (lambda d: patched(d, "ggml.tokens", struct.pack("<IIQ", 9, 8, 2**33)), "texts in one array"),
    "numbers": (lambda d: patched(d, "ggml.tokens", struct.pack("<IIQ", 9, 12, 2**61)), "it ends after"),
    "array of arrays": (lambda d: patched(d, "ggml.tokens", struct.pack("<IIQ", 9, 9, 9)), "unknown type 9"),
    "long text": (lambda d: patched(d, "general.name", struct.pack("<IQ", 8, 2**63)), "it ends after"),
    "no UTF-8": (lambda d: d.replace(b"t100", b"\xff100"), "codec can't decode"),
    "type": (lambda d: patched(d, "blk.1.attn_q.weight", struct.pack("<IQQI", 2, 96, 96, 99)), "99 is not a valid GGML"),
    "shape": (lambda d: patched(d, "blk.1.attn_q.weight", struct.pack("<IQQ", 2, 96, 2**60)), "it ends within"),
    "other shape": (lambda d: patched(d, "blk.1.attn_q.weight", struct.pack("<IQQ", 2, 48, 96)), r"shape \[96, 48\], but"),
    "dimensions": (lambda d: patched(d, "blk.1.attn_q.weight", struct.pack("<I", 2**31)), "has 2147483648 dimensions"),
    "offset": (lambda d: patched(d, "blk.1.attn_q.weight", struct.pack("<IQQIQ", 2, 96, 96, 0, 2**50)), "it ends within"),
    "twice": (lambda d: d.replace(b"blk.1.attn_q", b"blk.0.attn_q"), "it has the tensor blk.0.attn_q.weight twice"),
    "unknown tensor": (lambda d: d.replace(b"blk.1.attn_q", b"blk.9.attn_q"), f"no tensor {Q}; the tensors do not fit"),
    "architecture": (lambda d: patched(d, "general.architecture", struct.pack("<IQ", 8, 5) + b"gemma"), "is 'gemma'; only"),
    "missing key": (lambda d: d.replace(b"llama.block_count", b"llama.block_COUNT"), "its metadata lack llama.block_count"),
    "layers": (lambda d: patched(d, "llama.block_count", struct.pack("<II", 4, 2**31 - 1)), "4,096 are the most"),
    "width": (lambda d: patched(d, "llama.embedding_length", struct.pack("<II", 4, 2**30)), "but attention.value_length or"),
    "heads": (lambda d: patched(d, "attention.head_count", struct.pack("<II", 4, 0)), "of a wrong type or size"),
    "kind of number": (lambda d: patched(d, "llama.block_count", struct.pack("<If", 6, 3.5)), "`int`, got `float`"),
    "partial rotary": (lambda d: patched(d, "rope.dimension_count", struct.pack("<II", 4, 8)), "or rope.dimension_count is 8"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_line_and_takes_no_memory(damage, whole, tmp_path):
    change, says = DAMAGES[damage]
    (tmp_path / "it.gguf").write_bytes(change(whole.read_bytes()))
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=rf"it\.gguf: .*{says}") as caught:
            gguf.load(tmp_path / "it.gguf")
        assert tracemalloc.get_traced_memory()[1] < 8e6
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)


def test_damaged_bytes_are_read_or_refused(whole, tmp_path):
    data, rng = whole.read_bytes(), random.Random(0)
    header = data.index(b"token_embd") + 2_000
    for _ in range(300):
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 3))):
            changed[rng.randrange(header)] = rng.choice((0, 1, 255, rng.randrange(256)))
        (tmp_path / "it.gguf").write_bytes(changed)
        try:
            gguf.load(tmp_path / "it.gguf", allow_non_finite=True)
        except UserError as error:
            assert "\n" not in str(error)


def test_overlapping_tensors_and_a_folder_are_refused(whole, tmp_path):
    data = whole.read_bytes()
    header = gguf_header.parse(np.frombuffer(data, np.uint8))
    place = header.places["output.weight"]  # the last one
    info = b"output.weight" + struct.pack("<IQQI", 2, *place.shape[::-1], place.kind)
    at = data.index(info) + len(info)
    moved = data[:at] + struct.pack("<Q", 0) + data[at + 8 :]
    (tmp_path / "it.gguf").write_bytes(moved[: place.offset - header.body.size])
    with pytest.raises(UserError, match="its tensors overlap"):
        gguf.read(tmp_path / "it.gguf")
    with pytest.raises(UserError, match="is not a regular file"):
        gguf.read(tmp_path)
    with pytest.raises(FileNotFoundError):
        gguf.read(tmp_path / "none.gguf")
