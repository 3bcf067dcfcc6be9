"""Small tokenizers of Hugging Face, as folders that open_clip reads, one of each kind that its models have."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    BertTokenizer,
    GemmaTokenizer,
    PreTrainedTokenizerBase,
    RobertaTokenizer,
    T5Tokenizer,
    XLMRobertaTokenizer,
)

CORPUS = (
    "a photo of a cat. a photo of the great wall of china, a tricycle! An alarm clock; post-it notes.",
    "This is a blurry picture of the word café, or Fußball, in a drawing with a sofa and 12 couches.",
    "猫 の 写真 naïve Ελλάδα ABC xyz zebra quick brown fox jumps over lazy dogs 0123456789",
)


def vocabulary(model: models.Model, trainer: trainers.Trainer) -> dict:
    """Train a tokenizer's model on the corpus, and return it as JSON."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    if isinstance(model, models.WordPiece):
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    elif isinstance(model, models.BPE) and not model.unk_token:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return json.loads(tokenizer.to_str())["model"]


def pieces(special_tokens: Sequence[str]) -> list[tuple[str, float]]:
    """Return the pieces of a Unigram model with their scores."""
    trainer = trainers.UnigramTrainer(
        vocab_size=160, special_tokens=list(special_tokens), unk_token="<unk>", show_progress=False
    )
    return [(piece, score) for piece, score in vocabulary(models.Unigram(), trainer)["vocab"]]


def bert() -> PreTrainedTokenizerBase:
    """BERT's, uncased: [CLS] text [SEP]; CLIPA, BiomedCLIP."""
    special_tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=220, special_tokens=special_tokens, show_progress=False)
    return BertTokenizer(vocabulary(models.WordPiece(unk_token="[UNK]"), trainer)["vocab"])


def t5() -> PreTrainedTokenizerBase:
    """T5's, whose padding is its end-of-text token: text </s>; SigLIP."""
    return T5Tokenizer(pieces(["<pad>", "</s>", "<unk>"]), extra_ids=0, pad_token="</s>")


def gemma() -> PreTrainedTokenizerBase:
    """Gemma's: text <eos>; SigLIP 2."""
    trainer = trainers.BpeTrainer(
        vocab_size=220, special_tokens=["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"], show_progress=False
    )
    model = vocabulary(models.BPE(unk_token="<unk>"), trainer)
    merges = [tuple(merge) for merge in model["merges"]]
    return GemmaTokenizer(model["vocab"], merges, add_bos_token=False, add_eos_token=True, padding_side="right")


def xlm_roberta() -> PreTrainedTokenizerBase:
    """XLM-RoBERTa's: <s> text </s>; MetaCLIP 2."""
    return XLMRobertaTokenizer(pieces(["<s>", "<pad>", "</s>", "<unk>", "<mask>"]))


def roberta() -> PreTrainedTokenizerBase:
    """RoBERTa's, of bytes: <s> text </s>."""
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model = vocabulary(models.BPE(), trainer)
    return RobertaTokenizer(model["vocab"], [tuple(merge) for merge in model["merges"]])


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    maker.__name__: maker for maker in (bert, t5, gemma, xlm_roberta, roberta)
}


def write_tokenizer(name: str, folder: Path) -> int:
    """Write one of TOKENIZERS to a folder, and return the size of its vocabulary."""
    tokenizer = TOKENIZERS[name]()
    tokenizer.save_pretrained(folder)
    return len(tokenizer)
