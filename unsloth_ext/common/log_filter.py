"""A filter for log messages of other packages that would mislead here."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def showing_only(logger: logging.Logger, wanted: Callable[[logging.LogRecord], bool]) -> Iterator[None]:
    """Let a logger pass only the wanted records inside the context. Its level, which others read, is unchanged."""
    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)
