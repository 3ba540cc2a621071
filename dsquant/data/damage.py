"""Damaged samples of a training set: named, counted, and replaced up to a limit, then an error."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from dsquant.errors import DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Damage:
    """Name a sample that cannot be had: its shard, its number there (from 0), and the message of the DataError."""

    shard: str
    number: int
    cause: str


class DamageLog:
    """Count the damaged samples that a rank has met, each once however often epochs come back to it.

    found: cause by (shard, number of the sample).
    """

    def __init__(self, limit: int, rank: int):
        self.limit, self.rank = limit, rank
        self.found: dict[tuple[str, int], str] = {}

    def add(self, worker: int, damages: Iterable[Damage]) -> None:
        """Count what is new among `damages` and warn of it; raise DataError for the first sample beyond the limit."""
        causes: dict[str, int] = {}
        for damage in damages:
            if (damage.shard, damage.number) in self.found:
                continue
            if len(self.found) == self.limit:
                self._warn(worker, causes)
                raise DataError(
                    f"{damage.cause}. Another {self.limit} damaged samples were skipped before, as many as "
                    f"data.max_damaged allows: repair the shards, or allow more"
                )
            self.found[damage.shard, damage.number] = damage.cause
            causes[damage.cause] = causes.get(damage.cause, 0) + 1
        self._warn(worker, causes)

    def _warn(self, worker: int, causes: dict[str, int]) -> None:
        for cause, samples in causes.items():
            logger.warning(
                "rank %d, worker %d: %d damaged %s replaced (%d of at most %d): %s",
                self.rank, worker, samples, "sample" if samples == 1 else "samples", len(self.found), self.limit, cause,
            )  # fmt: skip


def damage_report(found: Iterable[dict[tuple[str, int], str]]) -> list[dict[str, object]]:
    """Merge what ranks have found into one entry a cause: {"shard", "cause", "samples": their numbers in the shard}."""
    numbers: dict[tuple[str, str], set[int]] = {}
    for part in found:
        for (shard, number), cause in part.items():
            numbers.setdefault((shard, cause), set()).add(number)
    return [{"shard": shard, "cause": cause, "samples": sorted(n)} for (shard, cause), n in sorted(numbers.items())]
