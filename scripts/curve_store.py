"""Show a curve store, write it as one Parquet file that others can read and replay, or read such a file into a store.

    python scripts/curve_store.py show results/curves.sqlite
    python scripts/curve_store.py export results/curves.sqlite table.parquet
    python scripts/curve_store.py import table.parquet elsewhere/curves.sqlite

The Parquet file has a row for each report of each curve, in order. ``key`` (JSON) is what decides the curve, ``origin``
(JSON) where it was measured, ``number`` counts a curve's rows from 1, ``row`` (JSON) is what the store replays. The
other columns are there to be read: task, estimator, seed, epoch, scores, losses, seconds, failure. Curves that a store
has already are left as they are. With the same code of the task, ``python -m harness backend=simulated`` then finds
every imported curve and trains nothing.
"""

import argparse
import contextlib
import json
import math
import os
import sqlite3
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from backends.context import UserError
from backends.curve_store import CurveStore, Row

FORMAT = {b"format": b"ohgw-curves", b"version": b"1"}
NUMBERS = ("train_loss", "train_score", "validation_loss", "validation_score", "test_score")
SCHEMA = pa.schema(
    [
        *((name, pa.dictionary(pa.int32(), pa.string())) for name in ("key", "origin", "task", "estimator")),
        ("seed", pa.int64()),
        ("number", pa.int32()),
        ("epoch", pa.int32()),
        *((name, pa.float64()) for name in (*NUMBERS, "seconds")),
        ("failure", pa.string()),
        ("row", pa.string()),
    ],
    metadata=FORMAT,
)
BATCH = 20_000  # rows held in memory at a time


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{show,export,import}")
    commands.add_parser("show", help="count what is in a store").add_argument("store", type=Path)
    for name, first, second in (("export", "store", "table"), ("import", "table", "store")):
        command = commands.add_parser(name, help=f"{first} to {second}")
        command.add_argument(first, type=Path)
        command.add_argument(second, type=Path)
    options = parser.parse_args()
    try:
        {"show": show, "export": export, "import": import_table}[options.command](options)
    except UserError as error:
        print("error:", error, file=sys.stderr)
        return 2
    except (sqlite3.Error, pa.ArrowException, json.JSONDecodeError) as error:
        print(f"error: a file cannot be read or written: {error}", file=sys.stderr)
        return 2
    return 0


def show(options: argparse.Namespace) -> None:
    with existing(options.store) as store:
        counts = store.counts()
        print(f"{options.store}: {counts['curves']} curves, {counts['rows']} rows, {counts['checkpoints']} checkpoints "
              f"({counts['checkpoint_bytes'] / 2**20:.1f} MiB)")  # fmt: skip
        groups: dict[str, list[int]] = {}
        for key, _, rows in store.export():
            words = (name_of(key), f"ohgw={estimator(key)}", f"code {key.get('code', '?')}")
            groups.setdefault("  ".join(words), []).append(len(rows))
    for name, lengths in sorted(groups.items()):
        print(f"  {name}: {len(lengths)} curves, {sum(lengths)} rows")


def export(options: argparse.Namespace) -> None:
    """Write the table beside its place and rename it: a table that is there is a whole one."""
    temporary = options.table.with_name(f".{options.table.name}.{os.getpid()}.tmp")
    rows = curves = 0
    try:
        with existing(options.store) as store, pq.ParquetWriter(temporary, SCHEMA, compression="zstd") as writer:
            batch: list[dict[str, Any]] = []
            for key, origin, curve in store.export():
                batch += table_rows(key, origin, curve)
                curves, rows = curves + 1, rows + len(curve)
                if len(batch) >= BATCH:
                    writer.write_table(pa.Table.from_pylist(batch, SCHEMA))
                    batch = []
            writer.write_table(pa.Table.from_pylist(batch, SCHEMA))
        os.replace(temporary, options.table)
    except OSError as error:
        raise UserError(f"cannot write {options.table}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    print(f"{options.table}: {curves} curves, {rows} rows, {options.table.stat().st_size / 2**20:.2f} MiB")


def import_table(options: argparse.Namespace) -> None:
    try:
        file = pq.ParquetFile(options.table)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"cannot read {options.table} as a Parquet file: {error}") from None
    metadata = file.schema_arrow.metadata or {}
    if any(metadata.get(name) != value for name, value in FORMAT.items()):
        raise UserError(
            f"{options.table} is no table of curves of version 1; make one with: {Path(__file__).name} export"
        )
    curves = new = 0
    with CurveStore(options.store) as store:
        for (key, origin), rows in groupby(read(file), key=lambda row: (row["key"], row["origin"])):
            new += store.put(json.loads(key), json.loads(origin), in_order(rows, options.table))
            curves += 1
    print(f"{options.store}: {curves} curves read, {new} rows were new")


def read(file: pq.ParquetFile) -> Iterator[dict[str, Any]]:
    for batch in file.iter_batches(BATCH, columns=["key", "origin", "number", "row"]):
        yield from batch.to_pylist()


def in_order(rows: Iterable[Mapping[str, Any]], table: Path) -> list[Row]:
    """The rows of one curve. Errors: UserError if one is missing or cannot be read."""
    found: list[Row] = []
    for row in rows:
        if row["number"] != len(found) + 1:
            raise UserError(f"{table}: row {len(found) + 1} of a curve is missing")
        try:
            found.append(Row.from_json(row["row"]))
        except (ValueError, TypeError) as error:
            raise UserError(f"{table}: row {row['number']} of a curve cannot be read ({error})") from None
    return found


def existing(path: Path) -> CurveStore:
    if not path.is_file():
        raise UserError(f"there is no curve store {path}; backend=simulated makes one as it runs")
    return CurveStore(path)


def table_rows(key: Mapping[str, Any], origin: Mapping[str, Any], curve: Iterable[Row]) -> Iterator[dict[str, Any]]:
    about = {
        "key": json.dumps(key), "origin": json.dumps(origin), "task": name_of(key), "estimator": estimator(key),
        "seed": key.get("seed"),
    }  # fmt: skip
    for number, row in enumerate(curve, 1):
        report = row.report or {}
        busy = (row.report or row.details).get("busy")
        numbers = {name: float(report.get(name, math.nan)) for name in NUMBERS}
        seconds = sum(busy.values()) if busy else row.seconds
        yield {**about, **numbers, "number": number, "epoch": report.get("epoch"), "seconds": seconds,
               "failure": row.failure, "row": row.to_json()}  # fmt: skip


def name_of(key: Mapping[str, Any]) -> str:
    """Task class and model of a curve."""
    task = key.get("task", {})
    return f"{str(task.get('_target_', '?')).rpartition('.')[2]}/{task.get('model', '?')}"


def estimator(key: Mapping[str, Any]) -> str:
    return str(key.get("ohgw", {}).get("estimator", "?"))


if __name__ == "__main__":
    sys.exit(main())
