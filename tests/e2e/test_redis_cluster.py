"""Worker processes whose state lies on a Redis Cluster that loses a primary in mid-stream, and on a server that fills up."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from pydantic import SecretStr

from streams.settings import Settings
from tests.conftest import Completed
from tests.contracts.redis_servers import RedisCluster, RedisServer, running
from tests.e2e.test_worker import SHARED_DATA, Deployment, beside, first_wins, open_deployment

pytestmark = [pytest.mark.servers, pytest.mark.slow]

EVENTS = 6_000


def on(url: str, settings: Settings, environment: dict[str, str], directory: Path, stack: ExitStack) -> Deployment:
    """A deployment whose state lies there."""
    there = settings.model_copy(update={"redis_url": SecretStr(url)})
    return stack.enter_context(open_deployment(there, {**environment, "REDIS_URL": url}, directory))


def same_results(one: Deployment, other: Deployment) -> None:
    """Both have every score once by the reader rule, and the same state and accounts."""
    assert one.handled() == other.handled()
    assert one.states() == other.states()
    scores, expected = (
        Counter(
            (row["source"]["topic"], row["source"]["partition"], row["source"]["offset"], row["probability"], row["vector_hash"])
            for rows in deployment.scores()
            for row in first_wins(rows)
        )
        for deployment in (one, other)
    )
    assert scores == expected
    assert sum(scores.values()) == EVENTS


@pytest.fixture
def calm(settings: Settings, environment: dict[str, str], tmp_path: Path) -> Iterator[Deployment]:
    """The same events, handled in peace on the stand-alone server of the session."""
    home = tmp_path / "calm"
    home.mkdir()
    with open_deployment(settings, environment, home) as found:
        found.feed(EVENTS)
        found.work()
        yield found


def test_workers_on_a_cluster_lose_a_primary_and_nothing_else(
    calm: Deployment, environment: dict[str, str], tmp_path: Path, churnstream: Callable[..., Completed]
) -> None:
    cluster = RedisCluster(tmp_path / "cluster")
    with ExitStack() as stack:
        stack.enter_context(running(cluster))
        named = beside(calm, "cluster")  # topics and names of its own
        home = tmp_path / "there"
        home.mkdir()
        there = on(cluster.url, named.settings, named.environment, home, stack)
        there.feed(EVENTS)
        workers = [there.start(CHURN_BATCH_MAX_EVENTS="100") for _ in range(2)]
        there.until(lambda: there.handled()["events"] > 1_000)
        victim = cluster.primary_of(f"{there.settings.namespace}:{{1}}:meta")
        victim.stop(hard=True)
        began = time.monotonic()
        # A tail that was not replicated ends the worker (the store went back); its supervisor, here, starts it again.
        while there.handled()["events"] < EVENTS:
            assert time.monotonic() - began < 90
            workers = [there.start(CHURN_BATCH_MAX_EVENTS="100") if worker.poll() is not None else worker for worker in workers]
            time.sleep(0.2)
        for worker in workers:
            worker.terminate()
            assert worker.wait(20) == 0
        homes = {cluster.primary_of(f"{there.settings.namespace}:{{{p}}}:meta").port for p in range(there.settings.partitions)}
        assert len(homes) > 1
        same_results(there, calm)
        shown = churnstream("state", "show", "c000001", "--json", environment={**there.environment, "CHURN_DATA_DIR": SHARED_DATA})
        assert shown.code == 0, shown.err
        assert shown.json()["kept_facts"] > 0


def test_a_worker_waits_for_a_full_server_and_loses_nothing(calm: Deployment, environment: dict[str, str], tmp_path: Path) -> None:
    server = RedisServer(tmp_path / "redis")
    with ExitStack() as stack:
        stack.enter_context(running(server))
        admin = stack.enter_context(closing(server.client()))
        named = beside(calm, "full")
        home = tmp_path / "there"
        home.mkdir()
        there = on(server.url, named.settings, named.environment, home, stack)
        there.feed(EVENTS)
        worker = there.start(CHURN_BATCH_MAX_EVENTS="100")
        there.until(lambda: there.handled()["events"] > 1_000)
        admin.config_set("maxmemory", admin.info("memory")["used_memory"] * 9 // 10)  # full beyond doubt
        there.until(lambda: bool(admin.info("errorstats").get("errorstat_OOM")))
        before = there.handled()["events"]
        time.sleep(12)  # longer than the watch takes to look again
        assert there.handled()["events"] == before < EVENTS
        assert worker.poll() is None
        admin.config_set("maxmemory", 0)
        there.until(lambda: there.handled()["events"] == EVENTS)
        worker.terminate()
        done = there.wait(worker, 20)
        assert done.code == 0
        assert "trying again" in done.err
        assert "filled 80%" in done.err
        same_results(there, calm)
