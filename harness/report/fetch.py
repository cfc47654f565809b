"""Fetch the cells that ``tracker=wandb`` logged: from W&B, or from the files of its offline runs.

    fetch("wandb:ENTITY/PROJECT")     # from the server: results/wandb-ENTITY-PROJECT
    fetch("wandb:results/default")    # from the offline runs anywhere below a folder: no account, no network

Every run's newest artifact of the type ``ARTIFACT_TYPE`` holds the record files of one cell. Only files with these
names are taken, into a folder named as the cell; nothing else that an artifact says decides a path here.
"""

import base64
import hashlib
import json
import os
import re
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.report.load import ResultsError

ARTIFACT_TYPE = "cell"
RECORDS = ("config.yaml", "meta.json", "events.jsonl", "trials.jsonl", "decisions.jsonl", "summary.json")
NEEDED = ("config.yaml", "events.jsonl")  # a folder without them is no cell
NOTE = "wandb.json"  # in a fetched cell's folder: which artifact it is a copy of
AT_ONCE = 8  # cells being downloaded
INSTALL = "wandb is not installed: `pip install wandb`"
EXPECTED = "expected wandb:ENTITY/PROJECT, or wandb:FOLDER with offline runs in it"

_FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_BLOCK, _HEADER = 32768, 7


@dataclass(frozen=True)
class _Source:
    """The records of one cell: ``copy(name, path)`` writes the record file ``name`` to ``path``."""

    run: str
    cell: str
    digest: str
    logged: str  # when, ISO 8601
    names: tuple[str, ...]
    copy: Callable[[str, Path], None]


class _LeftOut(Exception):
    """A run that has no usable records; the message says why, after "run X: "."""


def fetch(source: str, target: Path | None = None, say: Callable[[str], None] = print) -> Path:
    """Copy the cells of ``source`` into ``target`` and return it: a folder for ``load_results``.

    What is there already is fetched again only if its artifact has changed, so an interrupted call can be repeated.
    A cell's folder appears complete or not at all.

    :param source: ``wandb:ENTITY/PROJECT``, or ``wandb:FOLDER`` to search a local folder, at any depth, for
        ``offline-run-*/run-*.wandb``; the folder is meant where both exist
    :param target: default ``results/wandb-ENTITY-PROJECT``, or ``results/wandb-<name of FOLDER>``
    :param say: called with one line for what is fetched and for each run that is left out
    :raises ResultsError: malformed source, no wandb package, no account, no network, no such project, no cells
    """
    place = source.removeprefix("wandb:")
    folder = Path(place).expanduser()
    if place and folder.is_dir():
        place, name, sources = f"the offline runs in {folder}", folder.resolve().name, _from_folder(folder, say)
    else:
        entity, project = split_project(place, f"{source} is neither a project nor a folder: {EXPECTED}")
        place, name, sources = f"W&B {entity}/{project}", f"{entity}-{project}", _from_server(entity, project, say)
    if not sources:
        raise ResultsError(f"{place}: no run has the records of a cell; were the cells run with tracker=wandb?")
    if target is None:
        target = Path("results") / f"wandb-{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}"
    try:
        fetched = _place_all(sources, target)
    except OSError as error:
        raise ResultsError(f"cannot copy to {target}: {error.strerror} ({error.filename})") from None
    say(f"{place}: {fetched} of {len(sources)} cells fetched into {target}, the others were there")
    return target


def split_project(text: str, otherwise: str) -> tuple[str, str]:
    """ENTITY and PROJECT of ``ENTITY/PROJECT``; raises ResultsError with the sentence ``otherwise``."""
    parts = text.split("/")
    if len(parts) != 2 or not all(re.fullmatch(r"[^\\#?%:~\s.][^\\#?%:]*", part) for part in parts):
        raise ResultsError(otherwise)
    return parts[0], parts[1]


# ---- cells on disk


