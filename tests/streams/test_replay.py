"""Another model on the past: equal where nothing was changed, different only where the change can reach."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pyarrow.parquet as pq
import pytest

from features.catalog import NAMES
from features.facts import TOPICS
from proto.scores import BANDS
from scoring.fallback import Fallback
from streams.evaluate import Rules
from streams.feature_log import export
from streams.replay import Files, Replayed, rebanded, replay
from streams.rerun import EVER, Base, Rerun, Span
from streams.scores import vector_hashes
from tests.streams.test_rebuild import PARTITION, Broker, Shelf, decoder, scores
from tests.streams.test_skew import NAMED, NOWHERE, inputs, live, models

RULES = Rules(Fallback(0.5), 0, 0.02)


@pytest.fixture(scope="module")
def past() -> tuple[Broker, Shelf]:
    """What a worker left that knew one model only."""
    known = models()
    first = next(iter(known))
    random = Random(6)
    return live(random, Shelf({first: known[first]}, first), inputs(random)), Shelf(known, first)


def again(broker: Broker, *, span: Span = Span(), base: Base = NOWHERE, recorded: bool = True) -> Rerun:
    return Rerun(broker, NAMED, decoder(), PARTITION, span, base, {name: broker.ends(name, 0)[1] - 1 for name in TOPICS}, recorded)


def test_the_model_of_that_time_says_what_it_said(past: tuple[Broker, Shelf]) -> None:
    broker, shelf = past
    before = {topic: list(records) for topic, records in broker.topics.items()}
    found = replay(again(broker), shelf.current(), RULES)
    assert found.rows == found.compared == found.equal == len(scores(broker)) > 50
    assert not found.report()["flips"]
    assert found.largest_move == 0
    assert replay(again(broker), shelf.current(), RULES).digest == found.digest
    assert broker.topics == before


def test_another_model_differs_and_the_report_counts_what_the_files_hold(past: tuple[Broker, Shelf], tmp_path: Path) -> None:
    broker, shelf = past
    other = shelf.by_digest(next(digest for digest in shelf.known if digest != shelf.now))
    files = Files(tmp_path, PARTITION, other)
    found = replay(again(broker), other, RULES, files)
    files.close()
    rows = pq.read_table(tmp_path / "scores-0.parquet").to_pylist()
    emitted = {score["score_id"]: score for score in scores(broker)}
    assert [row["score_id"] for row in rows] == list(emitted)
    assert all(row["then_probability"] == emitted[row["score_id"]]["probability"] for row in rows)
    assert all(row["then_band"] == emitted[row["score_id"]]["band"] for row in rows)
    flipped = [row for row in rows if row["band"] != row["then_band"]]
    report = found.report()
    assert report["flips"] == len(flipped) > 0
    assert report["customers_flipped"] == len({row["customer_id"] for row in flipped})
    assert sum(segment["flips"] for segment in report["segments"].values()) == len(flipped)
    assert found.digest != replay(again(broker), shelf.current(), RULES).digest
    assert found.equal < found.compared


def test_other_thresholds_move_bands_only_between_the_edges_and_no_probability() -> None:
    random, known = Random(11), models()
    first = next(iter(known))
    shelf = Shelf(known, first)
    broker = live(random, shelf, inputs(random))
    unchanged = replay(again(broker), shelf.by_digest, RULES)  # the models as they happened, reloads and all
    assert unchanged.equal == unchanged.rows == unchanged.compared == len(scores(broker))
    assert len({score["model_digest"] for score in scores(broker)}) == 2
    edges = (0.45, 0.55)
    found = replay(again(broker), lambda digest: rebanded(shelf.by_digest(digest), edges), RULES)
    emitted = scores(broker)
    between = [score for score in emitted if BANDS[1 + sum(score["probability"] >= edge for edge in edges)] != score["band"]]
    report = found.report()
    assert report["flips"] == len(between) > 0
    assert report["probabilities_moved"] == 0
    assert found.flipped == Counter(score["customer_id"] for score in between)


def test_a_change_reaches_nothing_outside_the_span(past: tuple[Broker, Shelf]) -> None:
    broker, shelf = past
    emitted = scores(broker)
    middle = max(score["event_time"] for score in emitted[: len(emitted) // 2]) + 1
    parts = [replay(again(broker, span=span), shelf.current(), RULES) for span in (Span(to_ms=middle), Span(from_ms=middle))]
    assert sum(part.rows for part in parts) == len(emitted)
    assert all(part.equal == part.compared == part.rows > 0 for part in parts)


def test_without_a_look_at_the_outputs_every_event_is_scored_in_the_order_of_the_merge(past: tuple[Broker, Shelf]) -> None:
    broker, shelf = past
    found = replay(again(broker, recorded=False), shelf.current(), RULES)
    assert found.handled == sum(len(broker.of(topic)) for topic in TOPICS)
    assert not found.compared
    assert abs(found.rows - len(scores(broker))) < 10  # what is too late or repeated depends on the order


def test_reports_of_partitions_add_up(past: tuple[Broker, Shelf]) -> None:
    broker, shelf = past
    one = replay(again(broker), shelf.current(), RULES)
    total = Replayed()
    for _ in range(2):
        total.add(replace(one))
    assert total.rows == 2 * one.rows
    assert total.report()["segments"]["none"]["compared"] == 2 * one.report()["segments"]["none"]["compared"]
    assert total.digest != one.digest


def test_the_feature_log_in_parquet_holds_the_vectors_as_they_were_scored(past: tuple[Broker, Shelf], tmp_path: Path) -> None:
    broker, _ = past
    broker.of("churn-features").extend(broker.of("churn-features")[-3:])  # repeated after a crash
    emitted = scores(broker)
    assert export(broker, "churn-features", PARTITION, tmp_path, -EVER, EVER) == len(emitted)
    table = pq.read_table(tmp_path / "part-0.parquet")
    assert table["score_id"].to_pylist() == [score["score_id"] for score in emitted]
    vectors = np.stack([table[name].to_numpy() for name in NAMES], axis=1)
    assert vector_hashes(vectors) == [score["vector_hash"] for score in emitted] == table["vector_hash"].to_pylist()
    assert table["cut_logins"].to_pylist() == [score["cut"]["logins"] for score in emitted]
    assert table.schema.metadata[b"layout_hash"].decode() == emitted[0]["layout_hash"]
    at = sorted(score["at"] for score in emitted)[len(emitted) // 2]
    assert export(broker, "churn-features", PARTITION, tmp_path, at, EVER) == sum(score["at"] >= at for score in emitted)
