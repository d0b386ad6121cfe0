"""Every error the service raises on purpose, one small tree; each branch has one handler."""

from enum import IntEnum


class ChurnError(Exception):
    """Root of the tree. The message says what failed, where, and what to try."""


class BadInput(ChurnError):
    """Data a person handed us is invalid (exit code 4)."""


class BadUsage(BadInput):
    """The command line or a setting is wrong (exit code 2)."""


class DependencyUnreachable(ChurnError):
    """Kafka or Redis did not answer in time (exit code 3)."""


class StoreUnavailable(DependencyUnreachable):
    """The state store did not answer; the worker retries within a bound, then exits."""


class Fenced(ChurnError):
    """Another worker has claimed the partition: drop its buffers, never write again under this nonce."""


class ChainBroken(ChurnError):
    """Stored offsets are not the ones this batch follows: the store went back, or another writer was there."""


class StoreWentBack(ChainBroken):
    """The store holds older offsets than this batch follows: it lost its tail or everything (failover, restored backup, FLUSHALL)."""


class StateDamaged(ChainBroken):
    """Stored bytes of a customer do not decode, or a part of them is missing: the partition has to be rebuilt."""


class ArtifactRejected(ChurnError):
    """A model artifact failed a gate; the model in service stays."""


class MemoryOutgrown(ChurnError):
    """The worker has grown beyond its limit and stopped in order: its supervisor starts it afresh."""


class InvariantBroken(ChurnError):
    """Something that cannot happen happened: the worker stops and its supervisor restarts it."""


class Reason(IntEnum):
    """Why a record became a dead letter. The lower-case name is the reason code on the wire; 0 = accepted."""

    ACCEPTED = 0
    TOO_LARGE = 1  # value over 1 MB
    EMPTY = 2  # no value (a tombstone), or zero bytes
    NOT_UTF8 = 3
    NOT_JSON = 4
    NESTING = 5  # nested deeper than the parser follows
    WRONG_TYPE = 6  # a field has another type, or a value outside its range or vocabulary
    MISSING_FIELD = 7
    NOT_FINITE = 8  # NaN or infinity where a number belongs
    BEFORE_2000 = 9
    FUTURE = 10  # beyond the broker's append time plus the allowance
    KEY_MISMATCH = 11  # record key is not the customer_id
    AMOUNT_RANGE = 12  # |amount| above 10^15 minor units, or the customer's sum above 2^62
    TOO_LATE = 13  # at or before the customer's newest event time - 90 d
    CRASH = 14  # workers ended whenever they handled it
