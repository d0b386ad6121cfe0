"""Merging the topics of a partition: order, waiting, bounds, and that nothing is lost or doubled."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.facts import NONE, OFFSET, TIME, TOPICS, WIDTH
from proto.errors import ChainBroken, Reason
from streams.codec import Records
from streams.merge import Batch, Merge, Slice, merge_keys, watermark

Row = tuple[int, int, int]
"""offset, event time, customer; a negative customer marks a rejected record."""
EMPTY = dict.fromkeys(TOPICS, -1)


def piece(topic: int, rows: Sequence[Row]) -> Slice:
    n = len(rows)
    facts = np.zeros((n, WIDTH), np.int64)
    facts[:, OFFSET] = [row[0] for row in rows]
    facts[:, TIME] = [row[1] if row[2] >= 0 else NONE for row in rows]
    records = Records(
        topic=topic,
        partition=0,
        offset=facts[:, OFFSET].copy(),
        append_ms=np.zeros(n, np.int64),
        size=np.full(n, 100, np.int64),
        facts=facts,
        customer=[f"c{row[2]}" if row[2] >= 0 else "" for row in rows],
        event_id=[f"{topic}/{row[0]}" for row in rows],
        reason=np.array([0 if row[2] >= 0 else Reason.NOT_JSON for row in rows], np.uint8),
        detail={i: f"bad {row[0]}" for i, row in enumerate(rows) if row[2] < 0},
        raw={},
    )
    return Slice(records, [(topic, row[0]) for row in rows])


def merge_of(topics: Sequence[Sequence[Row]], chunk: int = 1_000) -> Merge:
    """A merge with everything buffered and no more known to exist."""
    merge = Merge(0, "n", dict(EMPTY))
    for topic, rows in enumerate(topics):
        for start in range(0, len(rows), chunk):
            merge.buffers[topic].add(piece(topic, rows[start : start + chunk]))
    return merge


def ids(batches: Sequence[Batch]) -> list[str]:
    return [event_id for batch in batches for event_id in batch.event_id]


def take_all(merge: Merge, max_events: int = 10_000, max_customers: int = 1_000) -> list[Batch]:
    batches = []
    while (batch := merge.take(max_events, max_customers)) is not None:
        batches.append(batch)
    return batches


def naive(topics: Sequence[Sequence[Row]]) -> list[str]:
    """Event by event: always the topic whose next record has the smallest (running maximum, topic)."""
    heap: list[tuple[int, int, int]] = []
    highest = [-1] * len(topics)

    def push(topic: int, position: int) -> None:
        if position < len(topics[topic]):
            _, time, customer = topics[topic][position]
            if customer >= 0:
                highest[topic] = max(highest[topic], time)
            heapq.heappush(heap, (highest[topic], topic, position))

    for topic in range(len(topics)):
        push(topic, 0)
    merged = []
    while heap:
        _, topic, position = heapq.heappop(heap)
        merged.append(f"{topic}/{topics[topic][position][0]}")
        push(topic, position + 1)
    return merged


@st.composite
def histories(draw: st.DrawFn) -> list[list[Row]]:
    topics: list[list[Row]] = []
    for _ in TOPICS:
        steps = draw(st.lists(st.tuples(st.integers(1, 3), st.integers(-5, 20), st.integers(-1, 6)), max_size=12))
        offset, time, rows = -1, 1_000, []
        for gap, ahead, customer in steps:
            offset, time = offset + gap, time + ahead
            rows.append((offset, time, customer))
        topics.append(rows)
    return topics


@given(histories())
def test_one_batch_of_everything_is_the_merge_event_by_event(topics: list[list[Row]]) -> None:
    assert ids(take_all(merge_of(topics))) == naive(topics)


@given(histories(), st.integers(1, 7), st.integers(1, 4), st.integers(1, 5))
def test_batches_of_any_size_are_the_one_merge_cut_in_pieces(
    topics: list[list[Row]], max_events: int, max_customers: int, chunk: int
) -> None:
    batches = take_all(merge_of(topics, chunk), max_events, max_customers)
    assert ids(batches) == naive(topics)
    for topic, rows in enumerate(topics):
        offsets = [int(o) for batch in batches for o in batch.offset[batch.topic == topic]]
        assert offsets == [row[0] for row in rows]
    former = dict(EMPTY)
    for batch in batches:
        assert dict(batch.former) == former
        former = dict(batch.to)
        assert len(batch) <= max_events
        assert len({c for c, r in zip(batch.customer, batch.reason, strict=True) if r == 0}) <= max_customers
        assert all(event == f"{t}/{o}" for event, t, o in zip(batch.event_id, batch.topic, batch.offset, strict=True))
        assert batch.messages == [(t, o) for t, o in zip(batch.topic.tolist(), batch.offset.tolist(), strict=True)]
        assert batch.detail == {i: f"bad {o}" for i, (o, r) in enumerate(zip(batch.offset.tolist(), batch.reason, strict=True)) if r}


@given(histories(), st.integers(1, 7), st.integers(1, 5), st.integers(1, 5))
def test_the_order_of_a_batch_depends_on_its_records_and_the_watermark_alone(
    topics: list[list[Row]], max_events: int, chunk: int, other: int
) -> None:
    """What a crash leaves behind is the offsets of a batch: read again, in other pieces, it must come out the same."""
    batches = take_all(merge_of(topics, chunk), max_events)
    newest = -1
    for batch in batches:
        again = merge_of([[row for row in rows if row[0] > batch.former[TOPICS[t]]] for t, rows in enumerate(topics)], other)
        again.applied, again.watermark_ms, again.forced = dict(batch.former), newest, batch.to
        newest = watermark(newest, batch.facts, batch.reason)
        for buffer in again.buffers:
            buffer.reach(batch.former[TOPICS[buffer.topic]] + 1)
        repeat = again.take(max_events)
        assert repeat is not None
        assert repeat.recovered
        assert repeat.event_id == batch.event_id
        assert dict(repeat.to) == dict(batch.to)
        assert repeat.cuts().tolist() == batch.cuts().tolist()
        assert (again.take(10_000) is None) == (batch is batches[-1])


@given(histories(), st.data())
def test_however_records_arrive_none_overtakes_an_earlier_one(topics: list[list[Row]], data: st.DataObject) -> None:
    """Ends known, taken one by one as soon as they may go: any arrival gives the one merge."""
    merge = Merge(0, "n", dict(EMPTY))
    for topic, rows in enumerate(topics):
        merge.buffers[topic].end = rows[-1][0] + 1 if rows else 0
    waiting = {topic: rows for topic, rows in enumerate(topics) if rows}
    got: list[str] = []
    while waiting:
        topic = data.draw(st.sampled_from(sorted(waiting)))
        count = data.draw(st.integers(1, 3))
        merge.buffers[topic].add(piece(topic, waiting[topic][:count]))
        waiting[topic] = waiting[topic][count:]
        if not waiting[topic]:
            del waiting[topic]
        got += ids(take_all(merge, max_events=1))
    assert got == naive(topics)


def test_a_topic_with_more_to_come_holds_the_others_back() -> None:
    merge = merge_of([[(0, 10, 1), (1, 30, 1)], [(0, 20, 1)], [], []])
    merge.buffers[1].end = 5  # more logins exist than we have seen
    first = merge.take(100)
    assert first is not None
    assert first.event_id == ["0/0", "1/0"]
    assert merge.take(100) is None  # the payment at 30 waits for the next login
    assert not merge.caught_up
    merge.buffers[1].add(piece(1, [(1, 25, 1), (4, 40, 1)]))
    rest = merge.take(100)
    assert rest is not None
    assert rest.event_id == ["1/1", "0/1", "1/4"]
    assert merge.caught_up


def test_offsets_without_records_at_the_end_do_not_hold_anything_back() -> None:
    merge = merge_of([[(0, 10, 1)], [], [], []])
    merge.buffers[1].reach(0, 3)
    assert merge.take(100) is None
    merge.buffers[1].reach(3)  # the broker says: end of partition at 3, nothing was there
    batch = merge.take(100)
    assert batch is not None
    assert batch.event_id == ["0/0"]


def test_a_late_record_does_not_jump_the_queue_and_a_rejected_one_does_not_move_time() -> None:
    late = np.array([10, 50, 20, 99, 60], np.int64)
    accepted = np.array([True, True, True, False, True])
    assert merge_keys(late, accepted).tolist() == [10, 50, 50, 50, 60]
    assert merge_keys(late, ~accepted).tolist() == [-1, -1, -1, 99, 99]
    assert merge_keys(late, accepted, 55).tolist() == [55, 55, 55, 55, 60]


def test_the_cut_of_a_record_names_what_was_handled_before_it() -> None:
    merge = merge_of([[(7, 10, 1), (9, 30, 2)], [(3, 20, 1)], [], []])
    merge.applied = {**EMPTY, TOPICS[0]: 6, TOPICS[3]: 4}
    batch = merge.take(100)
    assert batch is not None
    assert batch.cuts().tolist() == [[7, -1, -1, 4], [7, 3, -1, 4], [9, 3, -1, 4]]


def test_an_open_batch_waits_for_all_its_records_and_says_when_they_are_gone() -> None:
    merge = Merge(0, "n", dict(EMPTY), forced={**EMPTY, TOPICS[0]: 1, TOPICS[1]: 0})
    merge.buffers[0].add(piece(0, [(0, 10, 1), (1, 30, 1), (2, 31, 1)]))
    assert merge.take(1) is None
    merge.buffers[1].add(piece(1, [(0, 20, 1)]))
    batch = merge.take(1)  # exactly the intended records, whatever the bound of events is now
    assert batch is not None
    assert batch.recovered
    assert batch.event_id == ["0/0", "1/0", "0/1"]
    gone = Merge(0, "n", dict(EMPTY), forced={**EMPTY, TOPICS[0]: 1})
    gone.buffers[0].reach(5)
    with pytest.raises(ChainBroken):
        gone.take(10)


def test_bytes_are_counted_until_taken() -> None:
    merge = merge_of([[(i, 10 + i, i) for i in range(10)], [], [], []], chunk=3)
    assert (merge.buffers[0].bytes, merge.buffers[0].count) == (1_000, 10)
    assert merge.take(4) is not None
    assert (merge.buffers[0].bytes, merge.buffers[0].count) == (600, 6)
    take_all(merge)
    assert (merge.buffers[0].bytes, merge.buffers[0].count) == (0, 0)
