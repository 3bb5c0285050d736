"""Which page of the cache holds what: taking, sharing, keeping and giving back. Numbers only, no tensors.

A page that is whole is shared by all sequences that begin with the same tokens, and so is, once its sequence has
ended, a last page that is not: they are kept as a tree of token tuples until their room is needed, the least recently
used first. A page that a sequence still writes to is its own.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

LEAST = 8  # tokens in common for which a page is worth copying


@dataclass(eq=False)
class Node:
    """A shared page: its tokens, behind those of all its ancestors. users: the running sequences that read it."""

    page: int
    tokens: tuple[int, ...]
    parent: Node | None
    users: int = 0
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)


@dataclass
class Chain:
    """The pages of one running sequence, in order: shared ones, then its own.

    reused: the tokens that are there already. copied: (source, target) pages to be copied before anything else.
    """

    root: Node
    shared: list[Node]
    own: list[int]
    reused: int = 0
    copied: tuple[int, int] | None = None

    @property
    def pages(self) -> list[int]:
        return [node.page for node in self.shared] + self.own


class PagePool:
    """Pages 1, …, count, each of `size` tokens."""

    def __init__(self, count: int, size: int):
        self.count, self.size = count, size
        self._free = list(range(1, count + 1))  # a heap: low numbers first, so that memory is touched late
        self._kept: OrderedDict[Node, None] = OrderedDict()  # nobody's, the next to go first
        self._roots: dict[Hashable, Node] = {}

    @property
    def available(self) -> int:
        """Pages that can be had now."""
        return len(self._free) + len(self._kept)

    @property
    def kept(self) -> int:
        """Pages of sequences that have ended."""
        return len(self._kept)

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.size)

    def open(self, key: Hashable, ids: Sequence[int], spare: int = 0) -> Chain | None:
        """Pages for `ids` and the token after them, as many as possible shared; None where they are not to be had
        with `spare` pages left over. Sequences of different `key` share nothing. The last of `ids` is never reused:
        its scores are wanted."""
        root = self._roots.setdefault(key, Node(0, (), None))
        shared: list[Node] = []
        node, limit = root, len(ids) - 1
        for at in range(0, limit - self.size + 1, self.size):
            child = node.children.get(tuple(ids[at : at + self.size]))
            if child is None:
                break
            shared.append(child)
            node = child
        reused = len(shared) * self.size
        twin, common = self._closest(node, ids[reused:limit])
        need = self.pages_for(len(ids) + 1) - len(shared)
        self._hold(shared)
        if need + spare > self.available:
            self._drop(shared)
            return None
        if twin is not None:
            self._hold([twin])
            if need + spare > self.available:  # its own room is needed
                self._drop([twin])
                twin, common = None, 0
        chain = Chain(root, shared, [self._take() for _ in range(need)], reused + common)
        if twin is not None:
            chain.copied = (twin.page, chain.own[0])
            self._drop([twin])
        return chain

    def grow(self, chain: Chain) -> bool:
        """One page more; False where there is none."""
        if not self.available:
            return False
        chain.own.append(self._take())
        return True

    def share(self, chain: Chain, ids: Sequence[int]) -> None:
        """Lets others read the chain's whole pages, which hold `ids` and are not written any more."""
        while len(ids) >= (len(chain.shared) + 1) * self.size:
            at = len(chain.shared) * self.size
            parent = chain.shared[-1] if chain.shared else chain.root
            tokens = tuple(ids[at : at + self.size])
            if tokens in parent.children:  # computed twice at the same time: ours stays ours
                return
            node = Node(chain.own.pop(0), tokens, parent, users=1)
            parent.children[tokens] = node
            chain.shared.append(node)

    def close(self, chain: Chain, ids: Sequence[int]) -> None:
        """Gives all pages back; those that hold `ids` are kept while nobody needs their room."""
        path = list(chain.shared)
        node = path[-1] if path else chain.root
        own = list(reversed(chain.own))
        for at in range(len(path) * self.size, len(ids), self.size):
            tokens = tuple(ids[at : at + self.size])
            page = own.pop()
            child = node.children.get(tokens)
            if child is None:
                child = node.children[tokens] = Node(page, tokens, node)
                self._kept[child] = None
            else:
                heapq.heappush(self._free, page)
            path.append(child)
            node = child
        for page in own:
            heapq.heappush(self._free, page)
        chain.own = []
        self._drop(chain.shared)
        chain.shared = []
        for node in reversed(path):  # a parent outlives its children
            if not node.users:
                self._kept.move_to_end(node)

    def _closest(self, node: Node, ids: Sequence[int]) -> tuple[Node | None, int]:
        """The child with the longest beginning in common with `ids`, and its length; None where it is too short."""
        best, most = None, LEAST - 1
        for tokens, child in node.children.items():
            common = 0
            for one, other in zip(tokens, ids, strict=False):
                if one != other:
                    break
                common += 1
            if common > most:
                best, most = child, common
        return best, most if best else 0

    def _hold(self, nodes: Sequence[Node]) -> None:
        for node in nodes:
            node.users += 1
            self._kept.pop(node, None)

    def _drop(self, nodes: Sequence[Node]) -> None:
        for node in reversed(nodes):
            node.users -= 1
            if not node.users:
                self._kept[node] = None

    def _take(self) -> int:
        if self._free:
            return heapq.heappop(self._free)
        node, _ = self._kept.popitem(last=False)
        assert node.parent is not None and not node.children
        del node.parent.children[node.tokens]
        return node.page
