"""From findings to pages: what belongs together is one episode, and an episode pages once."""

from dataclasses import asdict, dataclass, field
from typing import Any, Final

from features.window import DAY_MS

QUIET_MS: Final = 7 * DAY_MS
"""An episode without a finding for so long is over. What the same cause brings up before is an update of it, not a page."""


@dataclass(slots=True)
class Episode:
    """A stretch of time in which one cause keeps detectors busy. Epoch ms."""

    key: str
    number: int
    opened_ms: int
    last_ms: int
    findings: int = 0


@dataclass(slots=True)
class Pager:
    """Opens, extends and closes episodes by the key of their cause."""

    episodes: dict[str, Episode] = field(default_factory=dict)
    pages: int = 0

    def note(self, key: str, at_ms: int, findings: int) -> tuple[Episode, bool]:
        """The episode that findings of a cause belong to, and whether they are its first: then it pages."""
        episode = self.episodes.get(key)
        first = episode is None or at_ms - episode.last_ms > QUIET_MS
        if episode is None or first:
            self.pages += 1
            episode = self.episodes[key] = Episode(key, self.pages, at_ms, at_ms)
        episode.last_ms, episode.findings = at_ms, episode.findings + findings
        return episode, first

    def over(self, at_ms: int) -> list[Episode]:
        """Take out the episodes that are over."""
        done = [key for key, episode in self.episodes.items() if at_ms - episode.last_ms > QUIET_MS]
        return [self.episodes.pop(key) for key in done]

    def state(self) -> dict[str, Any]:
        """As JSON types."""
        return {"pages": self.pages, "episodes": [asdict(episode) for episode in self.episodes.values()]}

    @staticmethod
    def of(state: dict[str, Any]) -> "Pager":
        """From `state`."""
        return Pager({one["key"]: Episode(**one) for one in state["episodes"]}, state["pages"])
