"""The map of layer ranges outlives a restart, and no state of the disk takes the relay down."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from pathlib import Path

import pytest

import relay.tables
from relay.app import Relay
from relay.registry import TOMBSTONE_S, Entry, entry_of
from relay.settings import RelaySettings
from relay.tables import ROWS_PER_TRANSACTION, SpanTable, written_behind
from shared.announcement import read_announcement
from shared.errors import SettingsError
from shared.identity import Identity
from shared.protocol import SignedRecord
from tests.relay.parties import announced, party, said, until

NOW = 1_800_000_000.0


def entry(identity: Identity, now: float = NOW, **changes: object) -> Entry:
    record = announced(identity, now, **changes)
    return entry_of(record, read_announcement(record, now), now)


def settings(path: Path) -> RelaySettings:
    return RelaySettings(port=0, stun=False, database=path / "relay.sqlite")


async def test_a_relay_that_restarts_still_knows_its_peers(tmp_path: Path) -> None:
    async with Relay(settings(tmp_path)) as relay, party(relay) as ann:
        record = announced(ann.identity)
        await ann.client.announce(record)
        await ann.client.lookup()
    async with Relay(settings(tmp_path)) as relay, party(relay) as bob:
        assert await bob.client.lookup() == [record]


async def test_a_withdrawn_announcement_stays_withdrawn_over_a_restart(tmp_path: Path) -> None:
    ann = Identity.generate()
    now = time.time()
    old = announced(ann, now, sequence=1)
    async with Relay(settings(tmp_path)) as relay, party(relay, ann) as one:
        await one.client.announce(old)
        await one.client.announce(announced(ann, now, sequence=2, state="left"))
        await one.client.lookup()
    async with Relay(settings(tmp_path)) as relay, party(relay, ann) as one:
        await one.client.announce(old)

        assert "not newer" in await asyncio.wait_for(one.heard.denied.get(), 5)
        assert await one.client.lookup() == []


async def test_expired_rows_are_not_found_after_a_restart(tmp_path: Path) -> None:
    async with written_behind(tmp_path / "map.sqlite", lambda: NOW) as (writer, _):
        writer.put(entry(Identity.generate()))
    later = RelaySettings(port=0, stun=False, database=tmp_path / "map.sqlite")
    async with Relay(later, clock=lambda: NOW + 45) as relay, party(relay) as bob:
        assert await bob.client.lookup() == []


async def test_a_clean_stop_loses_nothing(tmp_path: Path) -> None:
    entries = [entry(Identity.generate()) for _ in range(2 * ROWS_PER_TRANSACTION + 1)]
    async with written_behind(tmp_path / "map.sqlite", lambda: NOW) as (writer, _):
        for one in entries:
            writer.put(one)
    async with written_behind(tmp_path / "map.sqlite", lambda: NOW) as (_, loaded):
        assert {one.peer for one in loaded} == {one.peer for one in entries}
        assert {one.record for one in loaded} == {one.record for one in entries}


async def test_rows_are_written_while_the_relay_runs_and_say_who_serves_what(tmp_path: Path) -> None:
    async with Relay(settings(tmp_path)) as relay, party(relay) as ann:
        await ann.client.announce(announced(ann.identity, start=2, end=6))
        await until(lambda: relay.meeting.writer is not None and relay.meeting.writer.written == 1)
        with sqlite3.connect(tmp_path / "relay.sqlite") as other:
            rows = other.execute("select peer, model, start, end, state from spans").fetchall()

    assert rows == [(ann.id, "demo", 2, 6, "serving")]


async def test_of_many_renewals_only_the_last_is_written(tmp_path: Path) -> None:
    ann = Identity.generate()
    async with written_behind(tmp_path / "map.sqlite", lambda: NOW) as (writer, _):
        for sequence in range(100):
            writer.put(entry(ann, sequence=sequence))
        assert writer.waiting == 1
    async with written_behind(tmp_path / "map.sqlite", lambda: NOW) as (_, loaded):
        assert [said(one.record).sequence for one in loaded] == [99]


def test_a_row_never_gives_way_to_an_older_one(tmp_path: Path) -> None:
    ann = Identity.generate()
    table = SpanTable(tmp_path / "map.sqlite")
    table.open()
    table.write([entry(ann, sequence=2)])
    table.write([entry(ann, sequence=1)])

    assert [one.announcement.sequence for one in table.load(NOW)] == [2]
    table.forget(NOW + TOMBSTONE_S)
    assert table.load(0) == []
    table.close()


async def test_rows_that_somebody_changed_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "map.sqlite"
    honest = entry(Identity.generate())
    async with written_behind(path, lambda: NOW) as (writer, _):
        writer.put(honest)
        writer.put(entry(Identity.generate(), name="eve"))
    with sqlite3.connect(path) as other:
        other.execute("update spans set body = replace(body, '\"eve\"', '\"bob\"') where name = 'eve'")
    async with written_behind(path, lambda: NOW) as (_, loaded):
        assert [one.peer for one in loaded] == [honest.peer]


async def test_a_locked_database_delays_writing_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(relay.tables, "BUSY_TIMEOUT_S", 0.05)
    monkeypatch.setattr(relay.tables, "RETRY_EVERY_S", 0.05)
    async with Relay(settings(tmp_path)) as running, party(running) as ann:
        lock = sqlite3.connect(tmp_path / "relay.sqlite", isolation_level=None)
        lock.execute("begin exclusive")
        await ann.client.announce(announced(ann.identity))
        await until(lambda: "database is locked" in caplog.text)
        assert len(await ann.client.lookup()) == 1

        lock.execute("rollback")
        lock.close()
        await until(lambda: running.meeting.writer is not None and running.meeting.writer.written == 1)
    assert "cannot write 1 announcements" in caplog.text
    assert "INSERT" not in caplog.text  # the reason, not the statement


@pytest.mark.parametrize("content", [b"this is no database " * 100, b"SQLite format 3\0" + bytes(5000)])
async def test_a_file_that_is_no_database_stops_the_start_with_a_sentence(
    tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "relay.sqlite").write_bytes(content)
    with pytest.raises(SettingsError, match=r"cannot use .*relay\.sqlite as the relay's database"):
        async with Relay(settings(tmp_path)):
            pass


async def test_a_table_of_another_shape_stops_the_start_with_a_sentence(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "relay.sqlite") as other:
        other.execute("create table spans (peer text)")
    with pytest.raises(SettingsError, match="no such column"):
        async with Relay(settings(tmp_path)):
            pass


async def test_a_directory_that_cannot_be_made_stops_the_start_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="cannot use"):
        async with Relay(settings(tmp_path / "file" / "below")):
            pass


def test_a_record_with_any_text_comes_back_as_it_was(tmp_path: Path) -> None:
    ann = Identity.generate()
    table = SpanTable(tmp_path / "map.sqlite")
    table.open()
    table.write([entry(ann, name="'; drop table spans; --\N{ROSE}\0", model="a\nb")])

    (loaded,) = table.load(NOW)
    assert isinstance(loaded.record, SignedRecord)
    assert loaded.announcement.name == "'; drop table spans; --\N{ROSE}\0"
    table.close()
