"""A text encoder of BERT's shape in plain torch, whose parameters have the names of the published weight files.

Each token looks at all the others, in both directions; norms stand after what they norm (post-norm).  Shape suffixes:
B batch, T tokens, C width of a token's vector.
"""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.nn.utils import skip_init

from bigmodel_course.costs import EncoderConfig

__all__ = ["MINILM", "PAD", "Encoder", "TextClassifier"]

PAD = 0  # the token that fills a short sentence up


MINILM = EncoderConfig(layers=6, heads=12, width=384, hidden=1536, vocabulary=30522, context=512)


def _linear(inputs: int, outputs: int) -> nn.Module:
    return skip_init(nn.Linear, inputs, outputs, device=torch.get_default_device())


def _embedding(rows: int, width: int) -> nn.Module:
    return skip_init(nn.Embedding, rows, width, device=torch.get_default_device())


def _added(inputs: int, outputs: int) -> nn.ModuleDict:
    """A linear layer whose result is added to the stream, and the norm behind the sum."""
    return nn.ModuleDict({"dense": _linear(inputs, outputs), "LayerNorm": nn.LayerNorm(outputs, eps=1e-12)})


class Block(nn.Module):
    """Attention in both directions, then two linear layers with GELU; each sum is normed."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.heads = config.heads
        three = nn.ModuleDict({name: _linear(config.width, config.width) for name in ("query", "key", "value")})
        self.attention = nn.ModuleDict({"self": three, "output": _added(config.width, config.width)})
        self.intermediate = nn.ModuleDict({"dense": _linear(config.width, config.hidden)})
        self.output = _added(config.hidden, config.width)

    def forward(self, x_BTC: Tensor, seen: Tensor) -> Tensor:
        """`seen` [B, 1, 1, T] is False where there is padding, at which no token may look."""
        parts = (layer(x_BTC).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in self._three())
        mean_BTC = F.scaled_dot_product_attention(*parts, attn_mask=seen).transpose(1, 2).flatten(2)
        out = self.attention["output"]
        x_BTC = out["LayerNorm"](x_BTC + out["dense"](mean_BTC))
        inner = F.gelu(self.intermediate["dense"](x_BTC))
        return self.output["LayerNorm"](x_BTC + self.output["dense"](inner))

    def _three(self) -> list[nn.Module]:
        return [self.attention["self"][name] for name in ("query", "key", "value")]


class Encoder(nn.Module):
    """Tokens [B, T] (int64, padded on the right with `PAD`) -> a vector for each, [B, T, width].

    Devlin et al. 2018 (arXiv 1810.04805), as transformers' BertModel without its pooler and without dropout; MINILM is
    the shape of all-MiniLM-L6-v2.  Padding changes nothing: columns that hold nothing else are cut off first.
    """

    def __init__(self, config: EncoderConfig, *, generator: Generator):
        super().__init__()
        self.config = config
        tables = {"word": config.vocabulary, "position": config.context, "token_type": 2}
        parts = {f"{name}_embeddings": _embedding(rows, config.width) for name, rows in tables.items()}
        self.embeddings = nn.ModuleDict(parts | {"LayerNorm": nn.LayerNorm(config.width, eps=1e-12)})
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Block(config) for _ in range(config.layers))})
        self.initialise_(generator)

    @torch.no_grad()
    def initialise_(self, generator: Generator) -> None:
        """Fill every parameter as BERT does: normal with deviation 0.02, biases 0, norms 1."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif "LayerNorm" in name:
                p.fill_(1.0)
            else:
                p.normal_(0.0, 0.02, generator=generator)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """One vector a token; those of padding mean nothing."""
        tokens_BT = self.trimmed(tokens_BT)
        e = self.embeddings
        x_BTC = e["word_embeddings"](tokens_BT) + e["position_embeddings"].weight[: tokens_BT.shape[1]]
        x_BTC = e["LayerNorm"](x_BTC + e["token_type_embeddings"].weight[0])  # all of a single sentence is of type 0
        seen = (tokens_BT != PAD)[:, None, None]
        for block in self.encoder["layer"]:
            x_BTC = block(x_BTC, seen)
        return x_BTC

    def sentences(self, tokens_BT: Tensor) -> Tensor:
        """One vector a sentence, [B, width]: the mean of its tokens' vectors, as all-MiniLM-L6-v2 was trained for."""
        tokens_BT = self.trimmed(tokens_BT)
        seen = (tokens_BT != PAD)[:, :, None]
        return (self(tokens_BT) * seen).sum(1) / seen.sum(1)

    def trimmed(self, tokens_BT: Tensor) -> Tensor:
        """Without the columns in which every sentence is over."""
        if tokens_BT.ndim != 2 or tokens_BT.is_floating_point():
            raise ValueError(f"need tokens [B, T], whole numbers, got {tokens_BT.dtype} {list(tokens_BT.shape)}")
        if not tokens_BT.numel():
            raise ValueError(f"tokens must hold at least one sentence, got {list(tokens_BT.shape)}")
        lengths = (tokens_BT != PAD).sum(1)
        longest = int(lengths.max())
        if int(lengths.min()) < 1:
            raise ValueError(f"tokens must hold something in each row, got only padding in {int(lengths.argmin())}")
        if longest > self.config.context:
            raise ValueError(f"tokens must be at most context = {self.config.context} a sentence, got {longest}")
        seen = torch.arange(tokens_BT.shape[1], device=tokens_BT.device) < lengths[:, None]
        if bool(((tokens_BT != PAD) != seen).any()) or int(tokens_BT.max()) >= self.config.vocabulary:
            raise ValueError(f"need ids below {self.config.vocabulary}, padded on the right: another tokenizer's?")
        return tokens_BT[:, :longest]


class TextClassifier(nn.Module):
    """An encoder and a linear head on the mean of its vectors: tokens [B, T] -> scores [B, classes].

    The head starts at zero: the first scores are 0 and the first steps move the head towards the features, not the
    features towards a random head.
    """

    def __init__(self, encoder: Encoder, classes: int):
        super().__init__()
        self.encoder = encoder
        self.head = _linear(encoder.config.width, classes)
        nn.init.zeros_(self.head.weight), nn.init.zeros_(self.head.bias)

    def stages(self) -> list[nn.Module]:
        """From the input to the output: the embeddings, each block, the head."""
        return [self.encoder.embeddings, *self.encoder.encoder["layer"], self.head]

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Scores (logits) of each class."""
        return self.head(self.encoder.sentences(tokens_BT))
