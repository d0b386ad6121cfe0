"""A customer's features at any time: from the stored facts where they suffice, else from the topics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from features.carry import BASE
from features.facts import OFFSET, TIME, TOPICS
from features.history import Histories, vectors
from features.state import decode
from features.store import CustomerState, Offsets
from streams.codec import Decoder
from streams.log import Log
from streams.merge import merge_keys, order
from streams.refusal import Code, Refusal

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


@dataclass(slots=True)
class PastFacts:
    """Reads what a customer was, then. inputs: full names of the input topics by index. One thread at a time."""

    log: Log
    inputs: Sequence[str]
    decoder: Decoder

    def vector(self, customer: str, partition: int, state: CustomerState | None, at_ms: int, cut: Offsets | None) -> tuple[FloatArray, str]:
        """(vector (N_FEATURES,), where its facts were read). cut None: of all that is known today, without what happened after at_ms.

        Stored facts suffice while none has left for the totals. Raises Refusal OUT_OF_RANGE when records the answer needs were
        deleted by retention, or facts of the cut happened after at_ms.
        """
        if state is None:
            return vectors(np.empty((0, 10), np.int64), None, at_ms), "state"
        known = decode(state, customer)
        if known.carry[BASE] == 0:
            return vectors(_then(known.facts, at_ms), None, at_ms, cut), "state"
        return self._from_topics(customer, partition, at_ms, cut), "topics"

    def _from_topics(self, customer: str, partition: int, at_ms: int, cut: Offsets | None) -> FloatArray:
        key = customer.encode("utf-8", "surrogatepass")
        pieces: list[tuple[int, IntArray]] = []
        for index, topic in enumerate(self.inputs):
            low, high = self.log.ends(topic, partition)
            stop = high if cut is None else min(high, cut.get(TOPICS[index], -1) + 1)
            if low > 0 and stop > 0:
                raise Refusal(
                    Code.OUT_OF_RANGE,
                    "DELETED",
                    f"{topic}[{partition}] begins at offset {low}: older records are deleted, and facts of then left the state",
                )
            mine = [message for piece in self.log.read(topic, partition, low, stop) for message in piece if message.key() == key]
            if mine:
                records = self.decoder.decode(index, partition, mine)
                pieces.append((index, _then(records.facts[records.reason == 0], at_ms)))
        histories = Histories()
        histories.load([customer], [None])
        if pieces:
            facts = np.concatenate([rows for _, rows in pieces])
            topics = np.concatenate([np.full(len(rows), index, np.int64) for index, rows in pieces])
            # As the stream met them; a fact known only later stands at its place in time when no cut is asked.
            keys = np.concatenate([merge_keys(rows[:, TIME], np.ones(len(rows), np.bool_)) if cut else rows[:, TIME] for _, rows in pieces])
            facts = facts[order(keys, topics, facts[:, OFFSET])]
            histories.step([customer] * len(facts), facts)
        found: FloatArray = histories.vectors_at([customer], at_ms)[0]
        return found


def _then(facts: IntArray, at_ms: int) -> IntArray:
    rows: IntArray = facts[facts[:, TIME] <= at_ms]
    return rows
