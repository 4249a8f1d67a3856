"""The prefix tree: its books always agree, it gives back what was put in, and it drops what was not
met for longest."""

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from mor_jax.inference.engine.prefix import PrefixTree


@dataclass
class Saved:
    of: tuple
    nbytes: int


def put(tree, chunks, size=10, key=0):
    """As one request does: claim what is missing, fill it, let go."""
    path, _, _ = tree.match(key, chunks)
    claimed = tree.claim(key, path, chunks[len(path) :])
    for i, node in enumerate(claimed):
        tree.fill(node, Saved((key, *chunks[: len(path) + i + 1]), size), [1] * len(node.chunk))
    tree.let_go([*path, *claimed])
    tree.check()


def found(tree, chunks, key=0):
    return len(tree.match(key, chunks)[0])


A, B, C, D = (1, 2), (3,), (4, 5, 6), (7,)


def test_leaves_go_first_and_the_one_not_met_for_longest():
    tree = PrefixTree(40)
    put(tree, [A, B])
    put(tree, [A, C])
    put(tree, [D])
    assert [found(tree, p) for p in ([A, B], [A, C], [D])] == [2, 2, 1]
    put(tree, [A, B])  # met again, so that the leaf C is the oldest
    put(tree, [C])
    assert [found(tree, p) for p in ([A, B], [A, C], [D], [C])] == [2, 1, 1, 1]
    put(tree, [B, A])
    assert [found(tree, p) for p in ([A, B], [D], [C], [B, A])] == [1, 0, 1, 2]


def test_what_is_held_stays_and_what_does_not_fit_is_not_kept():
    tree = PrefixTree(20)
    put(tree, [A, B])
    path, _, _ = tree.match(0, [A, B])
    tree.claim(0, path, [])
    put(tree, [C])
    assert found(tree, [C]) == 0 and found(tree, [A, B]) == 2
    assert (tree.available, tree.evictable, tree.protected) == (0, 0, 20)
    tree.let_go(path)
    put(tree, [C])
    assert found(tree, [C]) == 1 and found(tree, [A, B]) == 1
    put(tree, [D], size=21)
    assert found(tree, [D]) == 0


def test_claims_are_seen_and_end_with_their_owner():
    tree = PrefixTree(100)
    claimed = tree.claim(0, [], [A, B, C])
    assert tree.match(0, [A, B, D]) == ([], claimed[0], 3)
    assert tree.match(1, [A, B, D]) == ([], None, 0), "other depths, other rows"
    assert tree.claim(0, [], [A, D]) == [], "what somebody computes is not claimed again"
    tree.fill(claimed[0], Saved(A, 10), [1, 2])
    assert tree.match(0, [A, B, D]) == ([claimed[0]], claimed[1], 1)
    tree.let_go(claimed)
    tree.check()
    assert tree.match(0, [A, B, D]) == ([claimed[0]], None, 0) and claimed[0].depths == (1, 2)


def test_nothing_is_kept_without_room():
    tree = PrefixTree(0)
    assert tree.claim(0, [], [A, B]) == [] and tree.match(0, [A, B]) == ([], None, 0)


def test_clearing_forgets_everything():
    tree = PrefixTree(100)
    put(tree, [A, B])
    tree.clear()
    tree.check()
    assert found(tree, [A]) == 0 and tree.available == 100


chunks = st.lists(st.sampled_from([A, B, C, D]), max_size=4)


class Users(RuleBasedStateMachine):
    """Requests that hold and compute parts of paths at the same time, in any order, some giving
    up."""

    @initialize(total=st.sampled_from([0, 15, 50, 1000]))
    def begin(self, total):
        self.tree, self.users = PrefixTree(total), []

    @rule(path=chunks, key=st.integers(0, 1))
    def come(self, path, key):
        filled, pending, _ = self.tree.match(key, path)
        for i, node in enumerate(filled):
            assert node.rows.of == (key, *path[: i + 1]), "rows of another path"
        if pending is None or len(self.users) % 2:
            claimed = self.tree.claim(key, filled, path[len(filled) :])
            names = [(key, *path[: len(filled) + i + 1]) for i in range(len(claimed))]
            self.users.append(([*filled, *claimed], list(zip(claimed, names, strict=True))))

    @rule(which=st.integers(0, 9), size=st.integers(1, 20))
    def compute(self, which, size):
        if which < len(self.users) and self.users[which][1]:
            node, name = self.users[which][1].pop(0)
            kept = self.tree.fill(node, Saved(name, size), [1] * len(node.chunk))
            assert kept == (not node.gone)

    @rule(which=st.integers(0, 9))
    def leave(self, which):
        if which < len(self.users):
            self.tree.let_go(self.users.pop(which)[0])

    @invariant()
    def books_agree(self):
        if hasattr(self, "tree"):
            self.tree.check()

    def teardown(self):
        for held, _ in getattr(self, "users", []):
            self.tree.let_go(held)
        if hasattr(self, "tree"):
            self.tree.check()
            assert self.tree.protected == 0 and all(n.rows is not None for n in self.tree.nodes())


TestUsers = Users.TestCase
TestUsers.settings = settings(max_examples=150, stateful_step_count=30)


def test_a_wrong_book_is_noticed():
    """The check used above does look."""
    tree = PrefixTree(100)
    put(tree, [A, B])
    tree.evictable -= 1
    with pytest.raises(AssertionError):
        tree.check()
