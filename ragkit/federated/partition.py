"""Which rows a client has, where one data set stands for several clients (simulation)."""

from __future__ import annotations

import difflib
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from ragkit.federated.errors import FederatedError
from ragkit.tuning.qa_data import QAData, QAExample, load_qa

FIELDS = ("id", "question", "answer")


def partition_rows(
    data: QAData, num_clients: int | None, how: Any = "iid", seed: int = 0, columns: Mapping[str, str] | None = None
) -> list[QAData]:
    """Deals the rows to the clients; a client's rows keep the order they had.

    Args:
        data: All rows.
        num_clients: How many clients; None where `how` says it.
        how: One of
            - "iid": at random (seeded), in parts whose sizes differ by one at most;
            - the name of a column: rows of one value stay together. With more values than clients, the value with the
              most rows goes to the client with the fewest, and so on;
            - a list with one client number (from 0) for each row;
            - a list with the ids of each client's rows, or with each client's own data (anything `load_qa` reads).
        seed: Seed of "iid".
        columns: As for `load_qa`, for data given by the client.

    Returns:
        One `QAData` a client.

    Raises:
        FederatedError: A client without rows, another number of parts than clients, an unknown column, or ids that
            are unknown or given to two clients.
    """
    if num_clients is not None and (isinstance(num_clients, bool) or not isinstance(num_clients, Integral)):
        raise FederatedError(f"num_clients: found {num_clients!r}, expected a whole number")
    if num_clients is not None and num_clients < 1:
        raise FederatedError(f"num_clients: found {num_clients}, expected at least 1")
    if isinstance(how, str):
        if how == "iid":
            if num_clients is None:
                raise FederatedError('partition="iid" needs num_clients')
            owners = deal(len(data), num_clients, seed)
        else:
            owners, num_clients = by_column(data, how, num_clients)
        return check_parts(split(data, owners, num_clients))
    if how is None or not isinstance(how, Iterable) or isinstance(how, Mapping):
        raise FederatedError(f'partition: found {how!r}, expected "iid", the name of a column, or a list')
    parts = how.tolist() if hasattr(how, "tolist") else list(how)  # arrays and tensors as numbers
    if len(parts) == len(data) and all(isinstance(part, Integral) and not isinstance(part, bool) for part in parts):
        count = num_clients or max(parts) + 1
        wrong = [owner for owner in parts if not 0 <= owner < count]
        if wrong:
            raise FederatedError(f"partition: found the client number {wrong[0]}, expected 0 to {count - 1}")
        return check_parts(split(data, parts, count))
    if num_clients is not None and len(parts) != num_clients:
        raise FederatedError(
            f"partition: found {len(parts)} parts, expected {num_clients} (num_clients), or one client number for "
            f"each of the {len(data)} rows"
        )
    if all(_is_ids(part) for part in parts):
        return check_parts(by_ids(data, parts))
    return check_parts([load_qa(part, columns=columns) for part in parts])


def deal(rows: int, num_clients: int, seed: int) -> list[int]:
    """The owner of each row: shuffled with the seed, then dealt round."""
    order = list(range(rows))
    random.Random(f"partition:{seed}").shuffle(order)
    owners = [0] * rows
    for place, row in enumerate(order):
        owners[row] = place % num_clients
    return owners


def by_column(data: QAData, column: str, num_clients: int | None) -> tuple[list[int], int]:
    """(owner of each row, number of clients), where the values of a column stay together."""
    values = [value_of(example, column) for example in data]
    counts = Counter(values)
    num_clients = num_clients or len(counts)
    if num_clients > len(counts):
        raise FederatedError(
            f"partition={column!r}: found {len(counts)} values ({', '.join(map(str, list(counts)[:5]))}"
            f"{', ...' if len(counts) > 5 else ''}), which cannot be dealt to {num_clients} clients; use "
            f'num_clients={len(counts)} at most, or partition="iid"'
        )
    load, owner = [0] * num_clients, {}
    for value, count in counts.most_common():  # equally frequent values in the order of the rows
        client = load.index(min(load))
        owner[value] = client
        load[client] += count
    return [owner[value] for value in values], num_clients


def value_of(example: QAExample, column: str) -> str:
    """The value of a column of a row, as text."""
    if column in FIELDS:
        return str(getattr(example, column))
    if column not in example.metadata:
        names = [*example.metadata, "iid"]
        near = difflib.get_close_matches(column, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise FederatedError(
            f"partition={column!r}: the row {example.id!r} has no such column (it has "
            f'{", ".join(map(repr, example.metadata)) or "none"}; "iid" deals at random){hint}'
        )
    return str(example.metadata[column])


def by_ids(data: QAData, parts: Sequence[Sequence[str]]) -> list[QAData]:
    """Each client's rows by their ids."""
    rows = {example.id: example for example in data}
    owner: dict[str, int] = {}
    for client, ids in enumerate(parts):
        for identity in ids:
            if identity not in rows:
                near = difflib.get_close_matches(identity, rows, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise FederatedError(f"partition: client {client} is given the row {identity!r}, unknown here{hint}")
            if identity in owner:
                raise FederatedError(
                    f"partition: the row {identity!r} is given to clients {owner[identity]}, {client}"
                )
            owner[identity] = client
    left = len(rows) - len(owner)
    if left:
        print(f"partition: {left} of {len(rows)} rows are given to no client")
    return [QAData([e for e in data if owner.get(e.id) == client], data.source) for client in range(len(parts))]


def split(data: QAData, owners: Sequence[int], num_clients: int) -> list[QAData]:
    """The rows of each client."""
    parts: list[list[QAExample]] = [[] for _ in range(num_clients)]
    for example, owner in zip(data, owners, strict=True):
        parts[owner].append(example)
    return [QAData(part, data.source) for part in parts]


def check_parts(parts: list[QAData]) -> list[QAData]:
    """Raises FederatedError where a client has no row."""
    empty = [client for client, part in enumerate(parts) if not len(part)]
    if empty:
        rows = sum(map(len, parts))
        raise FederatedError(
            f"client {empty[0]} has no rows ({len(empty)} of {len(parts)} clients have none, of {rows} rows): use "
            "fewer clients or another partition"
        )
    return parts


def _is_ids(part: Any) -> bool:
    return isinstance(part, (list, tuple, set, frozenset)) and all(isinstance(item, str) for item in part)
