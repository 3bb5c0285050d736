"""Cards: what their maker says of them, the one that is here, and how much of it a run may take."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from minitune.config import UserError
from minitune.train.memory import CONTEXT, GIB, Choice, Parts

# Builds of PyTorch for CUDA 12.6, the last of which is 2.14's, hold code for them; newer CUDA has none.
PASCAL = "pip install 'torch==2.14.*' --index-url https://download.pytorch.org/whl/cu126"


@dataclass(frozen=True)
class Card:
    """memory: GiB as it is sold. tflops: of half-precision products with float32 sums, dense. bandwidth: GB/s."""

    name: str
    memory: float
    tflops: float
    bandwidth: float
    capability: tuple[int, int]

    @property
    def dtype(self) -> torch.dtype:
        """Of a run that leaves it open."""
        return torch.bfloat16 if self.capability >= (8, 0) else torch.float16

    @property
    def served(self) -> bool:
        """Whether current builds of PyTorch hold code for it."""
        return self.capability >= (7, 5)

    @property
    def room(self) -> int:
        """Bytes that a run finds on it, its own context included: what is sold less what the driver and a screen take,
        and the twentieth that is left free."""
        return int(0.95 * 0.98 * self.memory * GIB)


# From NVIDIA's data sheets and architecture papers.
CARDS = (
    Card("1080", 8, 8.9, 320, (6, 1)),
    Card("1080 Ti", 11, 11.3, 484, (6, 1)),
    Card("2080", 8, 40.3, 448, (7, 5)),
    Card("2080 Ti", 11, 53.8, 616, (7, 5)),
    Card("3060", 12, 25.5, 360, (8, 6)),
    Card("3090", 24, 71.0, 936, (8, 6)),
    Card("4060", 8, 30.2, 272, (8, 9)),
    Card("4060 Ti 16GB", 16, 44.1, 288, (8, 9)),
    Card("4070", 12, 58.3, 504, (8, 9)),
    Card("4080", 16, 97.5, 717, (8, 9)),
    Card("4090", 24, 165.2, 1008, (8, 9)),
    Card("5080", 16, 112.6, 960, (12, 0)),
    Card("5090", 32, 209.5, 1792, (12, 0)),
    Card("A100 40GB", 40, 312.0, 1555, (8, 0)),
    Card("A100 80GB", 80, 312.0, 2039, (8, 0)),
    Card("H100", 80, 989.0, 3350, (9, 0)),
    Card("H200", 141, 989.0, 4800, (9, 0)),
)


def words(name: str) -> str:
    """A card's name without what sellers add: "NVIDIA GeForce RTX 4060 Ti" -> "4060ti"."""
    return re.sub(r"nvidia|geforce|rtx|gtx|[^a-z0-9]", "", name.lower())


def key(card: Card) -> str:
    """The same without the memory's size."""
    return re.sub(r"\d\dgb$", "", words(card.name))


def named(name: str) -> Card:
    """The card of this name; UserError where the table has none, or several."""
    wanted = words(name)
    found = [card for card in CARDS if wanted == words(card.name)] or [card for card in CARDS if wanted == key(card)]
    if len(found) != 1:
        raise UserError(f"--card {name!r} is not in the table; it has {', '.join(card.name for card in CARDS)}")
    return found[0]


def like(name: str, total: int) -> Card | None:
    """The table's card that a driver's name and bytes of memory belong to; None where there is none. Names of cards
    for a person's machine end where they end: a laptop's or a "Super" is another card."""
    plain = words(name)
    for card in CARDS:
        same = plain == key(card) if card.name[0].isdigit() else plain.startswith(key(card))
        if same and abs(card.memory - total / GIB) < 0.15 * card.memory:
            return card
    return None


def _taken(device: torch.device) -> tuple[int, int, int]:
    """(free, all, the allocator's) bytes of one moment, while another thread may be filling the card."""
    while True:
        before = torch.cuda.memory_reserved(device)
        free, total = torch.cuda.mem_get_info(device)
        if torch.cuda.memory_reserved(device) == before:
            return free, total, before


def _context(free: int, total: int, reserved: int) -> int:
    """What the driver holds for this process beside the allocator, as far as that can be told: where others use the
    card too, what a process usually has."""
    return max(0, min(total - free - reserved, CONTEXT))


def room_on(device: torch.device, cap: int) -> int:
    """Bytes that this process may hold as the driver counts it: nineteen twentieths of what is free or its own; cap: at
    most 99 % of so many (0: no cap)."""
    free, total, reserved = _taken(device)
    room = int(0.95 * (free + reserved + _context(free, total, reserved)))
    return min(room, int(0.99 * cap)) if cap else room


def hold(device: torch.device, cap: int, parts: Parts) -> None:
    """Lets the allocator reserve no more than `cap` less the driver's part; what would go beyond is an end of memory
    that says so."""
    free, total, reserved = _taken(device)
    limit = cap - max(parts.context, _context(free, total, reserved))
    index = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.set_per_process_memory_fraction(max(0.0, min(1.0, limit / total)), index)


def check_served(device: torch.device) -> None:
    """UserError, one line, for a card that this build of PyTorch has no code for."""
    if device.type != "cuda":
        return
    major, minor = torch.cuda.get_device_capability(device)
    built = [int(name[3:].rstrip("af")) for name in torch.cuda.get_arch_list() if name.startswith("sm_")]
    if (major, minor) >= (7, 5) or not built or any(number // 10 == major and number % 10 <= minor for number in built):
        return
    name = torch.cuda.get_device_name(device)
    raise UserError(
        f"{name} (compute capability {major}.{minor}): PyTorch {torch.__version__} holds no code for it; builds for "
        f"CUDA 12.6 do, to PyTorch 2.14: {PASCAL}"
    )


def describe(choice: Choice, method: str, layers: int) -> str:
    """What was chosen, in a few words."""
    kept = "all layers kept" if choice.whole >= layers else f"{choice.whole} of {layers} layers kept"
    if method != "full" and choice.whole < layers:
        kept = "layers recomputed"
    if choice.chunk:
        kept += f", logits of {choice.chunk} positions at a time"
    return f"{choice.optim}, {kept}" if method == "full" else kept


def here(device: torch.device) -> Card | None:
    """The table's line of this machine's card."""
    found = torch.cuda.get_device_properties(device)
    return like(found.name, found.total_memory)
