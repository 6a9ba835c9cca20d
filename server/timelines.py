"""The last requests, each with when what happened to it; no prompts, no completions."""

from collections import OrderedDict
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(slots=True, kw_only=True)
class Timeline:
    """One request's story. Times of events are seconds after its arrival."""

    request_id: str
    owner: bytes  # the salt of the key that sent it: nobody else may look
    received_at: float  # unix time
    arrived_at: float  # the same by a clock that nobody sets
    stream: bool = False
    num_prompts: int = 0
    n: int = 0
    max_tokens: int = 0
    state: str = "received"  # received, running, finished
    outcome: str | None = None
    status: int | None = None
    events: dict[str, float] = field(default_factory=dict)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    num_preemptions: int = 0

    def to_reply(self) -> dict[str, Any]:
        """What its owner may see."""
        reply = asdict(self)
        del reply["owner"], reply["arrived_at"]
        reply["events"] = {name: round(seconds, 6) for name, seconds in self.events.items()}
        return reply


class Timelines:
    """A ring of them; the newest under an id hides older ones."""

    def __init__(self, max_num: int) -> None:
        self._max_num = max_num
        self._timelines: OrderedDict[tuple[bytes, str], Timeline] = OrderedDict()

    def add(self, timeline: Timeline) -> None:
        """Remember a request from now on, and forget the oldest."""
        key = (timeline.owner, timeline.request_id)
        known = self._timelines.pop(key, None)
        if known is not None and known.arrived_at > timeline.arrived_at:
            timeline = known  # an older one that ends later
        self._timelines[key] = timeline
        if len(self._timelines) > self._max_num:
            self._timelines.popitem(last=False)

    def find(self, request_id: str, owner: bytes) -> Timeline | None:
        """The newest request with this id, if this owner sent it."""
        return self._timelines.get((owner, request_id))
