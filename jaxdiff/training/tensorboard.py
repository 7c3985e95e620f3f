"""Writes TensorBoard's event files, with scalars and images, without TensorFlow.

The two formats are small and have not changed since 2015: records with a length and checksums
(TFRecord), each containing a protocol buffer, `Event` from tensorflow/core/util/event.proto. For
these few fields, TensorFlow or a writer with its own threads and queues would be too much.
"""

import functools
import io
import os
import socket
import struct
import time
from pathlib import Path

import numpy as np
from PIL import Image

# Wire types of protocol buffers.
VARINT, DOUBLE, BYTES, FLOAT = 0, 1, 2, 5


def begin(directory: Path, step: int) -> Path:
    """Creates an event file; TensorBoard then discards steps after `step` in older files."""
    directory.mkdir(exist_ok=True)
    made = f"{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
    path = directory / f"events.out.tfevents.{made}"
    version = _field(3, BYTES, b"brain.Event:2")
    session_starts = _field(7, BYTES, _field(1, VARINT, 1))
    path.write_bytes(_record(0, version) + _record(step + 1, session_starts))
    return path


def append_scalars(path: Path, step: int, scalars: dict[str, float]) -> None:
    """Appends the values of one step."""
    values = b"".join(
        _field(1, BYTES, _field(1, BYTES, name.encode()) + _field(2, FLOAT, value))
        for name, value in scalars.items()
    )
    _append(path, step, values)


def append_picture(path: Path, step: int, name: str, pixels: np.ndarray) -> None:
    """Appends an image, uint8 [height, width, 3]."""
    Image.fromarray(pixels).save(png := io.BytesIO(), "png")
    height, width, channels = pixels.shape
    picture = (
        _field(1, VARINT, height)
        + _field(2, VARINT, width)
        + _field(3, VARINT, channels)
        + _field(4, BYTES, png.getvalue())
    )
    _append(
        path, step, _field(1, BYTES, _field(1, BYTES, name.encode()) + _field(4, BYTES, picture))
    )


def _append(path: Path, step: int, summary: bytes) -> None:
    with path.open("ab") as file:
        file.write(_record(step, _field(5, BYTES, summary)))


def _record(step: int, what: bytes) -> bytes:
    """Frames an `Event` with the current time as a record."""
    event = _field(1, DOUBLE, time.time()) + _field(2, VARINT, step) + what
    length = struct.pack("<Q", len(event))
    return length + _checksum(length) + event + _checksum(event)


def _field(number: int, wire_type: int, value) -> bytes:
    tag = _varint(number << 3 | wire_type)
    match wire_type:
        case 0:
            return tag + _varint(value)
        case 1:
            return tag + struct.pack("<d", value)
        case 2:
            return tag + _varint(len(value)) + value
        case 5:
            return tag + struct.pack("<f", value)


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def _checksum(data: bytes) -> bytes:
    """Computes the CRC-32C, rotated and offset as TFRecord requires."""
    table, crc = _crc_table(), 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


@functools.cache
def _crc_table() -> list[int]:
    table = []
    for crc in range(256):
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return table
