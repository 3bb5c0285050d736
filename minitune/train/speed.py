"""How long a step takes, by arithmetic: multiplications, traffic of everything between them, the optimizer's traffic.

Four numbers are fitted to an H100's measured steps (bench/RESULTS.md); another card's time is predicted with the same
shares of what its maker says.
"""

from __future__ import annotations

from minitune.train.cards import Card
from minitune.train.memory import Choice, Setup
from minitune.train.steps import Walk

PRODUCTS = 0.75  # of the card's multiplications a second, in large products
TRAFFIC = 0.49  # of its bandwidth, in what lies between them
UPDATE = 0.63  # in the optimizer
LAYER = 40e-6  # seconds a layer, forward and backward, beside both
LAUNCHED = 1e-3  # seconds in which a host launches a layer's work, where no graph is replayed
PLAIN = 3.0  # times the traffic where layers are not done by hand


def step_seconds(setup: Setup, choice: Choice, card: Card, walk: Walk) -> float:
    """The mean of a run's steps."""
    packs = len(walk.sizes)
    tokens, positions = (float(walk.sizes[:, i].sum()) for i in (0, 1)) if packs else (0.0, 0.0)
    computed = _products(setup, choice, walk.context, tokens, positions) / (PRODUCTS * card.tflops * 1e12)
    layers = setup.shape.num_hidden_layers
    moved = _traffic(setup, choice) * tokens + _weights_traffic(setup, choice) * packs
    if setup.lora is None:  # a step's gradients are added up, pack by pack
        moved += 2 * setup.size * setup.parameters * max(0, packs - walk.walked)
    between = moved / (TRAFFIC * card.bandwidth * 1e9)
    update = _update(setup, choice) / (UPDATE * card.bandwidth * 1e9)
    device = computed + between + layers * LAYER * packs
    launched = layers * (LAUNCHED if setup.by_hand else 5 * LAUNCHED)
    wait = max(0.0, launched - device / max(1, packs)) * walk.plain
    return (device + wait) / max(1, walk.walked) + update


def _recomputed(setup: Setup, choice: Choice) -> float:
    """The part of the layers that are computed again."""
    layers = setup.shape.num_hidden_layers
    return (layers - choice.whole) / layers


def _products(setup: Setup, choice: Choice, context: float, tokens: float, positions: float) -> float:
    """Operations of all packs."""
    s, matrices = setup.shape, setup.matrices
    layer, layers = sum(matrices.values()), s.num_hidden_layers
    forward, back = 2.0, 2.0 if setup.lora is not None else 4.0
    again = _recomputed(setup, choice) * 2.0 * (1 - matrices["mlp.down"] / layer)
    attention = 4 * context * s.num_attention_heads * s.head_dim * (3.5 + _recomputed(setup, choice))
    head = setup.head * (4.0 if setup.lora is not None else 6.0)
    return tokens * layers * ((forward + back + again) * layer + attention) + positions * head


def _traffic(setup: Setup, choice: Choice) -> float:
    """Bytes a token that what lies between the products reads and writes."""
    s, size = setup.shape, setup.size
    H, F = s.hidden_size, s.intermediate_size
    out = s.num_attention_heads * s.head_dim
    qkv = out + 2 * s.num_key_value_heads * s.head_dim
    forward = 8 * H + qkv + 2 * out + 3 * F
    back = 8 * H + 3 * qkv + 5 * F + (8 * H if setup.lora is None else 19 * H)
    if setup.lora is not None:
        forward += 2 * H
    whole = forward * (1 + _recomputed(setup, choice)) + back
    return s.num_hidden_layers * whole * size * (1.0 if setup.by_hand else PLAIN)


def _weights_traffic(setup: Setup, choice: Choice) -> float:
    """Bytes a pack of weights of few bits that are made whole before each use."""
    if not setup.packed:
        return 0.0
    count = setup.shape.num_hidden_layers * sum(setup.matrices.values())
    return count * (setup.bits / 8 + setup.size) * (2 + _recomputed(setup, choice))


def _update(setup: Setup, choice: Choice) -> float:
    """Bytes of one update: weights, gradients, moments, read and written, and the gradients' own writing."""
    if setup.lora is not None:
        return 30.0 * setup.adapters
    each = (42 if setup.size < 4 else 32) if choice.optim == "adamw" else 14
    return float(each * setup.parameters)


def seconds_said(seconds: float) -> str:
    """0.0194 -> 19 ms, 95 -> 1:35, 3700 -> 1:01:40."""
    if seconds < 10:
        return f"{1e3 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
