"""What a run holds on a card, part by part, by arithmetic: from a model's shape, settings and lengths, before anything
is loaded. Measured figures stand beside it in tests/train/test_memory.py.

Legend: T tokens, P supervised positions, H hidden, F FFN width, N heads, K key/value heads, D head width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from minitune.model.attention import Kernel
from minitune.train.shapes import Setup

MIB, GIB = 1 << 20, 1 << 30
# Matrix workspaces and what the allocator rounds up, fitted to measured peaks; `fast.settle_memory` says the first.
WORKSPACES, SPARING = 240 * MIB, 120 * MIB
# The driver's part: context, modules, graphs; seen beside the reserved peaks of an H100: 0.69 to 0.77 and 0.80 to 0.90.
CONTEXT, CONTEXT_SPARING = 860 * MIB, 770 * MIB
ROTATED = 18  # bytes a value of q and k in the backward of long rows' rotation, in float32; fitted to two runs


@dataclass(frozen=True)
class Load:
    """The largest step of a run: tokens and supervised positions of what is computed at once, the longest document.

    several: some steps are more than one pack. beside: tokens of the largest pack that runs plainly beside a captured
    step, whose memory stays. held: tokens of the largest pack of held-out rows.
    """

    tokens: int
    positions: int
    longest: int
    several: bool = False
    beside: int = 0
    held: int = 0


@dataclass(frozen=True)
class Choice:
    """What the planner decides. whole: layers that keep their activations, from the last (adapters: all, or one).
    pack: tokens computed at once at most. chunk: positions whose logits exist at once, 0: as `step.chunk_of` says."""

    optim: str
    whole: int
    pack: int = 8192
    chunk: int = 0


@dataclass(frozen=True)
class Parts:
    """Bytes on a card at a run's peak."""

    weights: int = 0
    optimizer: int = 0
    gradients: int = 0
    activations: int = 0
    logits: int = 0
    workspaces: int = 0
    context: int = 0

    @property
    def reserved(self) -> int:
        """What the allocator reserves."""
        return self.total - self.context

    @property
    def total(self) -> int:
        """What the driver counts."""
        return sum(getattr(self, f.name) for f in fields(self))


def layer_bytes(setup: Setup, kernel: Kernel, index: int = 0) -> int:
    """Bytes a token that a layer keeps for its backward."""
    s, size = setup.shape, setup.size
    H, F, D, N, K = s.hidden_size, s.intermediate_size, s.head_dim, s.num_attention_heads, s.num_key_value_heads
    qkv, out = (N + 2 * K) * D, N * D
    # q and k, rotated; keys and values as many as queries, see `attention.alike`
    rotated = 0 if kernel == "short" else N * D + (K * D if K == N else 2 * N * D)
    statistics = 4 * N  # float32 log-sum-exp
    if setup.by_hand:
        if setup.lora is None:  # `model.full` computes norms again
            kept = 2 * H + qkv + out + 2 * F + (0 if kernel == "short" else rotated + out)
            return kept * size + statistics
        strips = setup.strips
        kept = 2 * H + (H + strips["attn.qkv"]) + qkv + (out + strips["attn.o"]) + 2 * F
        kept += H + strips["mlp.gate_up"] if strips["mlp.gate_up"] else 0  # the second norm's result
        kept += 0 if kernel == "short" else rotated + out  # autograd has a result of its own
        return kept * size + statistics + 8
    kept = qkv + rotated + out + 3 * F  # gate | up, silu(gate)
    if setup.lora is None:
        kept += 4 * H + F  # norms without and with their weight, what down multiplies
    else:  # dropout's mask, and what it leaves
        rows = setup.rows_of_a[index]
        kept += sum(2 * inputs for kind, (inputs, _) in setup.linears.items() if rows[kind])
    norms = 2 * H * 4  # their inputs in float32
    return kept * size + statistics + norms


