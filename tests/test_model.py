# SPDX-License-Identifier: Apache-2.0
"""The model against a plain transcription of the paper, and what must hold of it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from compare import assert_close
from sparse_attn import Chunk, Dense, Dilated, Fixed, Local, PerHead, Strided, Summary
from sparse_attn.model import SparseTransformer, SparseTransformerConfig, presets
from sparse_attn.model.composition import layer_pattern
from sparse_attn.model.generation import Decoder, sample

# Tests on a GPU use dtypes that the kernels do not take, too.
pytestmark = pytest.mark.filterwarnings("ignore:sparse_attn runs on the torch backend")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
COMPOSITIONS = ["merged", "multihead", "interleaved"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A second thread only waits when tensors are this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config(**changes: Any) -> SparseTransformerConfig:
    """A small model with a context that is no multiple of its stride."""
    small: dict[str, Any] = {
        "vocab": 11,
        "context": 61,
        "layers": 2,
        "heads": 4,
        "width": 32,
        "stride": 16,
        "columns": 4,
    }
    return SparseTransformerConfig(**{**small, **changes})


def build(values: SparseTransformerConfig, std: float = 0.3) -> SparseTransformer:
    """A model whose every parameter, biases and logits too, is random and matters."""
    model = SparseTransformer(values)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std)
    return model


def tokens_for(model: SparseTransformer, batch: int = 2, seq: int | None = None) -> Tensor:
    seq = model.config.context if seq is None else seq
    device = model.start.device
    return torch.randint(model.config.vocab, (batch, seq), device=device)


def gradients(
    model: SparseTransformer,
    tokens: Tensor,
    seed: int = 0,
    forward: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a training step with the dropout of ``seed``."""
    model.zero_grad()
    torch.manual_seed(seed)
    logits = (model if forward is None else forward)(tokens)
    loss = F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(grads) == len(list(model.parameters()))
    return loss.detach(), grads


# The model written again, plainly: one head and one pair of positions at a time.


def members(values: SparseTransformerConfig, layer: int, head: int) -> tuple[bool, bool]:
    """Whether a head of "fixed" or "strided" uses the near member, and the far one."""
    if values.composition == "merged":
        return True, True
    far = layer % 2 == 1
    if values.composition == "multihead":
        far = head >= math.ceil(values.heads / 2)
    return not far, far


def attends(values: SparseTransformerConfig, layer: int, head: int, i: int, j: int) -> bool:
    stride = values.stride
    if j > i or values.pattern == "dense":
        return j <= i
    if values.pattern == "local":
        return i - j < stride
    near, far = members(values, layer, head)
    if values.pattern == "strided":
        return (near and i - j < stride) or (far and (i - j) % stride == 0)
    first = math.ceil(values.heads / 2) if values.composition == "multihead" else 0
    end = stride - (head - first) % values.summary_blocks * values.columns
    return (near and i // stride == j // stride) or (
        far and end - values.columns <= j % stride < end
    )


