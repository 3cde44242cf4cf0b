"""The map of layer ranges in SQLite, so that a relay that restarts still knows its peers.

Presence is served from memory (registry.py); rows are written behind it in batches, on a thread of their own.
One transaction per announcement would cost a hundred times as much as one per batch.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Engine, create_engine, delete, event, select
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from relay.registry import Entry
from shared.announcement import read_announcement
from shared.errors import ProtocolError, SettingsError
from shared.identity import PeerId
from shared.protocol import Announcement, SignedRecord, decode

log = logging.getLogger(__name__)

FLUSH_EVERY_S = 0.25
ROWS_PER_TRANSACTION = 200
RETRY_EVERY_S = 5.0
# How long one write waits for another process that holds the database; only the writing thread waits.
BUSY_TIMEOUT_S = 2.0


Result = TypeVar("Result")


class Base(DeclarativeBase):
    pass


class SpanRow(Base):
    """The newest announcement of one peer: its run of layers [start, end), and the record that says so."""

    __tablename__ = "spans"

    peer: Mapped[str] = mapped_column(primary_key=True)
    sequence: Mapped[int]
    name: Mapped[str]
    model: Mapped[str] = mapped_column(index=True)
    artefact: Mapped[str] = mapped_column(index=True)
    layer_count: Mapped[int]
    start: Mapped[int]
    end: Mapped[int]
    state: Mapped[str]
    dtype: Mapped[str]
    device: Mapped[str]
    issued_at: Mapped[float]
    expires_at: Mapped[float]
    keep_until: Mapped[float] = mapped_column(index=True)
    """Until then it outlives its own expiry, as a tombstone against older records."""
    body: Mapped[str]
    signature: Mapped[str]


class SpanTable:
    """The table, used from one thread only. Every method waits for the disk: call them off the event loop."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._engine: Engine | None = None

    def open(self) -> None:
        """Raises SettingsError when the file cannot serve as our database."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._engine = create_engine(
                f"sqlite:///{self.path}",
                connect_args={"timeout": BUSY_TIMEOUT_S, "check_same_thread": False},
            )
            event.listen(self._engine, "connect", _use_write_ahead_log)
            Base.metadata.create_all(self._engine)
            self.load(float("inf"))
        except (SQLAlchemyError, OSError) as error:
            raise SettingsError(f"cannot use {self.path} as the relay's database: {_reason(error)}") from None

    def load(self, now: float) -> list[Entry]:
        """Every row that must not be forgotten yet."""
        with Session(self._opened()) as session:
            rows = session.scalars(select(SpanRow).where(SpanRow.keep_until > now))
            return [entry for row in rows if (entry := _entry(row, now)) is not None]

    def write(self, entries: Sequence[Entry]) -> None:
        """Insert or replace rows in one transaction; a row never gives way to an older sequence."""
        statement = insert(SpanRow)
        columns = {column.name: statement.excluded[column.name] for column in SpanRow.__table__.columns}
        upsert = statement.on_conflict_do_update(
            index_elements=[SpanRow.peer],
            set_=columns,
            where=SpanRow.sequence <= statement.excluded.sequence,
        )
        with self._opened().begin() as connection:
            connection.execute(upsert, [_values(entry) for entry in entries])

    def forget(self, now: float) -> None:
        """Delete the rows that have served their time."""
        with self._opened().begin() as connection:
            connection.execute(delete(SpanRow).where(SpanRow.keep_until <= now))

    def close(self) -> None:
        if self._engine is not None:
            self._engine.dispose()

    def _opened(self) -> Engine:
        assert self._engine is not None, "SpanTable.open comes first"
        return self._engine


class WriteBehind:
    """Writes entries soon after they were put, many at a time.

    Holds at most one entry per peer, so it is bounded by the registry however long the disk is away.
    """

    def __init__(self, table: SpanTable, clock: Callable[[], float]) -> None:
        self._table = table
        self._clock = clock
        self._pending: dict[PeerId, Entry] = {}
        self._filled = asyncio.Event()
        # One thread: SQLite has one writer anyway, and the event loop never waits for the disk.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="relay-database")
        self.written = 0

    def put(self, entry: Entry) -> None:
        # The newest goes last, and replaces one that has not been written yet.
        self._pending.pop(entry.peer, None)
        self._pending[entry.peer] = entry
        self._filled.set()

    @property
    def waiting(self) -> int:
        return len(self._pending)

    async def start(self) -> list[Entry]:
        """Open the database; returns what an earlier run left in it."""
        try:
            await self._call(self._table.open)
            return await self._call(self._table.load, self._clock())
        except BaseException:
            self._thread.shutdown()
            raise

    async def run(self) -> None:
        """Write until cancelled."""
        while True:
            await self._filled.wait()
            await asyncio.sleep(FLUSH_EVERY_S)
            self._filled.clear()
            if not await self._flush():
                await asyncio.sleep(RETRY_EVERY_S)
                self._filled.set()

    async def forget(self, now: float) -> None:
        """Delete old rows. What fails now is tried again at the next call."""
        try:
            await self._call(self._table.forget, now)
        except SQLAlchemyError as error:
            log.warning("cannot tidy %s: %s", self._table.path, _reason(error))

    async def close(self) -> None:
        """Write what is left, then close. Nothing is lost unless the disk itself refuses."""
        if not await self._flush():
            log.error("%d announcements could not be saved in %s", len(self._pending), self._table.path)
        await self._call(self._table.close)
        self._thread.shutdown()

    async def _flush(self) -> bool:
        while self._pending:
            batch = list(self._pending.values())[:ROWS_PER_TRANSACTION]
            try:
                await self._call(self._table.write, batch)
            except SQLAlchemyError as error:
                log.error(
                    "cannot write %d announcements to %s, will try again: %s",
                    len(self._pending),
                    self._table.path,
                    _reason(error),
                )
                return False
            self.written += len(batch)
            for entry in batch:
                # A newer one may have come while the thread was writing.
                if self._pending.get(entry.peer) is entry:
                    del self._pending[entry.peer]
        return True

    async def _call(self, function: Callable[..., Result], *args: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)


@asynccontextmanager
async def written_behind(
    path: Path, clock: Callable[[], float]
) -> AsyncIterator[tuple[WriteBehind, list[Entry]]]:
    """Keep the map in `path` until the context ends; gives the writer and what was there before."""
    writer = WriteBehind(SpanTable(path), clock)
    entries = await writer.start()
    writing = asyncio.create_task(writer.run(), name="relay write-behind")
    try:
        yield writer, entries
    finally:
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        await writer.close()


def _values(entry: Entry) -> dict[str, object]:
    announcement = entry.announcement
    return {
        "peer": announcement.peer,
        "sequence": announcement.sequence,
        "name": announcement.name,
        "model": announcement.model,
        "artefact": announcement.artefact,
        "layer_count": announcement.layer_count,
        "start": announcement.start,
        "end": announcement.end,
        "state": announcement.state,
        "dtype": announcement.dtype,
        "device": announcement.device,
        "issued_at": announcement.issued_at,
        "expires_at": announcement.expires_at,
        "keep_until": entry.keep_until,
        "body": entry.record.body,
        "signature": entry.record.signature,
    }


def _entry(row: SpanRow, now: float) -> Entry | None:
    """A row as an entry; None when it is not what a relay would have written."""
    record = SignedRecord(body=row.body, signature=row.signature)
    try:
        # Signatures are checked again: others may have touched the file. One that has expired meanwhile is
        # only a tombstone, and is believed for its sequence number.
        expired = row.expires_at <= now
        announcement: Announcement = (
            decode(record.body, Announcement) if expired else read_announcement(record, now)
        )
    except ProtocolError as error:
        log.warning("a row of the database is passed over: %s", error)
        return None
    return Entry(announcement, record, row.keep_until)


def _use_write_ahead_log(connection: Any, _record: object) -> None:  # noqa: ANN401 - SQLAlchemy gives a raw connection
    # With the log, readers never wait for us; NORMAL may lose the last moments at a power cut, which
    # the next renewals bring back within seconds.
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


def _reason(error: Exception) -> str:
    """The database's own words, without the statement that met them."""
    return str(getattr(error, "orig", None) or error)
