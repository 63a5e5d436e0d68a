"""Damage for GGUF files: what a broken download, or somebody with bad intentions, may send."""

import struct
from random import Random

NUMBERS = (0, 1, 5, 31, 33, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1)
WEIGHTS = (8, 4, 2, 1, 1, 1)
HEADER_BYTES = 4096  # most of the damage belongs where lengths and offsets stand


def mutated(data: bytes, random: Random) -> bytes:
    """A copy of `data` with one to four pieces of damage, the same for the same `random`."""
    changed = bytearray(data)
    for _ in range(random.randint(1, 4)):
        if len(changed) < 16:
            break
        end = len(changed) if random.random() < 0.1 else min(len(changed), HEADER_BYTES)
        place = random.randrange(end - 8)
        # What moves all that follows is soon noticed: the others find more.
        kind = random.choices(("bit", "number", "copy", "insert", "remove", "cut"), WEIGHTS)[0]
        if kind == "bit":
            changed[place] ^= 1 << random.randrange(8)
        elif kind == "number":
            code = random.choice("IQ")
            mask = 2 ** (8 * struct.calcsize(code)) - 1
            struct.pack_into(f"<{code}", changed, place, random.choice(NUMBERS) & mask)
        elif kind == "cut":
            del changed[place:]
        elif kind == "insert":
            changed[place:place] = random.randbytes(random.randint(1, 8))
        elif kind == "remove":
            del changed[place : place + random.randint(1, 8)]
        elif kind == "copy":
            source, length = random.randrange(end - 8), random.randint(1, 64)
            changed[place : place + length] = changed[source : source + length]
    return bytes(changed)
