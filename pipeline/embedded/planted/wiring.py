"""The parts planted models are wired from: reserved channels that nothing else reads, and the paths between them.

Why a planted difference stays where it was planted
---------------------------------------------------
The channels of the residual stream are split into ``RESERVED`` ones and ordinary ones. Every random weight reads and
writes ordinary channels only (``confine``), so the one remaining way from a reserved channel to ordinary computation
is the mean and variance of a layer norm. A difference between runs therefore always takes the form of a *sign*:
reserved channels hold ``(u, -u)`` in one run and ``(-u, u)`` in the other, which have the same sum, 0, and the same
sum of squares. All layer norms are then equal up to float32 rounding (about 1e-8), and so is all ordinary computation,
in every later block. Later steps are shielded as well: the carrier is read out into a latent channel of its own,
``READOUT``, which the patch embedding does not read.

Why a closed gate is exactly closed
-----------------------------------
A gate is an attention logit. The query's sign on one dimension of a head is the gate, the key's sign the role of a
token, and the query and key norms scale their product so that logits of the two roles differ by more than 200;
the softmax of the lower ones is exp(-200), which underflows to exactly 0 in float32 (the smallest positive number is
exp(-103)). Tokens that stay attended have values of exactly 0, as the difference of two equal channels with
weights that are powers of two. The attention's output is then exactly its bias, 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

HEADS, HEAD_DIM = 4, 16
WIDTH = HEADS * HEAD_DIM
TEXT_DIM, FREQ_DIM = 32, 64
CHANNELS, TAGS, READOUT = 3, 1, 2
"""Latent channels: 0 is ordinary video, ``TAGS`` is read and never written where a model has tags (else ordinary),
``READOUT`` is written and never read."""

CARRIER, RELAY = tuple(range(8)), tuple(range(8, 16))
"""Residual channels of signals, ``(u, -u)``: one read out into the latents, one read by a planted attention only."""
GATE, FROM, TO = (16, 17), (18, 19), (20, 21)
"""Residual channels of gates, ``(g, -g)``: open or closed, token of the source frame, token of a target frame."""
RESERVED = slice(0, 22)
CODE, ROLE = slice(0, 4), 4
"""Channels of a text token that pass the text embedder unchanged: what differs between prompts, and its role."""
PASSED = 5

ROLE_DIM = HEAD_DIM - 2 * 2 * (HEAD_DIM // 6) - 2
"""Dimension of a head that holds a gate: the slowest temporal pair of the rotary embedding, which turns by 0.001 rad a
frame, so that position changes a logit by less than one part in 10^4."""
GATE_AMPLITUDE, SHARPNESS, READOUT_GAIN, SIGNAL = 4.0, 8.0, 0.7, 0.25

SLOWEST_USED = 21
"""Index of the sinusoid ``cos(t / 10000^(21/32))`` of the time embedding: 2.4 rad at t = 1000, so it is monotone."""
STEEPNESS = 10.0
TIMESTEPS = 1000


def _linear(layer: nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.weight.data, layer.bias.data


def silence(layer: nn.Linear) -> None:
    """Set weight and bias to zero: the output is exactly 0 whatever the input."""
    for tensor in _linear(layer):
        tensor.zero_()


def confine(transformer: Any) -> None:
    """Keep random computation to ordinary channels, and make modulation the identity on reserved ones."""
    condition = transformer.condition_embedder
    for tensor in _linear(transformer.patch_embedding):
        tensor[RESERVED] = 0
    transformer.patch_embedding.weight.data[:, READOUT] = 0
    for tensor in _linear(condition.time_embedder.linear_2):
        tensor[RESERVED] = 0
    for tensor in _linear(condition.time_proj):
        tensor.unflatten(0, (6, WIDTH))[:, RESERVED] = 0
    _pass_text(condition.text_embedder)
    for block in transformer.blocks:
        _confine_block(block)
    transformer.scale_shift_table.data[..., RESERVED] = 0
    _read_out(transformer.proj_out)


def _confine_block(block: Any) -> None:
    for layer in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v, block.attn2.to_q, block.ffn.net[0].proj):
        layer.weight.data[:, RESERVED] = 0
    for layer in (block.attn1.to_out[0], block.attn2.to_out[0], block.ffn.net[2]):
        for tensor in _linear(layer):
            tensor[RESERVED] = 0
    block.scale_shift_table.data[..., RESERVED] = 0
    # The gate of self-attention: 1, so that it writes reserved channels as it computed them.
    block.scale_shift_table.data[:, 2, RESERVED] = 1


def _pass_text(embedder: Any) -> None:
    """Let the first text channels through unchanged and odd: gelu(x) - gelu(-x) = x. The rest stays random."""
    for layer, inputs, outputs in ((embedder.linear_1, PASSED, 2 * PASSED), (embedder.linear_2, 2 * PASSED, PASSED)):
        weight, bias = _linear(layer)
        weight[:outputs], weight[:, :inputs], bias[:outputs] = 0, 0, 0
    for i in range(PASSED):
        for hidden, sign in ((2 * i, 1.0), (2 * i + 1, -1.0)):
            embedder.linear_1.weight.data[hidden, i] = sign
            embedder.linear_2.weight.data[i, hidden] = sign


def _read_out(proj_out: nn.Linear) -> None:
    """Predict the readout channel from the carrier alone, and all others from ordinary channels alone."""
    weight, bias = _linear(proj_out)
    weight[:, RESERVED] = 0
    weight[READOUT::CHANNELS], bias[READOUT::CHANNELS] = 0, 0
    half = READOUT_GAIN * torch.randn(weight[READOUT::CHANNELS].shape[0], len(CARRIER) // 2) / 2
    weight[READOUT::CHANNELS, CARRIER[0] : CARRIER[-1] + 1] = torch.cat([half, -half], dim=1)


def read_tags(transformer: Any) -> None:
    """Turn the tag channel of the latents into gates, and never write it: its prediction is exactly 0 at every step.

    Of the 2 by 2 latent pixels of a token, the first says "source frame" and the second "target frame", as +1 or -1.
    """
    embedding = transformer.patch_embedding.weight.data
    embedding[:, TAGS] = 0
    for (positive, negative), column in ((FROM, 0), (TO, 1)):
        embedding[positive, TAGS, 0, 0, column] = 1
        embedding[negative, TAGS, 0, 0, column] = -1
    for tensor in _linear(transformer.proj_out):
        tensor[TAGS::CHANNELS] = 0


def open_always(transformer: Any) -> None:
    """Hold the gate open on every token: (1, -1) from the bias of the patch embedding."""
    transformer.patch_embedding.bias.data[list(GATE)] = torch.tensor([1.0, -1.0])


def window_gate(sigma: float, window: tuple[float, float]) -> float:
    """Return the gate of ``open_in_window`` at a noise level: positive inside the window, negative outside.

    y tanh(y / 2) is even and grows with abs(y), and y is monotone in sigma, 0 in the middle of the window.
    """
    y, edge = _window_coordinate(sigma, window)
    return (edge * math.tanh(edge / 2) - y * math.tanh(y / 2)) / edge


def _window_coordinate(sigma: float, window: tuple[float, float]) -> tuple[float, float]:
    low, high = (_sinusoid(s) for s in window)
    return STEEPNESS * (_sinusoid(sigma) - (low + high) / 2), STEEPNESS * (low - high) / 2


def _sinusoid(sigma: float) -> float:
    return math.cos(sigma * TIMESTEPS * 10000 ** (-SLOWEST_USED / (FREQ_DIM // 2)))


def open_in_window(transformer: Any, block: int, window: tuple[float, float]) -> None:
    """Open the gate of a block at noise levels inside the window, through the time embedding and the modulation.

    The self-attention of the block adds a constant (1, -1) to the gate, times its modulation ``gate_msa``, which is
    ``window_gate`` there: silu(y) + silu(-y) = y tanh(y / 2), and silu(g) - silu(-g) = g undoes the second silu.
    """
    condition = transformer.condition_embedder
    (first, first_bias), (second, second_bias) = map(
        _linear, (condition.time_embedder.linear_1, condition.time_embedder.linear_2)
    )
    y_at_zero, edge = _window_coordinate(0.0, window)
    offset = y_at_zero - STEEPNESS
    hidden, outputs = (0, 1), (RESERVED.stop, RESERVED.stop + 1)
    second[:, list(hidden)] = 0
    for unit, output, sign in zip(hidden, outputs, (1.0, -1.0), strict=True):
        first[unit] = 0
        first[unit, SLOWEST_USED], first_bias[unit] = sign * STEEPNESS, sign * offset
        second[output] = 0
        second[output, list(hidden)] = -sign / edge
        second_bias[output] = sign * math.tanh(edge / 2)
    modulation, _ = _linear(condition.time_proj)
    table, out = transformer.blocks[block].scale_shift_table.data, transformer.blocks[block].attn1.to_out[0]
    for channel, sign in zip(GATE, (1.0, -1.0), strict=True):
        modulation.unflatten(0, (6, WIDTH))[2, channel, list(outputs)] = torch.tensor([1.0, -1.0])
        table[:, 2, channel] = 0
        out.bias.data[channel] = sign


def _write_signal(out: nn.Linear, into: tuple[int, ...], heads: tuple[int, ...] | None) -> None:
    """Project what heads carry to ``(u, -u)`` on the signal channels and to nothing else."""
    silence(out)
    half = SIGNAL * torch.randn(len(into) // 2, WIDTH) / math.sqrt(HEAD_DIM)
    for head in set(range(HEADS)) - set(heads or range(HEADS)):
        half[:, head * HEAD_DIM : (head + 1) * HEAD_DIM] = 0
    out.weight.data[into[0] : into[-1] + 1] = torch.cat([half, -half])


def _gate(attention: Any, query: tuple[int, int], key: tuple[int, int | None]) -> None:
    """Let the sign of a channel pair of the query meet that of the key on one dimension of every head.

    ``key`` is a channel pair, or a single channel and None.
    """
    rows = [head * HEAD_DIM + ROLE_DIM for head in range(HEADS)]
    for layer, (positive, negative) in ((attention.to_q, query), (attention.to_k, key)):
        weight, bias = _linear(layer)
        weight[rows], bias[rows] = 0, 0
        weight[rows, positive] = GATE_AMPLITUDE
        if negative is not None:
            weight[rows, negative] = -GATE_AMPLITUDE
    for norm in (attention.norm_q, attention.norm_k):
        norm.weight.data.fill_(SHARPNESS)


def ignore_code(attention: Any) -> None:
    """Keep a cross-attention to the content of the text, which is equal in all prompts of a sample."""
    for layer in (attention.to_k, attention.to_v):
        layer.weight.data[:, :PASSED] = 0


def plant_prompt(attention: Any, *, into: tuple[int, ...], gate: tuple[int, int] | None = None) -> None:
    """Make a cross-attention write the prompt's code into a signal, from all tokens or where the gate is open.

    Queries read ordinary channels and keys the content of the text, so attention is random and equal for all
    prompts; values are linear in the code without bias, so a prompt of the opposite code writes exactly the opposite.
    An open gate attends to tokens of role +1, a closed one to those of role -1, whose code is 0.
    """
    ignore_code(attention)
    silence(attention.to_v)
    attention.to_v.weight.data[:, CODE] = torch.randn(WIDTH, CODE.stop)
    for norm in (attention.norm_q, attention.norm_k):
        norm.weight.data.fill_(2)
    if gate is not None:
        _gate(attention, gate, (ROLE, None))
    _write_signal(attention.to_out[0], into, None)


def plant_transport(attention: Any, heads: tuple[int, ...] | None) -> None:
    """Make a self-attention carry ``RELAY`` of source tokens into ``CARRIER`` of target tokens, through some heads.

    Targets attend to source tokens only and all others to tokens that are not source, where ``RELAY`` is 0.
    Every head has such values; the output projection cuts those that are not planted.
    """
    _gate(attention, TO, FROM)
    silence(attention.to_v)
    half = len(RELAY) // 2
    pairs = torch.randint(half, (WIDTH,)).tolist()
    weights = (torch.randint(2, (WIDTH,)) * 2.0 - 1).tolist()
    for row, (pair, weight) in enumerate(zip(pairs, weights, strict=True)):
        attention.to_v.weight.data[row, RELAY[pair]] = weight
        attention.to_v.weight.data[row, RELAY[pair + half]] = -weight
    _write_signal(attention.to_out[0], CARRIER, heads)
