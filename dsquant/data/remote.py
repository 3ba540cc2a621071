"""Open addresses: http(s) in a way that outlives failed and cut transfers, everything else as webdataset does."""

import http.client
import io
import time
import urllib.error
import urllib.request
from contextlib import suppress
from typing import BinaryIO

from webdataset.gopen import gopen, rewrite_url

READ_BYTES = 1 << 20  # of a pipe or a remote shard at a time
ATTEMPTS = 6  # of one transfer
FIRST_WAIT = 0.5  # seconds before the second attempt, doubled for each after it
TIMEOUT = 60.0  # seconds that a server may be silent
PASSING = {408, 425, 429, 500, 502, 503, 504}  # statuses that may be another at the next attempt


class TransferError(OSError):
    """Signal a transfer that failed for good."""


def open_url(url: str) -> BinaryIO:
    """Open a path or an address for reading; OSError, also of its reads, where it cannot be had.

    What http(s) delivers is whole: where a server fails, falls silent for 60 s or closes too early, the rest is asked for
    again, 6 times in all, at growing intervals. The others are pipes to a command, whose exit status shows when they are closed.
    """
    address = rewrite_url(url)
    if address.startswith(("http://", "https://")):
        return io.BufferedReader(_HttpFile(address), READ_BYTES)
    return gopen(url, bufsize=READ_BYTES)


def wait_before(attempt: int) -> None:
    """Wait before attempt 1, 2, ... that follows a failed one."""
    time.sleep(FIRST_WAIT * 2 ** (attempt - 1))


class _HttpFile(io.RawIOBase):
    def __init__(self, url: str):
        self.url, self.position, self.failures = url, 0, 0
        self.size: int | None = None  # bytes in all, where the server tells
        self.response: http.client.HTTPResponse | None = None
        self.readinto(bytearray(0))  # connects

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:
        while True:
            try:
                if self.response is None:
                    self._connect()
                count = self.response.readinto(buffer)
                if count == 0 < len(buffer) and self.size is not None and self.position < self.size:
                    raise ConnectionError(f"the server closed after {self.position} of {self.size} bytes")
                self.position += count
                return count
            except TransferError:
                raise
            except (OSError, http.client.HTTPException) as error:
                self._give_up_or_wait(error)

    def _connect(self) -> None:
        headers = {"User-Agent": "dsquant"} | ({"Range": f"bytes={self.position}-"} if self.position else {})
        self.response = urllib.request.urlopen(urllib.request.Request(self.url, headers=headers), timeout=TIMEOUT)
        length, resumed = (
            self.response.headers["Content-Length"],
            self.response.status == http.HTTPStatus.PARTIAL_CONTENT,
        )
        size = None if length is None else int(length) + (self.position if resumed else 0)
        if self.size not in (None, size):
            raise TransferError(f"{self.size} bytes long at first, then {size}: it changed while it was read")
        self.size = size
        left = 0 if resumed else self.position  # a server that knows no ranges begins anew
        while left and (skipped := len(self.response.read(min(left, READ_BYTES)))):
            left -= skipped

    def _give_up_or_wait(self, error: Exception) -> None:
        self.close_response()
        self.failures += 1
        if isinstance(error, urllib.error.HTTPError) and error.code not in PASSING:
            raise TransferError(f"HTTP {error.code} {error.reason}") from error
        if self.failures == ATTEMPTS:
            raise TransferError(f"{error or type(error).__name__}, the last of {ATTEMPTS} attempts") from error
        wait_before(self.failures)

    def close_response(self) -> None:
        if self.response is not None:
            with suppress(OSError):
                self.response.close()
            self.response = None

    def close(self) -> None:
        self.close_response()
        super().close()
