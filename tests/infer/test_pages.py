"""The page pool under random schedules, against a model of what each page holds."""

from __future__ import annotations

import random

import pytest

from minitune.infer.pages import LEAST, Chain, PagePool


class Books:
    """A pool with its users: what was written to each page, checked at every turn."""

    def __init__(self, count: int, size: int):
        self.pool, self.size, self.count = PagePool(count, size), size, count
        self.written: dict[int, list[tuple[object, int, int]]] = {}
        self.running: list[tuple[object, Chain, list[int], int]] = []  # key, chain, ids, computed

    def admit(self, key: object, ids: list[int], spare: int = 0) -> bool:
        before = self.pool.available
        chain = self.pool.open(key, ids, spare)
        if chain is None:
            assert self.pool.available == before
            return False
        assert self.pool.available >= spare
        if chain.copied is not None:
            source, target = chain.copied
            self.written[target] = list(self.written[source])
        # what is reused is what would be computed: same key, place and token, all along
        assert chain.reused < len(ids)
        for at in range(chain.reused):
            assert self.written[chain.pages[at // self.size]][at % self.size] == (key, at, ids[at])
        assert len(chain.pages) * self.size >= len(ids) + 1
        self.running.append((key, chain, list(ids), chain.reused))
        return True

    def compute(self, index: int, count: int, fresh: int) -> bool:
        """Writes `count` more tokens, drawn ones where the prompt is over; False where no page is left."""
        key, chain, ids, computed = self.running[index]
        for _ in range(count):
            if computed == len(ids):
                ids.append(fresh)
            if computed >= len(chain.pages) * self.size and not self.pool.grow(chain):
                self.running[index] = (key, chain, ids, computed)
                return False
            page = chain.pages[computed // self.size]
            shared = {node.page for node in chain.shared}
            assert page not in shared, "a page that others read is written to"
            held = self.written.setdefault(page, [])
            del held[computed % self.size :]
            held.append((key, computed, ids[computed]))
            computed += 1
        self.running[index] = (key, chain, ids, computed)
        return True

    def share(self, index: int) -> None:
        _, chain, ids, computed = self.running[index]
        before = chain.pages
        self.pool.share(chain, ids[:computed])
        assert chain.pages == before

    def leave(self, index: int) -> None:
        _, chain, ids, computed = self.running.pop(index)
        self.pool.close(chain, ids[:computed])

    def check(self) -> None:
        """Every page is free, kept, or of someone who runs; own pages have one owner."""
        own = [page for _, chain, _, _ in self.running for page in chain.own]
        shared = {node.page for _, chain, _, _ in self.running for node in chain.shared}
        kept = [node.page for node in self.pool._kept]
        everything = [*own, *shared, *kept, *self.pool._free]
        assert sorted(everything) == list(range(1, self.count + 1))
        assert self.pool.available == len(kept) + len(self.pool._free)
        for node in self.pool._kept:
            assert node.users == 0 and node.parent is not None and node.parent.children[node.tokens] is node


@pytest.mark.parametrize("seed", range(60))
def test_random_schedules_keep_the_books(seed: int) -> None:
    """Admitting, computing, sharing, leaving in any order, with few beginnings so that much is shared."""
    chance = random.Random(seed)
    books = Books(chance.choice((3, 9, 30)), chance.choice((1, 4, 16)))
    stems = [[chance.randrange(4) for _ in range(60)] for _ in range(3)]
    for _ in range(400):
        deed = chance.random()
        if deed < 0.3 or not books.running:
            stem = chance.choice(stems)[: chance.randrange(1, 60)]
            ids = stem + [chance.randrange(4) for _ in range(chance.randrange(0, 9))]
            books.admit(chance.choice("ab"), ids, chance.randrange(3))
        else:
            index = chance.randrange(len(books.running))
            if deed < 0.7:
                if not books.compute(index, chance.randrange(1, 20), chance.randrange(4)):
                    books.leave(chance.randrange(len(books.running)))
            elif deed < 0.85:
                books.share(index)
            else:
                books.leave(index)
        books.check()
    while books.running:
        books.leave(0)
        books.check()
    assert books.pool.available == books.count


def test_a_prompt_that_fits_the_empty_pool_is_always_admitted() -> None:
    """Even where the page that it might copy from is the one that it needs."""
    books = Books(2, 16)
    books.admit("a", list(range(20)))
    books.compute(0, 25, 99)
    books.leave(0)
    assert books.pool.kept == 2
    assert books.admit("a", [*range(12), *range(50, 69)])
    assert books.running[0][1].reused == 0


def test_what_was_used_least_recently_goes_first() -> None:
    """Of three kept pages the first is read again: the second goes, though it is younger."""
    books = Books(4, 16)
    stems = [list(range(start, start + 10)) for start in (0, 100, 200)]
    for stem in stems:
        books.admit("a", stem)
        books.compute(0, 10, 0)
        books.leave(0)
    books.admit("a", [*stems[0], 9])
    assert books.running[0][1].reused == 10
    assert [node.tokens[0] for node in books.pool._kept] == [100, 200, 0]
    books.admit("a", [7, 7])
    assert [node.tokens[0] for node in books.pool._kept] == [200, 0]


def test_the_longest_beginning_in_common_is_copied() -> None:
    books = Books(20, 32)
    for tail in ([5], [6, 7, 8], [9]):
        books.admit("a", [*range(LEAST), *tail, 99])
        books.compute(0, LEAST + len(tail) + 1, 0)
        books.leave(0)
    books.admit("a", [*range(LEAST), 6, 7, 1, 1])
    assert books.running[0][1].reused == LEAST + 2
    books.admit("a", [*range(LEAST - 1), 99, 99])
    assert books.running[1][1].reused == 0
    books.admit("b", [*range(LEAST), 6, 7, 1, 1])
    assert books.running[2][1].reused == 0
