"""Messages of other people's loggers that would mislead here are left out."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def showing_only(logger: logging.Logger, wanted: Callable[[logging.LogRecord], bool]) -> Iterator[None]:
    """While open, the logger passes on the `wanted` records alone. Its level, which others read, stays."""
    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)
