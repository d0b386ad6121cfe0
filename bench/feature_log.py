"""What the feature log costs: microseconds of CPU per score to make its records, and their size after compression.

    python -m bench.feature_log [--batches 50] [--json]

The vectors are those of the verification's histories (features/cases.py) in batches of 4,000; queueing 0.5 kB more per score is the
producer's, and not in the figure.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
import zstandard

from features.cases import world
from features.facts import KIND, TOPICS
from features.history import Histories
from streams.feature_log import RECORD, feature_records
from streams.merge import Batch
from streams.scores import Scored

SIZE = 4_000


def measure(batches: int) -> dict[str, Any]:
    """The figures as one flat object."""
    w = world(3, 0)
    facts = w.facts[~w.skip][:SIZE]
    names = [w.customers[i] for i in w.owner[~w.skip][:SIZE].tolist()]
    step = Histories(create=True).step(names, facts)
    n, k = len(facts), len(step.rows)
    former = {name: int(facts[facts[:, KIND] >> 3 == i, 1].min(initial=0)) - 1 for i, name in enumerate(TOPICS)}
    batch = Batch(
        0, "", former, former, facts, facts[:, KIND] >> 3, np.zeros(n, np.int64), np.zeros(n, np.uint8), names, [""] * n, {}, [None] * n
    )
    zeros = np.zeros(k, np.uint8)
    customers = [names[i] for i in step.rows.tolist()]
    at, late = step.at[step.rows], step.late[step.rows]
    none, nowhere = zeros.astype(np.int8), zeros.astype(np.int64)
    scored = Scored(step.rows, customers, at, late, step.vectors, zeros.astype(np.float32), zeros, zeros, zeros, none, nowhere, [])
    records = feature_records(batch, scored)
    seconds = []
    for _ in range(batches):
        began = time.process_time()
        feature_records(batch, scored)
        seconds.append(time.process_time() - began)
    packed = len(zstandard.ZstdCompressor(1).compress(b"".join(record["value"] for record in records)))
    return {
        "scores": k,
        "microseconds_per_score": round(float(np.median(seconds)) / k * 1e6, 3),
        "bytes": RECORD.itemsize,
        "bytes_compressed": round(packed / k, 1),
    }


def main() -> None:
    """Run from the command line; the figures as one JSON object on the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=50)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line (always so)")
    print(json.dumps(measure(parser.parse_args().batches)))


if __name__ == "__main__":
    main()
