"""Seeds derived from what they are for, so that no draw depends on how many came before it or on which rank."""

import hashlib


def derived_seed(*parts: int | str) -> int:
    """A seed for ``torch.Generator``, from 0 to 2^63 - 1, that ``parts`` alone decide."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