def plain(
    values: SparseTransformerConfig, state: dict[str, Tensor], tokens: Tensor
) -> tuple[Tensor, list[list[Tensor]]]:
    """Logits, and the attention weights (batch, seq, seq) of each head of each layer."""
    batch, seq = tokens.shape
    axes = values.position_shape or (math.ceil(values.context / values.stride), values.stride)
    rows = []
    for i in range(seq):
        row = state["token_embedding.weight"][tokens[:, i - 1]]
        if i == 0:
            row = state["start"].expand(batch, -1)
        for axis, index in enumerate(torch.unravel_index(torch.tensor(i), axes)):
            row = row + state[f"position_embeddings.{axis}"][index]
        rows.append(row)
    x = torch.stack(rows, 1)

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        return centred / (variance + 1e-5).sqrt() * state[name + ".weight"] + state[name + ".bias"]

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[name + ".weight"].T + state[name + ".bias"]

    weights: list[list[Tensor]] = []
    qk_width = values.width // 2 if values.half_qk else values.width
    for layer in range(values.layers):
        block = f"blocks.{layer}."
        qkv = linear(block + "attention.qkv", norm(block + "attention_norm", x))
        q, k, v = qkv.split([qk_width, qk_width, values.width], -1)
        parts = [part.chunk(values.heads, -1) for part in (q, k, v)]
        weights.append([])
        mixed = []
        for head, (q, k, v) in enumerate(zip(*parts, strict=True)):
            mask = torch.tensor(
                [[attends(values, layer, head, i, j) for j in range(seq)] for i in range(seq)]
            )
            scores = q @ k.mT / math.sqrt(qk_width // values.heads)
            exponentials = scores.exp() * mask
            total = exponentials.sum(-1, keepdim=True)
            weights[-1].append(torch.where(total > 0, exponentials / total, 0.0))
            mixed.append(weights[-1][-1] @ v)
        a = linear(block + "attention.out", torch.cat(mixed, -1))
        hidden = linear(block + "feed_forward.hidden", norm(block + "feed_forward_norm", x + a))
        b = linear(block + "feed_forward.out", hidden / (1 + (-1.702 * hidden).exp()))
        x = x + (a + b)
    return norm("final_norm", x) @ state["logits.weight"].T, weights


CASES: list[dict[str, Any]] = [
    *(
        {"pattern": pattern, "composition": composition}
        for pattern in ("fixed", "strided")
        for composition in COMPOSITIONS
    ),
    {"pattern": "dense"},
    {"pattern": "local", "composition": "interleaved"},
    {"half_qk": True, "half_feed_forward": True, "heads": 2},
    {"positions": "data", "position_shape": (7, 4, 3), "pattern": "strided", "stride": 12},
    {"summary_blocks": 3},
    {"summary_blocks": 2, "composition": "multihead", "heads": 5, "width": 40},
    {"summary_blocks": 4, "composition": "interleaved", "columns": 2},
    {"heads": 1, "stride": 100, "columns": 1},
]


@pytest.mark.parametrize("changes", CASES, ids=lambda changes: "-".join(map(str, changes.values())))
def test_logits_and_weights_are_those_of_the_paper(changes: dict[str, Any]) -> None:
    model = build(config(**changes)).double()
    tokens = tokens_for(model, seq=int(torch.randint(40, 62, ())))
    logits, weights = plain(model.config, model.state_dict(), tokens)
    assert_close("logits", model(tokens), logits)
    for position in (0, 17, tokens.shape[1] - 1):
        for layer in range(model.config.layers):
            head = int(torch.randint(model.config.heads, ()))
            actual = model.attention_weights(tokens, layer, head, position)
            reference = weights[layer][head][:, position]
            assert_close(f"layer {layer} head {head}", actual, reference, reference.float())
            assert not actual[reference == 0].any()


@pytest.mark.parametrize("pattern", ["dense", "local", "fixed", "strided"])
@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_a_token_changes_only_later_logits(pattern: str, composition: str) -> None:
    model = build(config(pattern=pattern, composition=composition))
    tokens = tokens_for(model)
    logits = model(tokens)
    for t in (0, 15, 16, 40, 60):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % model.config.vocab
        difference = (model(changed) - logits).detach().abs().amax((0, 2))
        assert not difference[: t + 1].any()
        assert difference[t + 1 : t + 2].all()


def test_pattern_of_each_layer() -> None:
    def patterns(**changes: Any) -> list[object]:
        model = SparseTransformer(config(**changes))
        return [block.attention.pattern for block in model.blocks]  # type: ignore[union-attr]

    assert patterns(pattern="dense", composition="multihead") == [Dense()] * 2
    assert patterns(pattern="local", composition="interleaved") == [Local(16)] * 2
    assert patterns() == [Fixed(16, 4)] * 2
    assert patterns(pattern="strided") == [Strided(16)] * 2
    assert patterns(composition="interleaved", layers=3) == [Chunk(16), Summary(16, 4), Chunk(16)]
    assert patterns(pattern="strided", composition="interleaved") == [Local(16), Dilated(16)]
    assert (
        patterns(pattern="strided", composition="multihead", heads=3, width=24)
        == [PerHead([Local(16), Local(16), Dilated(16)])] * 2
    )
    assert patterns(summary_blocks=3, layers=1) == [
        PerHead([Fixed(16, 4, 12), Fixed(16, 4, 8), Fixed(16, 4, 4), Fixed(16, 4, 12)])
    ]
    assert patterns(summary_blocks=2, layers=1, composition="multihead") == [
        PerHead([Chunk(16), Chunk(16), Summary(16, 4, 12), Summary(16, 4, 8)])
    ]


@pytest.mark.parametrize("initialisation", ["code", "paper"])
def test_initialisation(initialisation: str) -> None:
    width, layers = 256, 5
    model = SparseTransformer(
        config(
            initialisation=initialisation,
            width=width,
            layers=layers,
            vocab=300,
            stride=300,
            context=60000,
            half_feed_forward=True,
        )
    )
    gain = math.sqrt(0.125) if initialisation == "code" else 0.125
    embedding = 0.01 if initialisation == "code" else 0.125 / math.sqrt(width)
    residual = gain / math.sqrt(2 * layers)
    expected = {
        "token_embedding.weight": embedding,
        "start": embedding,
        "position_embeddings.0": embedding / math.sqrt(2),
        "position_embeddings.1": embedding / math.sqrt(2),
        "final_norm.weight": None,
        "final_norm.bias": 0,
        "logits.weight": 0,
    }
    for block in (f"blocks.{layer}." for layer in range(layers)):
        expected |= {
            block + "attention.qkv.weight": gain / math.sqrt(width),
            block + "attention.qkv.bias": 0,
            block + "attention.out.weight": residual / math.sqrt(width),
            block + "attention.out.bias": 0,
            block + "feed_forward.hidden.weight": gain / math.sqrt(width),
            block + "feed_forward.hidden.bias": 0,
            block + "feed_forward.out.weight": residual / math.sqrt(2 * width),
            block + "feed_forward.out.bias": 0,
        }
        for norm in ("attention_norm", "feed_forward_norm"):
            expected |= {f"{block}{norm}.weight": None, f"{block}{norm}.bias": 0}
    parameters = dict(model.named_parameters())
    assert parameters.keys() == expected.keys()
    for name, std in expected.items():
        values = parameters[name].detach()
        if std is None:
            assert (values == 1).all(), name
        elif std == 0:
            assert not values.any(), name
        else:  # within six standard errors
            count = values.numel()
            assert abs(values.std().item() / std - 1) < 6 / math.sqrt(2 * count), name
            assert abs(values.mean().item()) < 6 * std / math.sqrt(count), name


def test_loss_before_training_is_uniform() -> None:
    model = SparseTransformer(config())
    loss, _ = gradients(model, tokens_for(model))
    assert loss.item() == pytest.approx(math.log(model.config.vocab))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_recomputed_gradients_have_the_same_bits(
    composition: str, autocast: torch.dtype | None, device: str
) -> None:
    values = config(composition=composition, dropout=0.3, layers=3, pattern="strided")
    stored = build(dataclasses.replace(values, recompute=False)).to(device)
    recomputed = SparseTransformer(values).to(device)
    recomputed.load_state_dict(stored.state_dict())
    tokens = tokens_for(stored)
    with torch.autocast(device, autocast, enabled=autocast is not None):
        loss, grads = gradients(stored, tokens)
        recomputed_loss, recomputed_grads = gradients(recomputed, tokens)
        other_loss, _ = gradients(recomputed, tokens, seed=1)
    assert torch.equal(loss, recomputed_loss)
    assert not torch.equal(loss, other_loss), "dropout is off"
    for name, grad in grads.items():
        assert torch.equal(grad, recomputed_grads[name]), name


def test_recomputation_stores_only_block_inputs() -> None:
    def stored_bytes(layers: int, recompute: bool) -> int:
        model = build(config(layers=layers, recompute=recompute, dropout=0.3))
        parameters = {parameter.data_ptr() for parameter in model.parameters()}
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logits = model(tokens_for(model))
        assert logits.requires_grad
        return sum(storages.values())

    block_input = 2 * 61 * 32 * 4
    assert stored_bytes(4, recompute=True) - stored_bytes(3, recompute=True) == block_input
    stored = stored_bytes(4, recompute=False) - stored_bytes(3, recompute=False)
    assert stored > 10 * block_input


def test_dropout_is_on_both_residual_branches_only() -> None:
    # With all of them dropped, the residual stream passes the embeddings through.
    model = build(config(dropout=1 - 1e-9))
    tokens = tokens_for(model, seq=8)
    embedded = model.logits(model.final_norm(model.embed(tokens)))
    assert torch.equal(model(tokens), embedded)
    model.eval()
    assert torch.equal(model(tokens), model(tokens))
    assert not torch.allclose(model(tokens), embedded)


def test_start_vector_and_every_position_get_gradients() -> None:
    model = build(config())
    _, grads = gradients(model, tokens_for(model))
    assert all(grad.any() for grad in grads.values())
    assert grads["position_embeddings.0"].any(1).all()
    assert grads["position_embeddings.1"].any(1).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype: torch.dtype, device: str) -> None:
    model = build(config(half_qk=True), std=0.1).to(device)
    tokens = tokens_for(model)
    with torch.autocast(device, dtype):
        logits = model(tokens)
        loss, grads = gradients(model, tokens)
    assert logits.dtype == dtype
    full_loss, full_grads = gradients(model, tokens)
    assert loss.item() == pytest.approx(full_loss.item(), rel=0.02)
    for name, grad in grads.items():
        similarity = F.cosine_similarity(grad.flatten(), full_grads[name].flatten(), dim=0)
        assert grad.dtype == torch.float32
        assert similarity > 0.98, name


