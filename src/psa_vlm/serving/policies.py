"""Which policy holds for whom, and the files that may replace it while the service runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from psa_vlm.errors import PsaVlmError
from psa_vlm.policy.policy import Policy

if TYPE_CHECKING:
    from prometheus_client import Counter

    from psa_vlm.taxonomy import Taxonomy

_logger = logging.getLogger(__name__)

Stamp = tuple[int, int, int] | None
"""Time, size and number of a file; None where there is none."""


class Policies:
    """The policy of everybody, or of each tenant.

    Args:
        policy: for everybody, or with a part for each tenant.
        taxonomy: that it has to fit.
        tenants: who have keys; None where nobody needs one.
        load: reads the policy anew; None for one that stays.
        reloads: counts by outcome, "ok" or "refused".

    Raises:
        PolicyError: the policy does not fit the taxonomy, or lacks a tenant.
    """

    def __init__(
        self,
        policy: Policy,
        taxonomy: Taxonomy,
        tenants: Iterable[str] | None,
        load: Callable[[], Policy] | None,
        reloads: Counter,
    ) -> None:
        self._taxonomy = taxonomy
        self._tenants = None if tenants is None else tuple(tenants)
        self._load = load
        self._reloads = reloads
        self._held = self._checked(policy)
        self._stamps = {file: _stamp(file) for file in policy.files}

    def of(self, tenant: str | None) -> Policy:
        """The policy of a tenant; of None, everybody's."""
        return self._held[tenant]

    def reload(self) -> None:
        """Read the policy anew: one that can't be used is refused, and the old one stays.

        Requests that are under way end under the policy that they began with.
        """
        if self._load is None:
            return
        stamps = {file: _stamp(file) for file in self._stamps}  # of what is about to be read
        try:
            policy = self._load()
            self._held = self._checked(policy)
        except PsaVlmError as error:
            _logger.error("the new policy is refused, the old one stays: %s", error)
            self._reloads.labels("refused").inc()
        else:
            _logger.info("policy %s is loaded, hash %s", policy.name, policy.hash)
            self._reloads.labels("ok").inc()
            stamps = {file: stamps.get(file) or _stamp(file) for file in policy.files}
        self._stamps = stamps

    async def watch(self, every: float = 2.0) -> None:
        """Reload when a file of the policy changes; look `every` so many seconds, for ever."""
        while True:
            await asyncio.sleep(every)
            if any(_stamp(file) != stamp for file, stamp in self._stamps.items()):
                await asyncio.to_thread(self.reload)

    def _checked(self, policy: Policy) -> dict[str | None, Policy]:
        policy.check(self._taxonomy)
        if self._tenants is None:
            return {None: policy}
        return {name: policy.for_tenant(name) for name in self._tenants}


def _stamp(file: str) -> Stamp:
    try:
        found = Path(file).stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
