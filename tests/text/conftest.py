"""Small tokenizers of the three kinds in use, made on the spot."""

import string

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from penstock.text import TextTokenizer

CORPUS = [
    "The gate opens when the water is high, and closes when it is low.",
    "Größe, naïve, señor; 水力发电 と 発電所, привет мир.",
    "emoji: 👍🏽 👩‍👩‍👧 🚰 are several bytes each",
]
UNKNOWN = "<unk>"
SPECIAL = ["<end>", "<user>"]


def byte_level() -> TextTokenizer:
    """As in GPT-2, Llama 3 and Qwen: every byte is a token, merges join some."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return TextTokenizer(tokenizer)


def byte_fallback() -> TextTokenizer:
    """As in Llama 2: pieces with a leading space mark, bytes for what no piece covers."""
    pieces = [UNKNOWN, *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [*string.ascii_letters, ".", ",", "é", "▁t", "th", "he", "▁th", "▁the", "水"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "t"), ("t", "h"), ("h", "e"), ("▁t", "h"), ("▁th", "e")]
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token=UNKNOWN, byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return TextTokenizer(tokenizer)


def metaspace() -> TextTokenizer:
    """As in T5 and ALBERT: words with a leading space mark, and no bytes."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=[UNKNOWN, *SPECIAL], unk_token=UNKNOWN, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return TextTokenizer(tokenizer)


KINDS = {"byte-level": byte_level, "byte-fallback": byte_fallback, "metaspace": metaspace}


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, TextTokenizer]:
    return {name: make() for name, make in KINDS.items()}


@pytest.fixture(scope="session", params=KINDS)
def tokenizer(
    request: pytest.FixtureRequest, tokenizers: dict[str, TextTokenizer]
) -> TextTokenizer:
    return tokenizers[request.param]
