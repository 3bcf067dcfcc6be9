"""One interface to open_clip's tokenizers: its own (SimpleTokenizer) and those of Hugging Face (HFTokenizer)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.errors import UserError


class Tokenizer:
    """Tokenizer of class texts.

    Args:
        tokenizer: open_clip's, of `get_tokenizer`.
        pad_to_context: whether the text tower sees the padding, so that texts are padded to the context.
    """

    begin: tuple[int, ...]
    """Token ids before a text: the start token, or none (SigLIP)."""
    end: tuple[int, ...]
    """Token ids after a text: the end-of-text token (EOT)."""
    pad_id: int
    """Token id of the padding."""
    context_length: int
    """Maximum number of tokens of a text, `begin` and `end` included."""

    def __init__(self, tokenizer: Any, pad_to_context: bool = False):
        self.context_length: int = tokenizer.context_length
        self.pad_to_context = pad_to_context
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a part of a text, without `begin` and `end`."""
        raise NotImplementedError

    def encode_name(self, name: str) -> list[int]:
        """Return the token ids of a class name after other words: in some vocabularies a token has the space before
        it."""
        words, ids = self.encode("a"), self.encode(f"a {name}")
        return ids[len(words) :] if ids[: len(words)] == words else self.encode(name)

    def subword(self, token_id: int) -> str:
        """Return the text of a token."""
        raise NotImplementedError


class BytePairTokenizer(Tokenizer):
    """open_clip's SimpleTokenizer, which is OpenAI's."""

    pad_id = 0

    def __init__(self, tokenizer: Any, pad_to_context: bool = False):
        super().__init__(tokenizer, pad_to_context)
        self.begin, self.end = (tokenizer.sot_token_id,), (tokenizer.eot_token_id,)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text)
        return ids

    def subword(self, token_id: int) -> str:
        text: str = self._tokenizer.decoder[token_id]
        return text


class HuggingFaceTokenizer(Tokenizer):
    """open_clip's HFTokenizer, with its cleaning of texts and without its truncation.

    Raises:
        UserError: it pads elsewhere than at the end, or not at all.
    """

    def __init__(self, tokenizer: Any, pad_to_context: bool = False):
        super().__init__(tokenizer, pad_to_context)
        self.pad_id = tokenizer.tokenizer.pad_token_id
        if tokenizer.tokenizer_mode:
            raise UserError(
                f"clip.model: its tokenizer_mode {tokenizer.tokenizer_mode} is not known: use another model"
            )
        if self.pad_id is None or tokenizer.tokenizer.padding_side != "right":
            raise UserError(
                f"clip.model: its tokenizer pads on the {tokenizer.tokenizer.padding_side} with token {self.pad_id}: "
                "set padding_side to right, and pad_token, in its tokenizer_config.json"
            )
        words, ids = self.encode("a"), self._ids("a", add_special_tokens=True)
        start = next(i for i in range(len(ids)) if ids[i : i + len(words)] == words)
        self.begin, self.end = tuple(ids[:start]), tuple(ids[start + len(words) :])

    def encode(self, text: str) -> list[int]:
        return self._ids(text, add_special_tokens=False)

    def subword(self, token_id: int) -> str:
        text: str = self._tokenizer.tokenizer.decode([token_id])
        return text.strip()

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        tokenizer, cleaned = self._tokenizer.tokenizer, self._tokenizer.clean_fn(text)
        ids: Sequence[int] = tokenizer(cleaned, add_special_tokens=add_special_tokens, verbose=False).input_ids
        if self._tokenizer.strip_sep_token:  # CLIPA has zeros instead
            return [0 if token_id == tokenizer.sep_token_id else token_id for token_id in ids]
        return list(ids)


def describe_tokenizer(tokenizer: Any, pad_to_context: bool = False) -> Tokenizer:
    """Return the interface to one of open_clip's tokenizers."""
    family = HuggingFaceTokenizer if type(tokenizer).__name__ == "HFTokenizer" else BytePairTokenizer
    return family(tokenizer, pad_to_context)
