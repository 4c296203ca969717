"""The assignment of partitions to evaluators: balanced, sticky, and the same everywhere."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from betrace.service.cluster.evaluator.assignment import assign

NAMES = [f"node-{letter}" for letter in "abcdef"]
_members = st.sets(st.sampled_from(NAMES), min_size=1)
_partitions = st.integers(1, 40)


@st.composite
def _situations(draw):
    partitions = draw(_partitions)
    owner = st.none() | st.sampled_from([*NAMES, "gone"])
    found = draw(st.lists(owner, min_size=partitions, max_size=partitions))
    return partitions, {p: name for p, name in enumerate(found) if name is not None}


@given(_situations(), _members)
def test_each_partition_has_an_owner_and_the_load_is_balanced(situation, members):
    partitions, owners = situation
    assigned = assign(range(partitions), members, owners)
    assert sorted(assigned) == list(range(partitions))
    count = Counter(assigned.values())
    loads = [count[name] for name in members]
    assert count.keys() <= members
    assert max(loads) - min(loads) <= 1


@given(_situations(), _members, st.randoms(use_true_random=False))
def test_the_order_of_members_and_owners_does_not_matter(situation, members, random):
    partitions, owners = situation
    shuffled = list(members) * 2
    random.shuffle(shuffled)
    entries = list(owners.items())
    random.shuffle(entries)
    assert assign(range(partitions), shuffled, dict(entries)) == assign(
        range(partitions), members, owners
    )


@given(_situations(), _members)
def test_no_balanced_assignment_moves_fewer_partitions(situation, members):
    partitions, owners = situation
    assigned = assign(range(partitions), members, owners)
    moved = sum(assigned[p] != owners.get(p) for p in range(partitions))
    quotient, more = divmod(partitions, len(members))
    count = Counter(name for name in owners.values() if name in members)
    # Each member keeps at most the quotient, and `more` of them one more.
    kept = sum(min(count[name], quotient) for name in members)
    kept += min(more, sum(count[name] > quotient for name in members))
    assert moved == partitions - kept


@given(_situations(), _members, st.data())
def test_the_result_stays_the_same_while_partitions_move(situation, members, data):
    partitions, owners = situation
    assigned = assign(range(partitions), members, owners)
    moving = [p for p in range(partitions) if assigned[p] != owners.get(p)]
    for partition in data.draw(st.permutations(moving)):
        if owners.pop(partition, None) is not None and data.draw(st.booleans()):
            assert assign(range(partitions), members, owners) == assigned
        owners[partition] = assigned[partition]
        assert assign(range(partitions), members, owners) == assigned


@given(_partitions, _members)
def test_joining_and_leaving_again_moves_only_what_the_newcomer_had(partitions, members):
    before = assign(range(partitions), members, {})
    joined = assign(range(partitions), members | {"node-new"}, before)
    newcomer = {p for p, name in joined.items() if name == "node-new"}
    assert {p for p in joined if joined[p] != before[p]} == newcomer
    after = assign(range(partitions), members, joined)
    assert {p for p in after if after[p] != joined[p]} == newcomer


def test_without_members_nothing_is_assigned():
    assert assign(range(4), [], {0: "node-a"}) == {}