def parts(setup: Setup, load: Load, choice: Choice) -> Parts:
    """What a run of such steps holds at its peak."""
    layers, sparing = setup.shape.num_hidden_layers, choice.whole < setup.shape.num_hidden_layers
    out = _full(setup, load, choice) if setup.lora is None else _adapters(setup, load, choice)
    more = _forward(setup, load.held)
    if load.beside:
        again = replace(load, tokens=load.beside, beside=0, held=0)
        other = parts(setup, again, choice)
        out = replace(out, activations=out.activations + other.activations, logits=out.logits + other.logits)
    return replace(
        out,
        weights=out.weights + _weights(setup, layers),
        workspaces=out.workspaces + more + (SPARING if sparing else WORKSPACES),
        context=CONTEXT_SPARING if sparing else CONTEXT,
    )


def _weights(setup: Setup, layers: int) -> int:
    linears = sum(setup.matrices.values())
    strips = sum(sum(parts.values()) * setup.strips[kind] for kind, (_, parts) in setup.linears.items())
    rest = setup.parameters - layers * linears + (-setup.shape.vocab_size % 64) * setup.shape.hidden_size
    packed = int(layers * linears * setup.bits / 8)
    if not setup.packed:
        return packed + (layers * strips + rest) * setup.size
    # Where a weight is formed: one place for each kind, strips behind it; else the weight at hand.
    formed = linears + strips if setup.by_hand else max(setup.matrices.values())
    return packed + (rest + formed) * setup.size


def chunk_of(setup: Setup, choice: Choice) -> int:
    """Positions whose logits exist at once, as `step.chunk_of` has them where nothing else is chosen."""
    if choice.chunk:
        return choice.chunk
    small = not setup.kernels or (setup.by_hand and choice.whole < setup.shape.num_hidden_layers)
    return 512 if small else 2048


def _logits(setup: Setup, load: Load, choice: Choice) -> int:
    width = setup.shape.vocab_size + -setup.shape.vocab_size % 64
    each = setup.size if setup.kernels else setup.size + 8  # and in float32, twice
    return min(load.positions, chunk_of(setup, choice)) * width * each


def _mask(setup: Setup, load: Load) -> int:
    return load.tokens**2 * (setup.size + 1) if setup.kernel(load.longest) == "masked" else 0


