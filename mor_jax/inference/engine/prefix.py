"""The prefix cache: a tree of prompt chunks, each with the keys and values that a lane would
compute again.

An edge is one chunk of a prompt, whole: `Device.cut` cuts prompts by their length alone, so two
prompts on one path ran the same programs on the same tokens, and rows taken from the tree are those
that the lane would have computed, bit for bit. Rows also depend on how deep tokens may think, so
there is one root for each depth wish.

A node is *claimed* by the request that is about to compute it, and *filled* when it has. Others
that meet a claimed node may wait for it instead of computing the same. Nodes that some request
holds are protected; of the others, leaves are dropped, least recently used first, when a new one
needs their bytes. At any time

    available + evictable + protected == total     (bytes)
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

Tokens = tuple[int, ...]


class Node:
    """One chunk behind its parent's. `rows` None: claimed, not computed yet."""

    __slots__ = ("children", "chunk", "depths", "gone", "holds", "parent", "queued", "rows", "used")

    def __init__(self, chunk: Tokens, parent: Node | None):
        self.chunk, self.parent = chunk, parent
        self.children: dict[Tokens, Node] = {}
        self.rows: Any = None
        self.depths: Tokens = ()  # recursions of each of its tokens
        self.holds = 0  # requests that hold it or a node below it
        self.used = 0  # when it was met last
        self.gone = False  # no longer in the tree
        self.queued = False  # among the leaves that may be dropped

    @property
    def pending(self) -> bool:
        """Whether a request is computing it."""
        return self.rows is None and not self.gone

    @property
    def nbytes(self) -> int:
        return 0 if self.rows is None else self.rows.nbytes


class PrefixTree:
    """Args: total: bytes of rows it may keep; 0 keeps nothing and nobody waits for anybody."""

    def __init__(self, total: int):
        self.total = total
        self.evictable = self.protected = 0
        self._in_use = 0
        self._roots: dict[Hashable, Node] = {}
        self._clock = itertools.count(1)
        # a heap of (used, tie, node); entries may be out of date
        self._leaves: list[tuple[int, int, Node]] = []
        self._ties = itertools.count()

    @property
    def available(self) -> int:
        return self.total - self._in_use

    def match(self, key: Hashable, chunks: Sequence[Tokens]) -> tuple[list[Node], Node | None, int]:
        """(filled nodes from the root on, the claimed node after them if there is one, tokens of
        the claimed nodes in a row from there). `key`: what the rows depend on beside the tokens."""
        node, filled = self._roots.get(key), []
        first, pending = None, 0
        for chunk in chunks:
            node = node and node.children.get(chunk)
            if node is None:
                break
            if node.rows is None:
                first = first or node
                pending += len(chunk)
            else:
                filled.append(node)
        return filled, first, pending

    def claim(self, key: Hashable, path: Sequence[Node], chunks: Sequence[Tokens]) -> list[Node]:
        """Hold `path` and claim the chunks behind it, which must not be in the tree; [] where they
        cannot be kept. `let_go` of `path + claimed` later."""
        claimed: list[Node] = []
        if self.total > 0:
            node = path[-1] if path else self._roots.setdefault(key, Node((), None))
            if not (chunks and chunks[0] in node.children):
                for chunk in chunks:
                    node.children[chunk] = node = Node(chunk, node)
                    claimed.append(node)
        now = next(self._clock)
        for node in (*path, *claimed):
            node.used = now
            self._hold(node)
        return claimed

    def _hold(self, node: Node) -> None:
        node.holds += 1
        if node.holds == 1:
            self.evictable -= node.nbytes
            self.protected += node.nbytes

    def let_go(self, nodes: Sequence[Node]) -> None:
        """Undo `claim`; what was claimed and not filled leaves the tree."""
        for node in reversed(nodes):
            node.holds -= 1
            if node.pending:
                self._detach(node)
            elif node.holds == 0 and not node.gone:
                self.protected -= node.nbytes
                self.evictable += node.nbytes
                self._maybe_leaf(node)

    def fill(self, node: Node, rows: Any, depths: Sequence[int]) -> bool:
        """The claimed node was computed. False: it was given up, or its bytes are not to be had; it
        then leaves the tree, with the claims below it."""
        if node.gone:
            return False
        while rows.nbytes > self.available and self._evict_one():
            pass
        if rows.nbytes > self.available:
            for one in list(_below(node)):
                one.gone = True
            self._detach(node)
            return False
        node.rows, node.depths = rows, tuple(int(d) for d in depths)
        self._in_use += node.nbytes
        self.protected += node.nbytes  # whoever fills it holds it
        return True

    def clear(self) -> None:
        """Removes all nodes, for example after the weights changed. No request may hold a node."""
        self._roots.clear()
        self._leaves.clear()
        self.evictable = self._in_use = 0

    def _detach(self, node: Node) -> None:
        node.gone = True
        parent = node.parent
        assert parent is not None, "roots stay"
        if parent.children.get(node.chunk) is node:
            del parent.children[node.chunk]
        self._maybe_leaf(parent)

    def _maybe_leaf(self, node: Node) -> None:
        loose = (
            node.parent is not None
            and not node.children
            and not node.holds
            and node.rows is not None
        )
        if loose and not node.queued:
            node.queued = True
            heapq.heappush(self._leaves, (node.used, next(self._ties), node))

    def _evict_one(self) -> bool:
        while self._leaves:
            used, _, node = heapq.heappop(self._leaves)
            node.queued = False
            if node.gone or node.children or node.holds:
                continue
            if node.used != used:  # met again since
                self._maybe_leaf(node)
                continue
            self._in_use -= node.nbytes
            self.evictable -= node.nbytes
            self._detach(node)
            node.rows = None
            return True
        return False

    def nodes(self) -> Iterator[Node]:
        """All nodes, the roots left out."""
        for root in self._roots.values():
            yield from itertools.islice(_below(root), 1, None)

    def check(self) -> None:
        """Raise AssertionError unless the books agree with the tree; for tests."""
        nodes = list(self.nodes())
        held = sum(n.nbytes for n in nodes if n.holds)
        loose = sum(n.nbytes for n in nodes if not n.holds)
        assert (held, loose) == (self.protected, self.evictable), "bytes of held and of loose nodes"
        assert self.available + self.evictable + self.protected == self.total, (
            "the parts make up the whole"
        )
        assert 0 <= self.available <= self.total, "no more is kept than may be"
        for n in nodes:
            assert not n.gone and n.holds >= max((c.holds for c in n.children.values()), default=0)
            assert n.rows is not None or n.holds, "a claim without an owner"
            parent = n.parent
            assert parent is not None, "no root"
            assert n.rows is None or parent.parent is None or parent.rows is not None, (
                "rows behind a gap"
            )


def _below(node: Node) -> Iterator[Node]:
    """The node and all behind it; no recursion, a path may be long."""
    stack = [node]
    while stack:
        node = stack.pop()
        yield node
        stack.extend(node.children.values())