def _place_all(sources: list[_Source], target: Path) -> int:
    """Place all cells; the number of those that were not there yet."""
    target.mkdir(parents=True, exist_ok=True)
    aside = target / ".fetching"  # one level further down than a cell, so never taken for one
    aside.mkdir(exist_ok=True)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            return sum(pool.map(lambda named: _place(named[1], target / named[0], aside), _folders(sources)))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _folders(sources: Iterable[_Source]) -> Iterator[tuple[str, _Source]]:
    """A folder name for each cell: its own. Of a cell that was run again the newest finished run has it, the others
    have the run's id behind it."""
    taken: set[str] = set()
    for source in sorted(sources, key=lambda source: ("summary.json" in source.names, source.logged), reverse=True):
        name = source.cell
        while name in taken:
            name += f".{source.run}"
        taken.add(name)
        yield name, source


def _place(source: _Source, folder: Path, aside: Path) -> bool:
    note = {"run": source.run, "digest": source.digest}
    if os.path.lexists(folder):
        known = _note(folder)
        if known is None:
            raise ResultsError(f"{folder} was not fetched from W&B, so it is left as it is: move it away and try again")
        if known == note and all((folder / name).is_file() for name in source.names):
            return False
    with tempfile.TemporaryDirectory(dir=aside) as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        for name in source.names:
            source.copy(name, new / name)
        (new / NOTE).write_text(json.dumps(note))
        if folder.exists():
            folder.rename(Path(temporary) / "old")
        new.rename(folder)
    return True


def _note(folder: Path) -> Any:
    """What the folder is a copy of; None if it is not a fetched cell."""
    if folder.is_symlink() or not folder.is_dir():
        return None
    try:
        return json.loads((folder / NOTE).read_bytes())
    except (OSError, ValueError):
        return None


def _source(
    run: str, metadata: Any, digest: str, logged: str, names: Iterable[str], copy: Callable[[str, Path], None]
) -> _Source:
    """Check what an artifact says about itself: a name becomes a folder's only if it can be nothing else."""
    cell = metadata.get("folder", run) if isinstance(metadata, dict) else run
    if not all(isinstance(word, str) and _FOLDER.fullmatch(word) for word in (cell, run)):
        raise _LeftOut(f"its cell's name {cell!r} cannot be a folder's")
    names = set(names)
    if missing := [name for name in NEEDED if name not in names]:
        raise _LeftOut(f"its artifact lacks {' and '.join(missing)}")
    return _Source(run, cell, digest, logged, tuple(name for name in RECORDS if name in names), copy)


# ---- from the server


def _from_server(entity: str, project: str, say: Callable[[str], None]) -> list[_Source]:
    api = open_api()
    with clear_errors(f"{entity}/{project}"):
        runs = list(api.runs(f"{entity}/{project}", per_page=200))
        say(f"W&B {entity}/{project}: {len(runs)} runs")
        with ThreadPoolExecutor(AT_ONCE) as pool:
            found = list(pool.map(_of_run, runs))
    return _usable(found, say)


def _of_run(run: Any) -> _Source | str:
    """The cell of a ``wandb.apis.public.Run``, or a sentence why it has none."""
    try:
        artifacts = [one for one in run.logged_artifacts() if one.type == ARTIFACT_TYPE and one.state == "COMMITTED"]
        if not artifacts:
            raise _LeftOut(f"no records (state: {run.state})")
        newest = max(artifacts, key=lambda artifact: artifact.created_at)  # ISO 8601, UTC
        entries = newest.manifest.entries
        if any(name in entries and entries[name].ref is not None for name in RECORDS):
            raise _LeftOut("its artifact refers to files elsewhere")  # they could be any of this machine's
        return _source(run.id, newest.metadata, newest.digest, newest.created_at, entries, _Download(newest))
    except _LeftOut as reason:
        return f"run {run.id}: {reason}"