def _adapters(setup: Setup, load: Load, choice: Choice) -> Parts:
    size, H = setup.size, setup.shape.hidden_size
    layers, kernel = setup.shape.num_hidden_layers, setup.kernel(load.longest)
    each = [layer_bytes(setup, kernel, i) for i in range(layers)]
    logits = _logits(setup, load, choice)
    learns = Parts(weights=4 * setup.adapters, gradients=4 * setup.adapters, optimizer=8 * setup.adapters)
    if not setup.by_hand:
        working, kept = _working(setup, load, 3), sum(each)
        if choice.whole < layers:
            kept, working = layers * H * size, working + max(each)
        return replace(learns, activations=load.tokens * (kept + working) + _mask(setup, load), logits=logits)
    learns = replace(learns, weights=learns.weights + size * setup.adapters)  # the computation's copy
    kept, again = sum(each), 0
    if choice.whole < layers:
        strips = setup.strips["attn.qkv"] + setup.strips["attn.o"]
        inputs = layers * (H + strips) * size
        kept, again = inputs - (H + strips) * size + each[-1], inputs + each[0]
    # The last norm goes through autograd: beside its float32 input, five more in its backward; or the logits; or a
    # layer's backward.
    norm = load.tokens * H * (20 + 9 * size // 2)
    head = logits + load.tokens * H * (4 + 3 * size)
    layer = load.tokens * (_working(setup, load, 3) + max(0, again - kept))
    return _at_peak(learns, load.tokens * kept, logits, max(norm, head, layer))


def _at_peak(learns: Parts, kept: int, logits: int, more: int) -> Parts:
    """more: what is there beside what layers keep, the logits or something else."""
    logits = min(logits, more)
    return replace(learns, activations=kept + more - logits, logits=logits)


def _full(setup: Setup, load: Load, choice: Choice) -> Parts:
    out = _full_backward(setup, load, choice)
    if choice.optim == "adamw" and setup.size < 4:
        masters = 4 * setup.parameters
        out = replace(out, gradients=out.gradients + max(0, masters - out.activations - out.logits))
    return out


def _full_backward(setup: Setup, load: Load, choice: Choice) -> Parts:
    size, H = setup.size, setup.shape.hidden_size
    layers, whole, count = setup.shape.num_hidden_layers, choice.whole, setup.parameters
    layer = layer_bytes(setup, setup.kernel(load.longest))
    logits, tokens = _logits(setup, load, choice), load.tokens
    learns = Parts(optimizer=2 * count + count // 32)  # codes and scales
    if choice.optim == "adamw":  # below float32 a master; its gradient is made when the activations are gone
        learns = Parts(optimizer=(12 if size < 4 else 8) * count, gradients=size * count)
    elif choice.optim == "adamw_8bit":
        learns = replace(learns, gradients=size * count)
    else:  # one gradient of a layer's matrices is at hand
        learns = replace(learns, gradients=size * max(setup.matrices.values()))
    kept = whole * layer + (layers - whole) * H * size
    if not setup.by_hand:
        more = tokens * (_working(setup, load, 4) + (layer if whole < layers else 0)) + _mask(setup, load) + logits
        return _at_peak(learns, tokens * kept, logits, more)
    backward, head = _backward(setup, load, choice), setup.head * size
    if choice.optim != "adamw_8bit_in_backward" or load.positions > H:
        if choice.optim == "adamw_8bit_in_backward":  # the head's gradient, from the forward on
            learns = replace(learns, gradients=learns.gradients + head)
        return _at_peak(learns, tokens * kept, logits, max(backward - tokens * kept, logits))
    # All logits' gradient is kept; the head's is made when the layers' activations are gone, whose holes, about
    # half of them, do not hold it in one piece.
    logits = load.positions * (setup.shape.vocab_size + -setup.shape.vocab_size % 64) * size
    peak = max(backward, head + backward // 2)
    return _at_peak(learns, tokens * kept, logits, max(0, peak - tokens * kept) + logits)


def _backward(setup: Setup, load: Load, choice: Choice) -> int:
    """What layers by hand hold when their backward begins, or where the first of them is computed again."""
    size, H = setup.size, setup.shape.hidden_size
    layers, layer = setup.shape.num_hidden_layers, layer_bytes(setup, setup.kernel(load.longest))
    kept = choice.whole * layer + (layers - choice.whole) * H * size
    again = layers * H * size + layer if choice.whole < layers else 0
    return load.tokens * (max(kept, again) + _working(setup, load, 4))


def _working(setup: Setup, load: Load, hidden: int) -> int:
    """Bytes a token that a layer's backward holds beside what is kept: the MLP's part with so many hidden states, or
    attention's where autograd rotates q and k."""
    mlp = (2 * setup.shape.intermediate_size + hidden * setup.shape.hidden_size) * setup.size
    return max(mlp, ROTATED * setup.rotated(load.longest))


def spare(setup: Setup, load: Load, choice: Choice) -> int:
    """Bytes beyond the peak that the allocator wants to find under a bound: it counts a block whole that would partly
    lie in a hole, and while a step is recorded it gives nothing back. The head's gradient inside backward is by far
    the largest such block: it may come on top of all that layers keep."""
    if choice.optim != "adamw_8bit_in_backward" or not setup.by_hand or load.positions > setup.shape.hidden_size:
        return 0
    head, backward = setup.head * setup.size, _backward(setup, load, choice)
    return head + backward - max(backward, head + backward // 2)


def _forward(setup: Setup, tokens: int) -> int:
    """Of held-out rows: nothing is kept, but it lies beside the step's memory."""
    if not tokens:
        return 0
    s, size = setup.shape, setup.size
    heads = (s.num_attention_heads * 2 + 2 * s.num_key_value_heads) * s.head_dim
    logits = min(tokens, 2048) * s.vocab_size * (size if setup.kernels else size + 8)
    return tokens * (4 * s.hidden_size + heads + 3 * s.intermediate_size) * size + logits
