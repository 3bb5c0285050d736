"""How long a step takes, by arithmetic: multiplications, traffic of everything between them, the optimizer's traffic,
and the host's launches where no recorded step is replayed.

The shares are fitted to measured steps of an H100 and an H200 (bench/RESULTS.md); another card's time is predicted with
the same shares of what its maker says.
"""

from __future__ import annotations

from minitune.train.cards import Card
from minitune.train.memory import Choice
from minitune.train.shapes import Setup
from minitune.train.steps import Walk

PRODUCTS = 0.62  # of the card's multiplications a second, in large products
LONG = 0.25  # the same in the attention of long rows
ROTATION = 48, 52  # bytes a value of q and k that long rows' rotation moves, forward and backward
TRAFFIC = 0.8  # of its bandwidth, in what lies between them
FORMED = 1.0  # where weights of four bits are formed, much of it within the cache
UPDATE, FASTEST = 0.85, 2.4e12  # in the optimizer; bytes a second that its arithmetic lets through at most
LAYER = 50e-6  # seconds a layer, forward and backward, beside all of that
LAUNCHED = 3.7e-3  # seconds in which a host launches a layer's work by hand; adapters: half as much again
PLAIN = 5.0  # times the traffic where layers are not done by hand, and twice the launches


def step_seconds(setup: Setup, choice: Choice, card: Card, walk: Walk) -> float:
    """The mean of a run's steps."""
    packs = len(walk.sizes)
    tokens, positions = (float(walk.sizes[:, i].sum()) for i in (0, 1)) if packs else (0.0, 0.0)
    rotated = setup.rotated(walk.load.longest) if setup.by_hand else 0  # of plain layers it is within PLAIN
    attended = _attention(setup, choice, walk.context) * tokens * (PRODUCTS / LONG if rotated else 1.0)
    computed = (_products(setup, choice, tokens, positions) + attended) / (PRODUCTS * card.tflops * 1e12)
    layers = setup.shape.num_hidden_layers
    turned = layers * rotated * (ROTATION[0] * (1 + _recomputed(setup, choice)) + ROTATION[1])
    moved = (_traffic(setup, choice) + turned) * tokens
    moved += _weights_traffic(setup, choice) * packs * TRAFFIC / FORMED
    if setup.lora is None:  # a step's gradients are added up, pack by pack
        moved += 2 * setup.size * setup.parameters * max(0, packs - walk.walked)
    between = moved / (TRAFFIC * card.bandwidth * 1e9)
    update = _update(setup, choice) / min(UPDATE * card.bandwidth * 1e9, FASTEST)
    device = computed + between + layers * LAYER * packs
    wait = max(0.0, _launches(setup, choice) - device / max(1, packs)) * walk.plain
    return (device + wait) / max(1, walk.walked) + update


def _launches(setup: Setup, choice: Choice) -> float:
    """Seconds in which the host launches a plain pack."""
    each = LAUNCHED * (1.0 if setup.lora is None else 1.5) * (1.0 if setup.by_hand else 2.0)
    return setup.shape.num_hidden_layers * each * (1 + 0.5 * _recomputed(setup, choice))


def _recomputed(setup: Setup, choice: Choice) -> float:
    """The part of the layers that are computed again."""
    layers = setup.shape.num_hidden_layers
    return (layers - choice.whole) / layers


def _products(setup: Setup, choice: Choice, tokens: float, positions: float) -> float:
    """Operations of all packs, without attention's."""
    matrices, layers = setup.matrices, setup.shape.num_hidden_layers
    layer = sum(matrices.values())
    forward, back = 2.0, 2.0 if setup.lora is not None else 4.0
    again = _recomputed(setup, choice) * 2.0 * (1 - matrices["mlp.down"] / layer)
    head = setup.head * (4.0 if setup.lora is not None else 6.0)
    return tokens * layers * (forward + back + again) * layer + positions * head


def _attention(setup: Setup, choice: Choice, context: float) -> float:
    """Operations a token that attends to so many."""
    s = setup.shape
    each = 4 * context * s.num_attention_heads * s.head_dim
    return s.num_hidden_layers * each * (3.5 + _recomputed(setup, choice))


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
    each = (46 if setup.size < 4 else 36) if choice.optim == "adamw" else 14
    return float(each * setup.parameters)


def seconds_said(seconds: float) -> str:
    """0.0194 -> 19 ms, 95 -> 1:35, 3700 -> 1:01:40."""
    if seconds < 10:
        return f"{1e3 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