@dataclass(frozen=True)
class _Download:
    """Downloads a file of a ``wandb.Artifact``."""

    artifact: Any

    def __call__(self, name: str, path: Path) -> None:
        with clear_errors(self.artifact.name):
            entry = self.artifact.get_entry(name)
            # through W&B's cache: its other way, skip_cache, mixes up files that are downloaded at the same time
            entry.download(root=str(path.parent))
        if path.is_symlink() or not path.is_file() or _digest(path, entry.extra) != entry.digest:
            raise ResultsError(f"W&B did not deliver {name} of {self.artifact.name} as it was logged")


def open_api() -> Any:
    """A ``wandb.Api``, without a prompt. Raises ResultsError where there is no package, account or network."""
    wandb = _wandb()
    with clear_errors("its API"):
        if not _logged_in(wandb):
            raise ResultsError("nobody is logged in at W&B (or WANDB_MODE is offline): run `wandb login` first")
        return wandb.Api()


def _logged_in(wandb: Any) -> bool:
    try:
        return wandb.login(prompt=False, verify=False)
    except TypeError:  # versions without the argument ask
        from harness.tracking.account import configured

        return configured()


def _wandb() -> Any:
    try:
        import wandb
    except ImportError:
        raise ResultsError(INSTALL) from None
    return wandb


@contextmanager
def clear_errors(what: str) -> Iterator[None]:
    """What goes wrong between this machine and W&B becomes a ResultsError of one sentence, and ends W&B's service."""
    wandb = _wandb()
    try:
        yield
    except ResultsError:
        raise
    except Exception as error:
        from harness.tracking.wandb import end_service

        end_service(wandb)
        theirs = type(error).__module__.split(".")[0] in ("wandb", "requests", "urllib3")
        if not theirs and not isinstance(error, OSError | ValueError):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        if "could not find project" in reason.lower():
            raise ResultsError(f"W&B has no project {what}, or this account may not see it") from None
        if isinstance(error, wandb.errors.AuthenticationError):
            raise ResultsError(f"W&B cannot be reached, or refuses the account: {reason}") from None
        raise ResultsError(f"W&B did not deliver {what}: {reason}; the same command goes on where it was") from None


# ---- from offline runs


def _from_folder(folder: Path, say: Callable[[str], None]) -> list[_Source]:
    files = sorted(folder.rglob("offline-run-*/run-*.wandb"))  # by time: it is in the folder's name
    if not files:
        raise ResultsError(f"{folder} has no offline runs of W&B (offline-run-*/run-*.wandb) in it; {EXPECTED}")
    say(f"{folder}: {len(files)} offline runs")
    newest: dict[tuple[str, str], tuple[float, _Source | str]] = {}
    for file in files:
        key, begun, found = _of_file(file)
        kept = newest.get(key)
        # a cell that was resumed has a file for each part: the last one with records counts
        if kept is None or (isinstance(found, _Source), begun) >= (isinstance(kept[1], _Source), kept[0]):
            newest[key] = begun, found
    found_all = [found for _, found in newest.values()]
    sources = _usable(found_all, say)
    if not sources:
        raise ResultsError(f"no offline run in {folder} has the records of a cell: {found_all[0]}")
    return sources


def _of_file(file: Path) -> tuple[tuple[str, str], float, _Source | str]:
    """(project, run id), start in unix seconds, and the cell of an offline run or a sentence why it has none."""
    run, artifact = None, None
    try:
        for record in read_offline_run(file):
            if record.HasField("run"):
                run = record.run
            elif record.HasField("artifact") and record.artifact.type == ARTIFACT_TYPE:
                artifact = record.artifact
        if run is None:
            raise _LeftOut("its file ends before it says which run it is")
        key, begun = (run.project, run.run_id), run.start_time.seconds + run.start_time.nanos / 1e9
        try:
            if artifact is None:
                raise _LeftOut("no records (it was interrupted, or is running)")
            entries = {entry.path: entry for entry in artifact.manifest.contents if entry.path in RECORDS}
            staged = _Staged(entries)
            staged.check()
            metadata, logged = json.loads(artifact.metadata or "{}"), run.start_time.ToJsonString()
            return key, begun, _source(run.run_id, metadata, artifact.digest, logged, entries, staged)
        except _LeftOut as reason:
            return key, begun, f"run {run.run_id}: {reason}"
    except (_LeftOut, OSError, ValueError) as reason:
        return ("", str(file)), 0.0, f"{file}: {reason}"


