"""Damages files at random and reads them: a reader may refuse with ValueError or succeed.

`mutate` knows JSON and the header of safetensors, which it changes value by value so that damage
reaches the checks behind the parser; any other bytes it flips, cuts, repeats and overwrites.
Seeded: a failure names its round, and the same seed gives the same files.
"""

import json
import resource
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    7,
    31,
    2**15,
    2**31 - 1,
    2**31,
    2**32,
    2**53,
    2**60,
    2**63,
    2**64,
    10**30,
)
HOSTILE = (*NUMBERS, 0.5, -0.0, 1e308, True, False, None, "", "x", "../x", "\x00", [], {}, [[]])
TYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "x")


def mutate(data: bytes, random: Random) -> bytes:
    """`data` with one to three changes."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        data = _change(data, random)
    return data


def _change(data: bytes, random: Random) -> bytes:
    if random.random() < 0.6:
        start = 8 if data[8:9] == b"{" else 0  # safetensors: the length of the header comes first
        length = int.from_bytes(data[:8], "little") if start else len(data)
        try:
            value = json.loads(data[start : start + length])
        except ValueError:
            pass
        else:
            text = json.dumps(_change_value(value, random)).encode()
            prefix = len(text).to_bytes(8, "little") if start else b""
            return prefix + text + data[start + length :] if start else text
    return _change_bytes(data, random)


def _change_value(value: Any, random: Random) -> Any:
    """A JSON value with one change somewhere inside."""
    if not isinstance(value, dict | list) or not value or random.random() < 0.1:
        return _other(value, random)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key, other = random.choice(keys), random.choice(keys)
    what = random.random()
    if what < 0.7:
        value[key] = _change_value(value[key], random)
    elif what < 0.8:
        del value[key]
    elif what < 0.9:
        value[key], value[other] = value[other], value[key]
    elif isinstance(value, dict):
        value[random.choice((str(key) + "x", "x", str(other)))] = value.pop(key)
    else:
        value.append(random.choice(HOSTILE))
    return value


def _other(value: Any, random: Random) -> Any:
    if type(value) is int and random.random() < 0.5:
        return random.choice((value + 1, value - 1, value * 2, value // 2, -value, value << 20))
    if isinstance(value, str) and value in TYPES:
        return random.choice(TYPES)
    return random.choice(HOSTILE)


def _change_bytes(data: bytes, random: Random) -> bytes:
    """`data` with bytes flipped, overwritten by an extreme number, cut, repeated or inserted."""
    # Half of all changes in the first kilobyte, where headers are.
    reach = min(len(data), 1024) if random.random() < 0.5 else len(data)
    at = random.randrange(max(reach, 1))
    end = at + random.choice((1, 2, 4, 8, 64))
    what = random.randrange(5)
    if what == 0 and data:
        return data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1 :]
    if what == 1:
        width = random.choice((1, 2, 4, 8))
        number = random.choice(NUMBERS) % 256**width
        return data[:at] + number.to_bytes(width, "little") + data[at + width :]
    if what == 2:
        return data[:at] + data[end:] if random.random() < 0.5 else data[:at]
    if what == 3:
        return data[:end] + data[at:end] + data[end:]
    return data[:at] + random.randbytes(end - at) + data[end:]


def fuzz(
    path: Path,
    read: Callable[[Path], Any],
    count: int,
    seed: int = 0,
    mutate: Callable[[bytes, Random], bytes] = mutate,
) -> tuple[Counter[str], int]:
    """Read `path`, a file or a folder of files, `count` times with one file damaged each time.

    mutate: does the damage. Returns how often it was "read" and "refused", and by how many bytes
    the process grew at its peak. Raises AssertionError, with the round, for any other exception,
    and for an error of two lines or without the path.
    """
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    originals = {file: file.read_bytes() for file in files}
    read(path)  # what is imported and cached once is no growth
    before = _peak_bytes()
    seen: Counter[str] = Counter()
    for number in range(count):
        random = Random(seed * 1_000_003 + number)
        file = random.choice(files)
        file.write_bytes(mutate(originals[file], random))
        try:
            read(path)
            seen["read"] += 1
        except ValueError as error:
            said = str(error)
            assert str(path) in said and "\n" not in said, f"seed {seed}, round {number}: {said}"
            seen["refused"] += 1
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise AssertionError(f"seed {seed}, round {number}, {file.name}: {what}") from error
        finally:
            file.write_bytes(originals[file])
    return seen, _peak_bytes() - before


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