@pytest.mark.parametrize("seq", [0, 1, 2, 15, 16, 17, 61])
def test_shorter_than_the_context(seq: int) -> None:
    model = build(config())
    tokens = tokens_for(model)
    logits = model(tokens[:, :seq])
    assert logits.shape == (2, seq, 11)
    torch.testing.assert_close(logits, model(tokens)[:, :seq])


def test_empty_batch() -> None:
    model = build(config())
    assert model(tokens_for(model, batch=0)).shape == (0, 61, 11)
    assert model.generate(tokens_for(model, batch=0, seq=5), 3).shape == (0, 8)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("composition", "recompute"), [("merged", False), ("merged", True), ("multihead", True)]
)
def test_compiles_twice_for_seven_lengths(composition: str, recompute: bool, device: str) -> None:
    torch._dynamo.reset()
    # On a GPU a compiled recomputation draws its dropout from a random state of its own.
    dropout = 0.3 if device == "cpu" else 0.0
    values = config(composition=composition, recompute=recompute, dropout=dropout, summary_blocks=2)
    model = build(values).to(device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for seq in (61, 16, 33, 50, 7, 48, 60):
        tokens = tokens_for(model, seq=seq)
        loss, grads = gradients(model, tokens)
        compiled_loss, compiled_grads = gradients(model, tokens, forward=compiled)
        torch.testing.assert_close(loss, compiled_loss)
        for name, grad in grads.items():
            torch.testing.assert_close(compiled_grads[name], grad, msg=name)
    assert counter.frame_count <= 2


def test_learns_a_sentence_by_heart() -> None:
    text = torch.tensor([list(b"A query attends to its own chunk and to all summaries.")])
    model = SparseTransformer(config(vocab=128, recompute=False))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss, _ = gradients(model, text)
        optimizer.step()
    assert loss < 0.3
    assert torch.equal(model.generate(text[:, :8], text.shape[1] - 8, temperature=0), text)


# Generation


def test_greedy_generation_follows_the_logits() -> None:
    model = build(config(dropout=0.3))
    made: list[int] = []
    tokens = model.generate(tokens_for(model, seq=7), 12, temperature=0, progress=made.append)
    assert tokens.shape == (2, 19)
    assert made == list(range(1, 13))
    assert model.training
    model.eval()
    assert torch.equal(tokens[:, 7:], model(tokens).argmax(-1)[:, 7:])
    model.generate(tokens, 1)
    assert not model.training


def generated_without_caches(
    model: SparseTransformer, tokens: Tensor, length: int, generator: torch.Generator | None
) -> Tensor:
    """Every token from the logits of the whole sequence; the likeliest without a generator."""
    model.eval()
    for _ in range(length):
        tokens = F.pad(tokens, (0, 1))
        logits = model(tokens)[:, -1].float()
        temperature = 0.7 if generator else 0
        tokens[:, -1] = sample(logits, temperature, None, None, generator)
    return tokens


@pytest.mark.parametrize(
    "changes",
    [
        *({"pattern": "fixed", "composition": x, "summary_blocks": 2} for x in COMPOSITIONS),
        *({"pattern": "strided", "composition": x} for x in COMPOSITIONS),
        {"pattern": "dense"},
        {"pattern": "local", "half_qk": True},
        {"pattern": "strided", "positions": "data", "position_shape": (5, 5, 3)},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_generation_is_that_without_caches(changes: dict[str, Any]) -> None:
    model = build(config(**changes))
    for given, length, greedy in ((0, 30, False), (1, 20, True), (17, 44, True)):
        prompt = tokens_for(model, seq=given)
        first, second = (None if greedy else torch.Generator().manual_seed(given) for _ in "ab")
        tokens = model.generate(prompt, length, 0 if greedy else 0.7, generator=first)
        assert torch.equal(tokens, generated_without_caches(model, prompt, length, second))
        model.double()


def test_decoder_keeps_what_the_patterns_read() -> None:
    model = build(config(context=2000, pattern="fixed", composition="interleaved", stride=20))
    decoder = Decoder(model.eval(), tokens_for(model, seq=900), 100)
    near, far = (cache.nbytes for cache in decoder.caches)
    row = 2 * 4 * (8 + 8) * 4  # batch, heads, head_dim of keys and values, fp32
    assert (near, far) == (20 * row, 1000 // 20 * 4 * row)
    assert decoder.graph is None  # on the CPU


@pytest.mark.gpu
@pytest.mark.parametrize("composition", COMPOSITIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_graph_replays_every_step(composition: str, dtype: torch.dtype) -> None:
    model = build(config(context=500, width=64, composition=composition), std=0.1)
    model = model.to("cuda", dtype).eval()
    text = tokens_for(model, seq=500).cuda()
    decoder, eager = (Decoder(model, text[:, :101], 399) for _ in range(2))
    graphs = set()
    for position in range(101, 499):
        logits = decoder.step(text[:, position])
        assert torch.equal(logits, eager.run_step(text[:, position]))
        graphs.add(decoder.graph)
    assert len(graphs - {None}) == 1
    assert eager.graph is None


@pytest.mark.gpu
def test_generation_under_autocast_follows_the_logits() -> None:
    model = build(config(context=300, width=64), std=0.1).cuda().eval()
    with torch.autocast("cuda", torch.bfloat16):
        tokens = model.generate(tokens_for(model, seq=7).cuda(), 200, temperature=0)
        logits = model(tokens)[:, 7:].float()
    # Where two tokens are about as likely, rounding may choose.
    chosen = logits.gather(-1, tokens[:, 7:, None]).squeeze(-1)
    assert (logits.amax(-1) - chosen).max() < 0.02 * logits.abs().max()


def test_generation_from_nothing_to_the_whole_context() -> None:
    model = build(config(context=21))
    nothing = torch.empty(3, 0, dtype=torch.int64)
    tokens = model.generate(nothing, 21, generator=torch.Generator().manual_seed(1))
    assert tokens.shape == (3, 21)
    assert len(tokens.unique()) > 1
    again = model.generate(nothing, 21, generator=torch.Generator().manual_seed(1))
    assert torch.equal(tokens, again)
    assert torch.equal(model.generate(tokens, 0), tokens)


def test_samples_have_the_probabilities_of_the_model() -> None:
    model = build(config())
    prompts = tokens_for(model, batch=1, seq=5).repeat(4000, 1)
    model.eval()
    logits = model(F.pad(prompts[:1], (0, 1)))[0, -1]
    for temperature, top_k, top_p in (
        (1.0, None, None),
        (2.0, 3, None),
        (0.5, 1, None),
        (3.0, 100, None),
        (8.0, None, 0.6),
        (8.0, 5, 0.6),
        (1.0, None, 1e-6),
        (3.0, None, 1.0),
    ):
        kept = logits.argsort(descending=True)[:top_k]
        shares = (logits[kept] / temperature).softmax(0)
        if top_p is not None:  # as few as reach top_p together
            enough = [sum(shares[:i].tolist()) >= top_p - 1e-6 for i in range(1, len(shares) + 1)]
            kept = kept[: enough.index(True) + 1]
            shares = shares[: len(kept)] / shares[: len(kept)].sum()
        expected = torch.zeros(11).scatter(0, kept, shares)
        samples = model.generate(prompts, 1, temperature, top_k, top_p)[:, -1]
        shares = samples.bincount(minlength=11) / len(samples)
        assert not shares[expected == 0].any()
        assert (shares - expected).abs().max() < 6 * math.sqrt(0.25 / len(samples))


def test_generation_keeps_the_mode_after_an_error() -> None:
    def stop(made: int) -> None:
        raise KeyboardInterrupt

    model = build(config())
    with pytest.raises(KeyboardInterrupt):
        model.generate(tokens_for(model, seq=3), 5, progress=stop)
    assert model.training


# Refusals


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m(torch.zeros(5, dtype=torch.int64)), ValueError, r"\(batch, seq\).*\(5,\)"),
        (lambda m: m(torch.zeros(1, 5)), TypeError, "int64, got torch.float32"),
        (lambda m: m(torch.zeros(1, 62, dtype=torch.int64)), ValueError, "at most 61.*62"),
        (lambda m: m.generate(tokens_for(m, seq=60), 2), ValueError, r"\[0, 1\]"),
        (lambda m: m.generate(tokens_for(m, seq=2), -1), ValueError, "got -1"),
        (lambda m: m.generate(tokens_for(m, seq=2), 1, -0.5), ValueError, "-0.5"),
        (
            lambda m: m.generate(tokens_for(m, seq=2), 1, 1.0, 0),
            ValueError,
            "top_k",
        ),
        (
            lambda m: m.generate(tokens_for(m, seq=2), 1, top_p=0.0),
            ValueError,
            r"top_p must be in \(0, 1\], got 0.0",
        ),
        (lambda m: m.generate(torch.full((1, 2), 11), 1), ValueError, r"\[0, 11\)"),
        (lambda m: m.generate(torch.full((1, 2), -1), 1), ValueError, r"\[0, 11\)"),
        (lambda m: m.attention_weights(tokens_for(m), 2, 0, 0), ValueError, r"layer.*\[0, 2\).*2"),
        (lambda m: m.attention_weights(tokens_for(m), 0, -1, 0), ValueError, r"head.*\[0, 4\).*-1"),
        (lambda m: m.attention_weights(tokens_for(m), 0, 0, 61), ValueError, r"position.*61\).*61"),
    ],
)
def test_refuses_bad_calls(
    call: Callable[[SparseTransformer], Tensor], error: type[Exception], message: str
) -> None:
    model = SparseTransformer(config())
    with pytest.raises(error, match=message):
        call(model)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"width": 30}, ValueError, "divisible by heads, got width 30, heads 4"),
        ({"width": 12, "half_qk": True}, ValueError, "even width / heads, got 3"),
        ({"width": 2048}, ValueError, "at most 256, got 512"),
        ({"layers": 0}, ValueError, "layers must be at least 1, got 0"),
        ({"vocab": True}, TypeError, "vocab must be an int, got True"),
        ({"context": 61.0}, TypeError, "context must be an int, got 61.0"),
        ({"stride": "16"}, TypeError, "stride must be an int, got '16'"),
        ({"pattern": "sparse"}, ValueError, "pattern must be one of .*'strided'.*'sparse'"),
        ({"composition": None}, ValueError, "composition must be one of .*None"),
        ({"initialisation": "Paper"}, ValueError, "initialisation must be one of .*'Paper'"),
        ({"positions": "rotary"}, ValueError, "positions must be one of .*'rotary'"),
        ({"columns": 17}, ValueError, r"at most stride, got 1 \* 17 with stride 16"),
        ({"summary_blocks": 5, "columns": 4}, ValueError, r"at most stride, got 5 \* 4"),
        ({"summary_blocks": 5, "columns": 2}, ValueError, "at most 4, the number of heads.*got 5"),
        ({"summary_blocks": 3, "composition": "multihead"}, ValueError, "at most 2.*got 3"),
        ({"summary_blocks": 2, "pattern": "strided"}, ValueError, "'strided'"),
        ({"heads": 1, "composition": "multihead"}, ValueError, "at least 2 heads, got 1"),
        ({"layers": 1, "composition": "interleaved"}, ValueError, "at least 2 layers, got 1"),
        ({"dropout": 1.0}, ValueError, r"\[0, 1\), got 1.0"),
        ({"dropout": math.nan}, ValueError, r"\[0, 1\), got nan"),
        ({"dropout": "0.1"}, TypeError, "dropout must be a float, got '0.1'"),
        ({"recompute": 1}, TypeError, "recompute must be a bool, got 1"),
        ({"positions": "data"}, ValueError, "needs position_shape"),
        ({"position_shape": (61,)}, ValueError, "needs positions='data'"),
        ({"positions": "data", "position_shape": (6, 10)}, ValueError, "61 tokens.*60"),
        ({"positions": "data", "position_shape": [61]}, TypeError, "tuple of ints"),
        ({"positions": "data", "position_shape": (61, 0)}, ValueError, "at least 1, got 0"),
    ],
)
def test_refuses_bad_configurations(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        config(**changes)


def test_options_of_other_patterns_do_not_matter() -> None:
    config(pattern="strided", columns=100)
    config(pattern="dense", heads=1, layers=1, composition="interleaved")


@pytest.mark.parametrize(
    "values", [config(), config(positions="data", position_shape=(61, 1, 3)), presets.enwik8()]
)
def test_configuration_survives_json(values: SparseTransformerConfig) -> None:
    assert SparseTransformerConfig.from_dict(json.loads(json.dumps(values.to_dict()))) == values


def test_from_dict_refuses() -> None:
    written = config().to_dict()
    with pytest.raises(ValueError, match="unknown names in a configuration: depth, rope"):
        SparseTransformerConfig.from_dict({**written, "rope": 1, "depth": 2})
    del written["width"], written["heads"]
    with pytest.raises(ValueError, match="names missing from a configuration: heads, width"):
        SparseTransformerConfig.from_dict(written)
    with pytest.raises(TypeError, match="must be a dict, got list"):
        SparseTransformerConfig.from_dict([])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="position_shape must be a tuple of ints, got 61"):
        SparseTransformerConfig.from_dict(
            {**config().to_dict(), "positions": "data", "position_shape": 61}
        )


