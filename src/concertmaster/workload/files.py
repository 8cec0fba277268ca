"""Bytes to tables: Parquet and JSON Lines, either of them compressed with zstd.

A file that ends in half a row is read up to the break, and the table says so.
"""

import importlib
from collections.abc import Collection
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

from concertmaster.core.errors import InputError
from concertmaster.workload.tables import Table

_PARQUET_MAGIC = b"PAR1"
_DECODER = msgspec.json.Decoder(dict[str, object])


def read_table(path: Path, columns: Collection[str]) -> Table:
    """Read those of ``columns`` that the file has."""
    _check_is_file(path)
    if _is_parquet(path):
        return _read_parquet(path, columns)
    return _read_lines(path, columns)


def extra(module: str, path: Path) -> ModuleType:
    """Import an optional package, or say which command installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        package = module.partition(".")[0]
        problem = f"expected the package {package} to read this file, found it not installed"
        raise InputError(str(path), "", problem, 'pip install "concertmaster[data]"') from None


def _check_is_file(path: Path) -> None:
    if path.is_file():
        return
    found = "a folder" if path.is_dir() else "nothing there"
    nearby = sorted(
        entry.name
        for entry in (path.parent.iterdir() if path.parent.is_dir() else ())
        if ".jsonl" in entry.suffixes or ".parquet" in entry.suffixes
    )
    remedy = f"in that folder: {', '.join(nearby)}" if nearby else "check the path"
    raise InputError(str(path), "", f"expected a workload file, found {found}", remedy)


def _is_parquet(path: Path) -> bool:
    """Judge by the name if it tells, else by the first bytes."""
    names = {suffix.lower() for suffix in path.suffixes}
    if names & {".jsonl", ".ndjson"}:
        return False
    if ".parquet" in names:
        return True
    with path.open("rb") as file:
        head = file.read(4)
    if head == _PARQUET_MAGIC:
        return True
    if head[:1] == b"{":
        return False
    problem = f"expected Parquet or JSON Lines (.zst allowed), found bytes {head!r}"
    raise InputError(str(path), "", problem, "name it .parquet, .jsonl or .jsonl.zst")


def _read_parquet(path: Path, columns: Collection[str]) -> Table:
    parquet = extra("pyarrow.parquet", path)
    arrow = extra("pyarrow", path)
    try:
        with parquet.ParquetFile(_parquet_source(path, arrow)) as file:
            names = [name for name in file.schema_arrow.names if name in columns]
            found: Any = file.read(columns=names)
    except (arrow.ArrowException, OSError) as error:
        problem = f"expected a whole Parquet file, found: {str(error).splitlines()[0]}"
        remedy = "Parquet cannot be read up to a break: write the file again, or as .jsonl"
        raise InputError(str(path), "", problem, remedy) from None
    if not found.num_rows:
        raise _empty(path)
    cells = {name: found[name].to_pylist() for name in names}
    return Table(file=str(path), columns=cells, numbers=range(found.num_rows))


def _parquet_source(path: Path, arrow: ModuleType) -> object:
    if path.suffix != ".zst":
        return str(path)
    content, broken = _unzip(path)
    if broken:
        raise OSError(broken)
    return arrow.BufferReader(content)


def _read_lines(path: Path, columns: Collection[str]) -> Table:
    content, broken = _unzip(path) if path.suffix == ".zst" else (path.read_bytes(), "")
    lines = content.split(b"\n")
    last = max((at for at, line in enumerate(lines) if line.strip()), default=-1)
    rows: list[dict[str, object]] = []
    numbers: list[int] = []
    for at in range(last + 1):
        if not lines[at].strip():
            continue
        try:
            rows.append(_DECODER.decode(lines[at]))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            if at < last or not rows:
                raise _bad_line(path, at + 1, error) from None
            broken = f"line {at + 1} is half a line"
        else:
            numbers.append(at + 1)
    if not rows:
        raise _empty(path)
    return _line_table(path, columns, rows, numbers, broken)


def _bad_line(path: Path, number: int, error: Exception) -> InputError:
    problem = f"expected a JSON object, found: {error}"
    return InputError(str(path), f"line {number}", problem, "mend or remove this line")


def _empty(path: Path) -> InputError:
    return InputError(str(path), "", "expected at least one row, found none", "check the file")


def _line_table(
    path: Path,
    columns: Collection[str],
    rows: list[dict[str, object]],
    numbers: list[int],
    broken: str,
) -> Table:
    names = dict.fromkeys(name for row in rows for name in row)
    notes = []
    if broken:
        notes.append(f"{path}: broken off: {broken}; the {len(rows):,} rows before it are used")
    if unused := sorted(name for name in names if name not in columns):
        notes.append(f"{path}: columns not used: {', '.join(unused)}")
    return Table(
        file=str(path),
        columns={name: [row.get(name) for row in rows] for name in names if name in columns},
        numbers=numbers,
        unit="line",
        notes=tuple(notes),
        broken=bool(broken),
    )


def _unzip(path: Path) -> tuple[bytes, str]:
    """Decompress all frames; the text says what broke, "" if nothing did."""
    zstandard = extra("zstandard", path)
    rest, parts = path.read_bytes(), []
    while rest:
        frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            for start in range(0, len(rest), 1 << 16):
                parts.append(frame.decompress(rest[start : start + (1 << 16)]))
                if frame.eof:
                    rest = frame.unused_data + rest[start + (1 << 16) :]
                    break
            else:
                return b"".join(parts), "the zstd frame has no end"
        except zstandard.ZstdError as error:
            return b"".join(parts), f"zstd: {error}"
    return b"".join(parts), ""
