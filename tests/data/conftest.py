"""Small SentencePiece models of several kinds, and documents that are hard to handle."""

import io
import random
from pathlib import Path

import generated
import pytest
import sentencepiece

LLAMA2 = Path(__file__).parents[3] / "shared/data/llama2_tokenizer.model"
# the demo's settings, and others that change what a cut in a text does
KINDS = {
    "demo": {"add_dummy_prefix": False},
    "prefix": {"add_dummy_prefix": True, "allow_whitespace_only_pieces": True},
    "collapsing": {"remove_extra_whitespaces": True},
    "nfkc": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "suffix": {"treat_whitespace_as_suffix": True},
    "across words": {"split_by_whitespace": False},
    "symbols": {"user_defined_symbols": ["e e", "<|x|>", "  \n"]},
    "unigram": {"model_type": "unigram"},
    "no bytes": {"byte_fallback": False},
    "no piece for a space": {"byte_fallback": False, "add_dummy_prefix": False},
}
ODD = [
    "a",
    " ",
    "\0",
    "nul\0inside",
    "👩‍👩‍👧‍👦 family 👍🏽",
    "שלום עולם مرحبا",
    "\u202eabc\u202c",
    "e\u0301 é Å ﬁ ① ｆｕｌｌ　ｗｉｄｔｈ",
    "</s> <s> <unk> <0x0A> x</s>y",
    "▁ ▁▁ a▁b",
    "\r\n\r\n\t \u00a0 \u2003x",
    "line one\nline two\n",
    "\ufeffbyte order mark",
    '{"text": "json"}',
    "2024 words 3.14159",
]


def train(kind: str, **more) -> bytes:
    """A model of 700 pieces, with the options `more`."""
    text = "".join(generated.module(seed, 25_000) for seed in range(6)).split("\n")
    if kind == "no piece for a space":
        text = [word for line in text for word in line.split()]
    model = io.BytesIO()
    defaults = {
        "model_type": "bpe",
        "vocab_size": 700,
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    }
    options = {**defaults, **KINDS[kind], **more}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, minloglevel=2, num_threads=1, **options
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def stores():
    """Local servers in place of S3 and Google Cloud Storage, each with an empty bucket `bucket`."""
    import stand_ins  # needs packages of the extra dev, which `make test-newer` does not install

    with stand_ins.servers():
        yield


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """`models(kind)`: the file of a model of that kind, trained when first asked for."""
    folder = tmp_path_factory.mktemp("models")

    def model(kind: str) -> Path:
        if kind == "llama2":
            if not LLAMA2.is_file():
                pytest.skip("the Llama-2 tokenizer is not at hand")
            return LLAMA2
        path = folder / f"{kind}.model"
        if not path.exists():
            path.write_bytes(train(kind))
        return path

    return model


@pytest.fixture(params=[*KINDS, "llama2"])
def any_model(request, models) -> tuple[str, Path]:
    """(kind, file) of each kind of model in turn, the real Llama-2 one among them."""
    return request.param, models(request.param)


@pytest.fixture(scope="session")
def model(models) -> Path:
    """The file of a model such as the demo trains."""
    return models("demo")


@pytest.fixture(scope="session")
def odd() -> list[str]:
    """Short texts that are hard to handle."""
    return ODD


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Documents: prose and code of some kB, long ones, odd ones, and empty ones between them."""
    rng = random.Random(0)
    whole = generated.module(99, 100_000)
    docs = [whole[start : start + rng.randrange(3_000)] for start in range(0, 40_000, 1_000)]
    docs += [whole, "one line " * 4_000, "é" * 3_000, *ODD, "", ""]
    rng.shuffle(docs)
    return docs