# Presets


@pytest.mark.parametrize(
    ("values", "millions"),
    [
        (presets.enwik8(), 95),
        (presets.cifar10(), 59),
        (presets.imagenet64(), 152),
        (presets.music(), 152),
        (presets.music(262_144), 25),
        (presets.music(1_048_576), 3),
    ],
    ids=["enwik8", "cifar10", "imagenet64", "music-65536", "music-262144", "music-1048576"],
)
def test_presets_have_the_size_of_the_paper(
    values: SparseTransformerConfig, millions: float
) -> None:
    with torch.device("meta"):
        model = SparseTransformer(values)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert abs(parameters / (millions * 1e6) - 1) < 0.01


def test_presets_have_the_settings_of_the_paper() -> None:
    enwik8, cifar10 = presets.enwik8(), presets.cifar10()
    assert (enwik8.layers, enwik8.heads, enwik8.width, enwik8.context) == (30, 8, 512, 12288)
    assert layer_pattern(enwik8, 0) == Fixed(128, 32)
    assert (cifar10.layers, cifar10.heads, cifar10.width, cifar10.context) == (128, 2, 256, 3072)
    assert (cifar10.qk_width, cifar10.feed_forward_width, cifar10.dropout) == (128, 512, 0.25)
    assert [layer_pattern(cifar10, i) for i in (0, 1)] == [Local(96), Dilated(96)]
    imagenet64 = presets.imagenet64()
    assert (imagenet64.layers, imagenet64.heads, imagenet64.context) == (48, 16, 12288)
    assert imagenet64.position_axes == (64, 64, 3)
    assert [presets.music(n).stride for n in (65_536, 262_144, 1_048_576)] == [256, 512, 1024]


def test_music_has_three_contexts() -> None:
    with pytest.raises(ValueError, match=r"65536, 262144, 1048576.*got 12288"):
        presets.music(12288)


def test_demo_preset_runs() -> None:
    model = SparseTransformer(presets.demo())
    assert model(tokens_for(model, batch=1, seq=100)).shape == (1, 100, 256)
