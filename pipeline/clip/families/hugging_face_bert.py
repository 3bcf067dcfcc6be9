"""open_clip's HFTextEncoder around transformers' BertModel (BiomedCLIP), RobertaModel or XLMRobertaModel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pipeline.clip.blocks import Block
from pipeline.clip.families.base import TextTower, UnsupportedTower
from pipeline.clip.tokenizer import Tokenizer


class BertBlock(Block):
    """transformers' BertLayer, whose norms follow the sums: x ← LN(x + attention(x)); x ← LN(x + MLP(x))."""

    def __init__(self, layer: Any):
        attention = layer.attention.self
        super().__init__(
            attention, attention.num_attention_heads, attention.all_head_size, layer.intermediate.dense.out_features
        )
        self.layer = layer

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def in_proj(self, h: torch.Tensor, parts: slice) -> torch.Tensor:
        attention = self.layer.attention.self
        return torch.cat([layer(h) for layer in (attention.query, attention.key, attention.value)[parts]], dim=-1)

    def in_proj_weights(self) -> Sequence[torch.Tensor]:
        attention = self.layer.attention.self
        return [layer.weight for layer in (attention.query, attention.key, attention.value)]

    def add_attention(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        return self.layer.attention.output(attended, x)

    def add_mlp(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer.output(self.layer.intermediate(x), x)


class HuggingFaceBert(TextTower):
    """BERT, or RoBERTa, which differs in the numbers of its positions.

    Args:
        text: open_clip's HFTextEncoder.
    """

    causal = False
    masks_padding = True

    def __init__(self, text: Any):
        transformer, name = text.transformer, type(text.transformer).__name__
        if name not in ("BertModel", "RobertaModel", "XLMRobertaModel") or transformer.config.is_decoder:
            raise UnsupportedTower(f"the text tower is transformers' {name}, not an encoder like BertModel")
        pooler = type(text.pooler).__name__
        if pooler not in ("ClsPooler", "ClsLastHiddenStatePooler", "MeanPooler"):
            raise UnsupportedTower(f"the text feature is that of a {pooler}")
        self.text, self.transformer = text, transformer
        self.blocks = [BertBlock(layer) for layer in transformer.encoder.layer]
        self.output_dim = text.output_dim
        self.token_embedding = transformer.embeddings.word_embeddings
        self.pooled = "mean" if pooler == "MeanPooler" else "first"
        self.uses_bert_pooler = pooler == "ClsPooler" and transformer.pooler is not None
        self.first_position = transformer.config.pad_token_id + 1 if name != "BertModel" else 0

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        pad_id, max_length = self.transformer.config.pad_token_id, self.transformer.config.max_position_embeddings
        if tokenizer.pad_id != pad_id:
            raise UnsupportedTower(f"the tokenizer pads with token {tokenizer.pad_id}, the text tower masks {pad_id}")
        if tokenizer.context_length + self.first_position > max_length:
            raise UnsupportedTower(
                f"the context length is {tokenizer.context_length}, and the text tower has "
                f"{max_length - self.first_position} positions"
            )

    def embed(self, embeddings: torch.Tensor, position: int) -> torch.Tensor:
        layer, start = self.transformer.embeddings, self.first_position + position
        positions = layer.position_embeddings.weight[start : start + embeddings.shape[-2]]
        return layer.LayerNorm(embeddings + positions + layer.token_type_embeddings.weight[0])

    def head(self, x: torch.Tensor) -> torch.Tensor:
        if self.uses_bert_pooler:
            x = self.transformer.pooler(x[:, None])
        return self.text.proj(x)
