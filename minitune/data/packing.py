"""Lengths -> packed steps. A pure function: the same order and lengths give the same steps everywhere."""

from __future__ import annotations

from collections.abc import Sequence


def steps_of_rows(order: Sequence[int], rows_per_step: int) -> list[list[int]]:
    """Consecutive runs of `rows_per_step` rows; the last one is short, no row is lost."""
    return [list(order[i : i + rows_per_step]) for i in range(0, len(order), rows_per_step)]


def steps_of_tokens(order: Sequence[int], lengths: Sequence[int], tokens_per_step: int) -> list[list[int]]:
    """Consecutive runs of at most `tokens_per_step` tokens (a longer row is a step of its own)."""
    out: list[list[int]] = []
    held = tokens_per_step + 1
    for row in order:
        if held + lengths[row] > tokens_per_step:
            out.append([])
            held = 0
        out[-1].append(row)
        held += lengths[row]
    return out


def packs(rows: Sequence[int], lengths: Sequence[int], tokens_per_pack: int) -> list[list[int]]:
    """One step's rows in as few packs of at most `tokens_per_pack` tokens as first-fit decreasing finds.

    A row longer than that is a pack of its own. Within a pack rows keep their order of `rows`.
    """
    if sum(lengths[r] for r in rows) <= tokens_per_pack:
        return [list(rows)]
    place = {row: i for i, row in enumerate(rows)}
    room: list[int] = []
    out: list[list[int]] = []
    for row in sorted(rows, key=lambda r: (-lengths[r], place[r])):
        for i, free in enumerate(room):
            if lengths[row] <= free:
                out[i].append(row)
                room[i] -= lengths[row]
                break
        else:
            out.append([row])
            room.append(tokens_per_pack - lengths[row])
    return [sorted(pack, key=place.__getitem__) for pack in out]
