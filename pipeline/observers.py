"""Several observers of one sweep, none of which can harm it or the others."""

from __future__ import annotations

import logging
from collections.abc import Callable

from cluster.events import Event
from pipeline.plan import Unit

Observer = Callable[[Event, Unit | None], None]

_logger = logging.getLogger(__name__)


def fan_out(*observers: Observer) -> Observer:
    """Return an observer that passes every event on; one that raises is reported once and left out from then on."""
    listening = list(observers)

    def observe(event: Event, unit: Unit | None) -> None:
        for observer in tuple(listening):
            try:
                observer(event, unit)
            except Exception:
                listening.remove(observer)
                _logger.exception("An observer of the sweep failed and is left out from here on: %s", observer)

    return observe
