"""Read the samples of one shard, and decode them; whatever is wrong is a DataError that names shard, sample and cause."""

import io
import os
import tarfile
from collections.abc import Callable, Container, Iterator
from contextlib import suppress
from typing import Any, BinaryIO

from PIL import Image
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_expander

from dsquant.data.remote import open_url
from dsquant.data.shard_cache import ShardCache
from dsquant.data.shards import (
    FAULT,
    FIX,
    LABEL_MEMBER,
    SKIPPED_MEMBER,
    TEXT_MEMBER,
    content_member,
    image_member,
    is_remote,
    read_failure,
)
from dsquant.data.text import decode_text
from dsquant.errors import DataError

Record = dict[str, Any]


def read_shard(
    url: str, count: int, size: int | None = None, digest: str | None = None, cache: ShardCache | None = None,
    wanted: Container[int] | None = None,
) -> Iterator[Record]:  # fmt: skip
    """Yield the undecoded samples of a shard: {"__key__", "__url__", "__number__", member: bytes}.

    size, digest: what its index says, where it does. A remote shard is read through `cache`, where there is one.
    A sample with a member twice is yielded, and refused when it is decoded; of one that is not `wanted` the members may be
    empty. Raises DataError where the shard cannot be read, or read to its end does not hold `count` samples or is not of
    that size: a tar cut between two members looks whole to tarfile.
    """
    stream, held, done, faults = None, None, 0, []  # one sample is held back: the last of a cut shard may lack a member
    try:
        stream = cache.open(url, size, digest) if cache and is_remote(url) else open_url(url)
        members = _members(stream, url, wanted)
        for done, record in enumerate(group_by_keys(members, handler=lambda error: faults.append(error) is None), 1):
            if done > count:
                break
            record["__number__"] = done - 1
            if faults:
                record[FAULT] = read_failure(faults.pop())
            if held is not None:
                yield held
            held = record
        found = size if size is None or is_remote(url) else os.fstat(stream.fileno()).st_size
    except Exception as error:  # tarfile and its decompressors raise almost anything on damaged bytes
        if held is not None:  # another came after it, so it is whole
            yield held
        raise DataError(f"shard {url}: {read_failure(error)}, after {done} of {count} samples; {FIX}") from error
    finally:
        if stream is not None:
            with suppress(OSError):  # a pipe that is closed before its end says so with its exit status
                stream.close()
    if done != count:
        held_there = f"{done} samples" if done < count else f"more than {count} samples"
        raise DataError(f"shard {url}: {held_there} where {count} were counted: truncated or changed; {FIX}")
    if found != size:
        raise DataError(f"shard {url}: {found} bytes, but its index says {size}: truncated or changed; {FIX}")
    if held is not None:
        yield held


def _members(stream: BinaryIO, url: str, wanted: Container[int] | None) -> Iterator[dict[str, Any]]:
    """Yield the members as webdataset does: of an uncompressed tar in a file those alone that are wanted, else all."""
    in_file = isinstance(stream, io.BufferedReader) and stream.seekable()
    if in_file and stream.peek(tarfile.BLOCKSIZE)[257:262] == b"ustar":
        return _wanted_members(stream, url, wanted)
    return tar_file_expander([{"url": url, "stream": stream}])


def _wanted_members(stream: BinaryIO, url: str, wanted: Container[int] | None) -> Iterator[dict[str, Any]]:
    """Yield the members that webdataset's tar_file_expander would, with the bytes of wanted samples alone.

    What is lost must not depend on what is wanted, which differs from worker to worker: a tar ends before the first member
    that is cut, read or not, and bytes that the disk does not give are a fault of their sample alone.
    """
    size, number, last = os.fstat(stream.fileno()).st_size, -1, None
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # tarfile keeps every header otherwise
            if not member.isreg() or SKIPPED_MEMBER.match(member.name):
                continue
            if member.offset_data + member.size > size:
                raise tarfile.ReadError("unexpected end of data")
            key, _ = base_plus_ext(member.name)
            if key is None:
                continue
            number, last = number + (key != last), key
            data, fault = b"", None
            if wanted is None or number in wanted:
                try:
                    data = tar.extractfile(member).read()
                except OSError as error:
                    fault = read_failure(error)
            yield {"fname": member.name, "data": data, "__url__": url}
            if fault is not None:
                yield {"fname": f"{key}.{FAULT}", "data": fault, "__url__": url}


def decode(record: Record, transform: Callable[[Any], Any]) -> tuple[Any, int | float]:
    """Decode and transform the image or the text of a record, and read its label; raise DataError with shard, key and cause."""
    if content_member(record["__url__"], record) == TEXT_MEMBER:
        return decode_text(record, transform)
    return _decode_image(record, transform)


def _decode_image(record: Record, transform: Callable[[Any], Any]) -> tuple[Any, int]:
    url, key = record["__url__"], record["__key__"]
    member = image_member(url, record)
    try:
        label = int(record[LABEL_MEMBER])
    except ValueError:
        label = -1
    if not 0 <= label < 1 << 63:
        content = record[LABEL_MEMBER][:20]
        raise DataError(f"shard {url}, sample {key}: {LABEL_MEMBER} holds {content!r}, not a label (0, 1, ...); {FIX}")
    try:
        image = Image.open(io.BytesIO(record[member]))
        image.load()
    except Exception as error:  # Pillow's plugins raise almost anything on damaged bytes
        raise DataError(f"shard {url}, sample {key}: cannot decode {member} ({_cause(error)}); {FIX}") from error
    try:
        return transform(image), label
    except Exception as error:
        message = f"shard {url}, sample {key}: cannot transform the {image.mode} image of size {image.size}"
        raise DataError(f"{message} ({_cause(error)}); check data.image_size, channels and augment") from error


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