@dataclass(frozen=True)
class _Staged:
    """Copies files from where the offline run keeps them for a later ``wandb sync``."""

    entries: dict[str, Any]  # name -> wandb's ArtifactManifestEntry message

    def check(self) -> None:
        for name, entry in self.entries.items():
            if entry.ref or not entry.local_path:
                raise _LeftOut(f"its artifact refers to a {name} elsewhere")
            if not os.path.isfile(entry.local_path):
                raise _LeftOut(
                    f"its files for `wandb sync` are gone ({entry.local_path}): the results or W&B's data folder were "
                    "moved or removed, or are on another machine"
                )
            if not self._is(entry, Path(entry.local_path)):  # for example by the cell's next run, after a deletion
                raise _LeftOut(f"{entry.local_path} is not the {name} that was logged: it has been changed since")

    def __call__(self, name: str, path: Path) -> None:
        entry = self.entries[name]
        shutil.copyfile(entry.local_path, path)
        if not self._is(entry, path):
            raise ResultsError(f"{entry.local_path} was changed while it was copied: try again")

    @staticmethod
    def _is(entry: Any, path: Path) -> bool:
        return _digest(path, {item.key: item.value_json for item in entry.extra}) == entry.digest


def _digest(path: Path, extra: Mapping[str, str]) -> str:
    """The digest of a file as a manifest has it: base64 of its MD5, or of its XXH128 where the entry says so."""
    if "XXH128" in extra.get("alg", ""):
        from wandb.sdk.lib.hashutil import xxh128_file_b64

        return xxh128_file_b64(str(path))
    with path.open("rb") as file:
        return base64.b64encode(hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).digest()).decode()


def _usable(found: Iterable[_Source | str], say: Callable[[str], None]) -> list[_Source]:
    sources = []
    for one in found:
        if isinstance(one, _Source):
            sources.append(one)
        else:
            say(f"left out: {one}")
    return sources


def read_offline_run(file: Path) -> Iterator[Any]:
    """The records (``wandb.proto.wandb_internal_pb2.Record``) of a ``run-*.wandb`` file, in order.

    The file is a log of LevelDB's format (github.com/google/leveldb, doc/log_format.md: blocks of 32 KiB, records of
    one or more chunks with CRC32, length and type) that begins with ``:W&B``; wandb had a reader for it in Python
    until it moved that part into its Go program. A file that a killed run left unfinished ends with its last whole
    record. Raises ValueError where the file is of another form or damaged, OSError where it cannot be read.
    """
    try:
        from google.protobuf.message import DecodeError
        from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]
    except ImportError:
        raise ResultsError(INSTALL) from None
    for data in _chunks(file.read_bytes()):
        try:
            yield Record.FromString(data)
        except DecodeError:
            raise ValueError("holds a record of another form") from None


def _chunks(data: bytes) -> Iterator[bytes]:
    if data[:4] != b":W&B":
        raise ValueError("not a file of an offline run")
    whole, place = b"", _HEADER
    while place + _HEADER <= len(data):
        if (rest := _BLOCK - place % _BLOCK) < _HEADER:
            place += rest  # the end of a block, too short for a chunk
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, place)
        chunk = data[place + _HEADER : place + _HEADER + length]
        if len(chunk) < length or (kind == 0 and not any(data[place:])):
            return
        if zlib.crc32(bytes([kind]) + chunk) != checksum or kind not in (1, 2, 3, 4):
            raise ValueError(f"damaged at byte {place}")
        whole = chunk if kind in (1, 2) else whole + chunk  # 1 a whole record, 2 its first part, 3 a middle, 4 its last
        place += _HEADER + length
        if kind in (1, 4):
            yield whole
