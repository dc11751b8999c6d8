# SPDX-License-Identifier: Apache-2.0
"""Generation: a prompt through the training kernels, then a token at a time against caches.

A step costs what its patterns read, whatever came before. On a GPU it is one CUDA graph, captured
once and replayed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..decode import KVCache, decode
from ..functional import attention

if TYPE_CHECKING:
    from .transformer import SparseTransformer


class Decoder:
    """A model that reads tokens in order and predicts the next: a cache for each block.

    Args:
        model: in evaluation mode.
        prompt: int64 ``(batch, any length)``, 0 too.
        length: the greatest number of tokens to predict, from 1; with the prompt, the context.

    ``logits`` ``(batch, vocab)`` predict the token after all that were read.

    >>> config = SparseTransformerConfig(vocab=256, context=512, layers=2, heads=2, width=64)
    >>> decoder = Decoder(SparseTransformer(config).eval(), torch.tensor([list(b"def ")]), 10)
    >>> decoder.step(decoder.logits.argmax(-1)).shape
    torch.Size([1, 256])
    """

    @torch.no_grad()
    def __init__(self, model: SparseTransformer, prompt: Tensor, length: int) -> None:
        self.model = model
        self.positions = model.embed_positions()  # (at least context, width)
        self.caches: list[KVCache] = []
        self.graph: torch.cuda.CUDAGraph | None = None
        self._tokens: Tensor | None = None  # what the graph reads, and a step before there is one
        # Position i reads token i - 1, so one position more than tokens; its own is not read.
        x = model.embed(F.pad(prompt, (0, 1)))
        for block in model.attention_blocks():
            q, k, v = block.queries_keys_values(x)
            pattern = block.attention.pattern
            cache = KVCache(
                pattern,
                batch=q.shape[0],
                heads=q.shape[1],
                length=prompt.shape[1] + length,
                head_dim=k.shape[3],
                head_dim_v=v.shape[3],
                kv_heads=k.shape[1],
                dtype=k.dtype,
                device=k.device,
            )
            cache.prefill(k, v)
            self.caches.append(cache)
            x = block.add_attended(x, attention(q, k, v, pattern))
        self.logits = self._predict(x)

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Reads one token ``(batch,)`` of each sequence; the new ``logits``, valid until the next.

        At most ``length - 1`` steps, as the token predicted last need not be read.
        """
        if not tokens.is_cuda or tokens.numel() == 0:
            self.logits = self.run_step(tokens)
        elif self._tokens is None:  # the first step: loads every kernel, which a capture could not
            self._tokens = tokens.clone()
            self.logits = self.run_step(tokens)
        else:
            self._tokens.copy_(tokens)
            if self.graph is None:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.device(tokens.device), torch.cuda.graph(graph):
                    self.logits = self.run_step(self._tokens)
                self.graph = graph
            self.graph.replay()
        return self.logits

    @torch.no_grad()
    def run_step(self, tokens: Tensor) -> Tensor:
        """The step itself: operations on the device alone."""
        at = self.caches[0].position.view(1)
        x = self.model.token_embedding(tokens[:, None]) + self.positions.index_select(0, at)
        for block, cache in zip(self.model.attention_blocks(), self.caches, strict=True):
            q, k, v = block.queries_keys_values(x)
            x = block.add_attended(x, decode(q, k, v, cache))
        return self._predict(x)

    def _predict(self, x: Tensor) -> Tensor:
        return self.model.logits(self.model.final_norm(x[:, -1])).float()


def sample(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    """A token (batch,) drawn from each row of logits (batch, vocab)."""
    if temperature == 0 or logits.shape[0] == 0:
        return logits.argmax(-1)
    candidates, tokens = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]))
    probabilities = (candidates / temperature).softmax(-1)
    if top_p is not None:  # the likeliest, until their sum reaches top_p
        likelier = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(likelier >= top_p, 0.0)
    # As torch.multinomial draws, without its look at the values on the host.
    waiting = torch.empty_like(probabilities).exponential_(generator=generator)
    choice = (probabilities / waiting).argmax(-1, keepdim=True)
    return tokens.gather(-1, choice).squeeze(-1)
