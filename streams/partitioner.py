"""Which partition a customer's records belong into: murmur2 of the key, as every Java client computes it."""

from __future__ import annotations


def murmur2(key: bytes) -> int:
    """Kafka's hash of a record key, its sign bit cleared.

    >>> [murmur2(key) for key in (b"", b"1", b"foobar")]
    [275646681, 154038159, 1357151166]
    """
    m, mask = 0x5BD1E995, 0xFFFFFFFF
    h = (0x9747B28C ^ len(key)) & mask
    whole = len(key) & ~3
    for i in range(0, whole, 4):
        k = int.from_bytes(key[i : i + 4], "little") * m & mask
        k = (k ^ k >> 24) * m & mask
        h = (h * m & mask) ^ k
    if rest := key[whole:]:
        h = (h ^ int.from_bytes(rest, "little")) * m & mask
    h = (h ^ h >> 13) * m & mask
    return (h ^ h >> 15) & 0x7FFFFFFF


def partition_of(customer: str, partitions: int) -> int:
    """The partition of a customer among `partitions`."""
    return murmur2(customer.encode()) % partitions
