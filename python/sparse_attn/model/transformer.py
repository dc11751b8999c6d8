# SPDX-License-Identifier: Apache-2.0
"""The Sparse Transformer (Child et al., 2019).

- pre-activation residual blocks; the norm before the logits follows the last one (section 5.2)
- initialisation that keeps the ratio of embeddings to residual blocks at any depth (5.2)
- sparse attention, its pattern composed over heads or layers (5.1, composition.py)
- feed-forward with x * sigmoid(1.702 x)
- learned embeddings of each token's position, one for each axis (5.3)
- blocks recomputed in the backward pass, so that only their inputs are stored (5.4)
- dropout at the end of residual branches only (5.4)
- a learned start vector in front, so that the first token is predicted too

Shapes are (batch, seq, width) unless a comment says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..decode_plan import attended_keys
from ..nn import SelfAttention
from .composition import head_patterns, layer_pattern
from .config import SparseTransformerConfig
from .generation import Decoder, sample

NORM_EPS = 1e-5


class FeedForward(nn.Module):
    """W_2 f(W_1 x) with f(x) = x * sigmoid(1.702 x)."""

    def __init__(self, config: SparseTransformerConfig) -> None:
        super().__init__()
        self.hidden = nn.Linear(config.width, config.feed_forward_width)
        self.out = nn.Linear(config.feed_forward_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.hidden(x)
        return self.out(hidden * torch.sigmoid(1.702 * hidden))


class Block(nn.Module):
    """H + a(H) + b(H): a is attention of the normed H, b feed-forward of the normed H + a(H)."""

    def __init__(self, config: SparseTransformerConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        pattern = layer_pattern(config, layer)
        self.attention = SelfAttention(config.width, config.heads, pattern, config.qk_width)
        self.feed_forward_norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))

    # The same in two halves, between which generation and pictures look.

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What attention reads: each (batch, heads, seq, head_dim)."""
        parts = self.attention.qkv(self.attention_norm(x)).split(self.attention.widths, dim=-1)
        heads = (self.attention.heads, self.attention.kv_heads, self.attention.kv_heads)
        q, k, v = (
            part.unflatten(-1, (count, -1)).transpose(1, 2)
            for part, count in zip(parts, heads, strict=True)
        )
        return q, k, v

    def add_attended(self, x: Tensor, attended: Tensor) -> Tensor:
        """H + a(H) + b(H) once attention (batch, heads, seq, head_dim) is done."""
        x = x + self.dropout(self.attention.out(attended.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class SparseTransformer(nn.Module):
    """An autoregressive Transformer with sparse attention.

    ``model(tokens)`` takes int64 tokens (batch, seq), seq at most ``config.context``, and returns
    logits (batch, seq, vocab). ``logits[:, i]`` predicts ``tokens[:, i]`` from ``tokens[:, :i]``.

    Raises TypeError for tokens that are not int64, ValueError for a shape that does not fit.

    >>> config = SparseTransformerConfig(vocab=256, context=512, layers=2, heads=2, width=64)
    >>> model = SparseTransformer(config)
    >>> model(torch.randint(256, (1, 100))).shape
    torch.Size([1, 100, 256])
    """

    def __init__(self, config: SparseTransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab, config.width)
        self.start = nn.Parameter(torch.empty(config.width))
        self.position_embeddings = nn.ParameterList(
            torch.empty(size, config.width) for size in config.position_axes
        )
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.final_norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.logits = nn.Linear(config.width, config.vocab, bias=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw all parameters anew. The paper gives N(0, 0.125 / sqrt(d_in)).

        "code" follows the authors' code, where 0.125 is a gain of the variance, and the embeddings
        of their CIFAR-10 models; "paper" reads every second argument as a standard deviation.

        | standard deviation of     | "code"               | "paper"                 |
        |---------------------------|----------------------|-------------------------|
        | W_q, W_k, W_v, W_1        | sqrt(0.125 / d_in)   | 0.125 / sqrt(d_in)      |
        | W_p, W_2 (N layers)       | the same / sqrt(2 N) | the same / sqrt(2 N)    |
        | token embedding, start    | 0.01                 | 0.125 / sqrt(d)         |
        | position embeddings       | 0.01 / sqrt(n_emb)   | 0.125 / sqrt(d n_emb)   |

        Logits and biases are 0, gains of norms 1.
        """
        config = self.config
        code = config.initialisation == "code"
        gain = math.sqrt(0.125) if code else 0.125
        embedding_std = 0.01 if code else 0.125 / math.sqrt(config.width)
        nn.init.normal_(self.token_embedding.weight, std=embedding_std)
        nn.init.normal_(self.start, std=embedding_std)
        for table in self.position_embeddings:
            nn.init.normal_(table, std=embedding_std / math.sqrt(len(config.position_axes)))
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=gain / math.sqrt(module.in_features))
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, SelfAttention | FeedForward):
                module.out.weight.div_(math.sqrt(2 * config.layers))
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        nn.init.zeros_(self.logits.weight)

    def embed(self, tokens: Tensor) -> Tensor:
        """What the first block reads: the token before, and the position of the one to predict.

        (The authors' code adds the position of the token before.)
        """
        batch, seq = tokens.shape
        start = self.start.expand(batch, 1, -1)
        x = torch.cat([start, self.token_embedding(tokens[:, :-1])], dim=1)[:, :seq]
        return x + self.embed_positions()[:seq]

    def embed_positions(self) -> Tensor:
        """The sum of the embeddings of each axis, (at least context, width); the last runs fastest.

        A broadcast sum, not a look-up: its gradient is a sum in a fixed order, not a scatter.
        """
        positions, *others = self.position_embeddings
        for table in others:
            positions = (positions[:, None] + table).flatten(0, 1)
        return positions

    def run_blocks(self, x: Tensor, layers: int) -> Tensor:
        """The first ``layers`` blocks."""
        for block in self.blocks[:layers]:
            if self.config.recompute and torch.is_grad_enabled():
                # The state of the random numbers matters to dropout alone.
                dropout = self.training and self.config.dropout > 0
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=dropout)
            else:
                x = block(x)
        return x

    def attention_blocks(self) -> list[Block]:
        """The blocks, in order."""
        return [block for block in self.blocks if isinstance(block, Block)]

    def forward(self, tokens: Tensor) -> Tensor:
        self._check_tokens(tokens)
        x = self.run_blocks(self.embed(tokens), self.config.layers)
        return self.logits(self.final_norm(x))

    @torch.no_grad()
    def attention_weights(self, tokens: Tensor, layer: int, head: int, position: int) -> Tensor:
        """Softmax weights of every key for the query at ``position``, float32 (batch, seq).

        Weights outside the pattern are 0; so are all weights of a query without keys (in a far
        head of a fixed pattern). Key j stands for ``tokens[:, j - 1]``, key 0 for the start vector.

        Raises ValueError for a layer, head or position that is not there.
        """
        self._check_tokens(tokens)
        for name, value, end in (
            ("layer", layer, self.config.layers),
            ("head", head, self.config.heads),
            ("position", position, tokens.shape[1]),
        ):
            if not 0 <= value < end:
                raise ValueError(f"{name} must be in [0, {end}), got {value}")
        with self._evaluating():
            x = self.run_blocks(self.embed(tokens[:, : position + 1]), layer)
            q, k, _ = self.attention_blocks()[layer].queries_keys_values(x)
        dtype = torch.promote_types(q.dtype, torch.float32)
        query = q[:, head, -1:].to(dtype)  # (batch, 1, head_dim)
        keys = k[:, head].to(dtype)  # (batch, position + 1, head_dim)
        scores = (query * keys).sum(-1) / math.sqrt(keys.shape[-1])
        seen = torch.zeros(position + 1, dtype=torch.bool)
        seen[torch.from_numpy(attended_keys(head_patterns(self.config, layer)[head], position))] = 1
        seen = seen.to(scores.device)
        weights = scores.masked_fill(~seen, -math.inf).softmax(-1).masked_fill(~seen, 0.0)
        return F.pad(weights.float(), (0, tokens.shape[1] - position - 1))

    @torch.no_grad()
    def generate(
        self,
        prompt: Tensor,
        length: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """``prompt`` (batch, any length, 0 too) and ``length`` tokens sampled after it.

        Temperature 0 takes the likeliest token; ``top_k`` samples among the k likeliest, ``top_p``
        among the likeliest whose probabilities add up to it, of these. ``progress`` is called with
        the number of tokens made so far. The prompt is evaluated once; after it a token costs one
        step against caches that hold what the patterns still read (`KVCache`).

        Raises ValueError for values out of range, or if prompt and length exceed the context.

        >>> config = SparseTransformerConfig(vocab=256, context=512, layers=2, heads=2, width=64)
        >>> prompt = torch.tensor([list(b"def ")])
        >>> SparseTransformer(config).generate(prompt, length=10).shape
        torch.Size([1, 14])
        """
        self._check_tokens(prompt)
        given = prompt.shape[1]
        if length < 0 or given + length > self.config.context:
            raise ValueError(
                f"length must be in [0, {self.config.context - given}] to fit the context of "
                f"{self.config.context} after a prompt of {given} tokens, got {length}"
            )
        if temperature < 0:
            raise ValueError(f"temperature must be at least 0, got {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {top_p}")
        if prompt.numel() and not 0 <= int(prompt.min()) <= int(prompt.max()) < self.config.vocab:
            raise ValueError(f"tokens of the prompt must be in [0, {self.config.vocab})")
        tokens = F.pad(prompt, (0, length))
        if length == 0:
            return tokens
        with self._evaluating():
            decoder = Decoder(self, prompt, length)
            logits = decoder.logits
            for made in range(1, length + 1):
                token = sample(logits, temperature, top_k, top_p, generator)
                tokens[:, given + made - 1] = token
                if made < length:
                    logits = decoder.step(token)
                if progress is not None:
                    progress(made)
        return tokens

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Without dropout, and back to the former mode."""
        training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(training)

    def _check_tokens(self, tokens: Tensor) -> None:
        if tokens.dtype != torch.int64:
            raise TypeError(f"tokens must be int64, got {tokens.dtype}")
        if tokens.dim() != 2:
            raise ValueError(f"tokens must be (batch, seq), got shape {tuple(tokens.shape)}")
        if tokens.shape[1] > self.config.context:
            raise ValueError(
                f"tokens must be at most {self.config.context} long, the context of the model, "
                f"got {tokens.shape[1]}"
            )
