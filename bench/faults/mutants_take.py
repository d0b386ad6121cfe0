"""The check of mutant M4: an item the agent failed on is never taken for done, and nothing is worked on after it.

Faust's own `take` acknowledges what it holds even when its agent raises; our feeder waits for the result of each item instead.
The real Feeder and the real agent run here on a channel of a Faust app; the engine is a function that fails once.
The last line is a report like that of `simulate`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Sequence
from typing import Any, Final

import faust

from proto.errors import StoreUnavailable
from streams.agents import Feeder, scoring_agent
from streams.engine import Result
from streams.merge import Batch

ITEMS: Final = 6
FAILS: Final = 3
TIMEOUT_S: Final = 20.0


async def observe() -> tuple[list[int], BaseException | None]:
    """Items the engine was given, by number, and what the feeder ended with."""
    app = faust.App("mutants-take", broker="kafka://nowhere", store="memory://", web_enabled=False, topic_disable_leader=True)
    channel: Any = app.channel(value_type=None, maxsize=1)
    left = list(range(1, ITEMS + 1))
    given: list[int] = []
    everything = asyncio.Event()
    loop = asyncio.get_running_loop()

    def take() -> list[Batch]:
        return [left.pop(0)] if left else []  # type: ignore[list-item]  # nobody looks inside

    def process(batches: Sequence[Any]) -> Result:
        given.extend(batches)
        if batches[0] == ITEMS:
            loop.call_soon_threadsafe(everything.set)
        if batches[0] == FAILS:
            raise StoreUnavailable("as when Redis does not answer")
        return Result({}, [], {})

    feeder = Feeder(channel, take, lambda: not left, lambda _: None, result_timeout_s=5.0)
    scoring_agent(app, channel, process, lambda: feeder.progress)
    # The agent and the feeder alone: nothing here needs a broker.
    app.finalize()
    app.flow_control.resume()
    agent = app.agents["score"]
    await agent.start()
    try:
        await feeder.start()
        ends = [asyncio.ensure_future(event.wait()) for event in (feeder.ended, everything)]
        await asyncio.wait(ends, timeout=TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        for end in ends:
            end.cancel()
    finally:
        feeder.drain()
        await feeder.stop()
        await agent.stop()
    return given, feeder.progress.failure


def main() -> int:
    """0 when the feeder ends with the failure of the item and hands out no other."""
    logging.disable(logging.CRITICAL)
    given, failure = asyncio.run(observe())
    violation = None
    if given != list(range(1, FAILS + 1)) or not isinstance(failure, StoreUnavailable):
        what = f"I1: item {FAILS} failed; items {given} were handed to the engine, and the feeder ended with {failure!r}"
        violation = {"seed": 0, "invariant": "I1", "what": what}
    print(json.dumps({"seeds": 1, "violations": int(violation is not None), "first_violation": violation}))
    return int(violation is not None)


if __name__ == "__main__":
    sys.exit(main())
