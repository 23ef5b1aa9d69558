"""Reading the records of parsed official files.

What the official programs would stumble over with a KeyError or TypeError becomes a ValueError that names the record and the key.
"""

from collections.abc import Collection

__all__ = ["field", "index_questions", "index_records", "name_ids"]

SHOWN = 10
SHOWN_KEYS = 20  # more than any official record has; a whole file by id has a hundred thousand


def name_ids(ids: Collection) -> str:
    """The number of `ids` and the first ten of them by `repr`: "12: 1, 2, ... and 2 more"."""
    ids = list(ids)
    if not ids:
        return "0"
    rest = f", ... and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
    return f"{len(ids)}: " + ", ".join(repr(one) for one in ids[:SHOWN]) + rest


def field(record, key: str, owner: str):
    """`record[key]`. Raises ValueError that names `owner` when the record is no object or lacks the key."""
    if not isinstance(record, dict):
        raise ValueError(f"{owner} must be a JSON object, found {_short(record)}")
    if key not in record:
        keys = sorted(map(str, record))
        rest = f" and {len(keys) - SHOWN_KEYS} more" if len(keys) > SHOWN_KEYS else ""
        raise ValueError(f"{owner} has no {key!r}; it has {keys[:SHOWN_KEYS]}{rest}")
    return record[key]


def index_records(records, key: str, what: str) -> dict:
    """{record[key]: record} over a list of records, the last one of an id winning, in order of first appearance.

    Raises ValueError when `records` is no list or a record has no such key or one that cannot be an id.
    """
    if not isinstance(records, list):
        raise ValueError(f"{what} must be a JSON list of objects, found {_short(records)}")
    indexed = {}
    for position, record in enumerate(records):
        identity = field(record, key, f"entry {position} of {what}")
        try:
            indexed[identity] = record
        except TypeError:
            raise ValueError(f"entry {position} of {what}: {key} must be a number or a string, found {_short(identity)}") from None
    return indexed


def index_questions(records, key: str, what: str) -> dict:
    """`index_records` for what is to be asked: raises ValueError for an id with two different records, one of which nobody would answer."""
    indexed = index_records(records, key, what)
    if len(indexed) < len(records):
        if twice := list(dict.fromkeys(record[key] for record in records if indexed[record[key]] != record)):
            raise ValueError(f"{what}: ids that stand for different questions, {name_ids(twice)}; give each question an id of its own")
    return indexed


def _short(value) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
