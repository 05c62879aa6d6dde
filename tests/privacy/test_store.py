"""The store of samples: encrypted, bounded, deleted; and nobody else's folder."""

from __future__ import annotations

import base64
import os
import sqlite3
import time
from pathlib import Path

import numpy as np
import pytest
from inferpool.errors import ConfigError
from inferpool.privacy.keys import SampleKeys, add_key, read_keys
from inferpool.privacy.sample import Sample
from inferpool.privacy.store import FILE, FOLDER, Added, Choice, SampleStore, StoreLimits

OLD, NEW = os.urandom(32), os.urandom(32)
EVERY = Choice()
LIMITS = StoreLimits(1000, 10_000_000, 3600.0)


def sample(
    request_id: str, tenant: str = "shop", model: str = "m", age_s: float = 0.0, size: int = 1
) -> Sample:
    values = np.arange(float(size)).reshape(1, -1)
    return Sample(request_id, tenant, model, 1, time.time() - age_s, 1, {"x": values}, {})


def add(store: SampleStore, *samples: Sample) -> Added:
    return store.add([store.seal(each) for each in samples])


def ids(store: SampleStore, choice: Choice = EVERY) -> list[str | None]:
    found = store.read(choice, 0, 1000, 10**9)
    return [None if each.sample is None else each.sample.request_id for each in found]


def test_samples_are_found_and_deleted_by_what_they_are_of(tmp_path: Path) -> None:
    store = SampleStore(tmp_path, SampleKeys({"a": OLD}), LIMITS)
    add(store, sample("one"), sample("two", "bank"), sample("three", model="n"), sample("four", age_s=60))
    assert ids(store, Choice(request_id="two")) == ["two"]
    assert ids(store, Choice(tenant="shop", model="m")) == ["one", "four"]
    assert store.delete(Choice(tenant="bank")) == 1
    assert store.delete(Choice(before=time.time() - 30)) == 1
    assert store.delete(Choice(request_id="' OR 1=1 --")) == store.delete(Choice(request_id="../../one")) == 0
    assert ids(store) == ["one", "three"]
    assert store.totals().held == 2
    with pytest.raises(ValueError, match="which samples"):
        store.delete(Choice())


def test_a_deletion_holds_for_samples_that_wait_to_be_added(tmp_path: Path) -> None:
    """Other threads and processes have them; what is answered after the deletion is kept."""
    store, other = (SampleStore(tmp_path, SampleKeys({"a": OLD}), LIMITS) for _ in range(2))
    waiting = [
        store.seal(each) for each in (sample("one"), sample("two", "bank"), sample("three", model="n"))
    ]
    assert other.delete(Choice(request_id="one")) == other.delete(Choice(tenant="bank", model="n")) == 0
    totals, deleted = store.add(waiting)
    assert (totals.held, deleted) == (2, 1)
    assert ids(store) == ["two", "three"]
    add(store, sample("one"))
    assert ids(store, Choice(request_id="one")) == ["one"], "a later request of the same id"
    waiting = [store.seal(sample("four")), store.seal(sample("five", age_s=60))]
    assert other.delete(Choice(before=time.time() - 30)) == 0
    assert store.add(waiting).deleted == 1
    assert ids(store)[-1] == "four"
    with sqlite3.connect(tmp_path / FOLDER / FILE) as database:
        database.execute("UPDATE deletions SET before = before - 700")
    store.expire()
    with sqlite3.connect(tmp_path / FOLDER / FILE) as database:
        assert database.execute("SELECT count(*) FROM deletions").fetchone() == (0,)


def test_many_deletions_are_remembered_in_little_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without room, neither samples nor deletions would be taken; what may have been meant is not kept."""
    monkeypatch.setattr("inferpool.privacy.store.MOST_DELETIONS", 8)
    store = SampleStore(tmp_path, SampleKeys({"a": OLD}), LIMITS)
    oldest = [store.seal(sample(name)) for name in ("id-0", "id-29", "other")]
    younger = []
    for number in range(30):
        if number == 28:
            younger = [store.seal(sample(name)) for name in ("id-29", "younger")]
        store.delete(Choice(request_id=f"id-{number}"))
    with sqlite3.connect(tmp_path / FOLDER / FILE) as database:
        assert database.execute("SELECT count(*) FROM deletions").fetchone()[0] <= 8
    assert store.add(oldest).deleted == 3
    assert store.add(younger).deleted == 1
    assert ids(store) == ["younger"]
    with sqlite3.connect(tmp_path / FOLDER / FILE) as database:
        database.execute("UPDATE deletions SET before = before - 700")
    store.delete(Choice(tenant="bank"))
    with sqlite3.connect(tmp_path / FOLDER / FILE) as database:
        assert database.execute("SELECT count(*) FROM deletions").fetchone() == (1,), "no thread has to run"


def test_samples_are_added_to_the_file_that_has_the_name_now(tmp_path: Path) -> None:
    """An administrator may replace the database of a server that runs."""
    store = SampleStore(tmp_path, SampleKeys({"a": OLD}), LIMITS)
    add(store, sample("one"))
    for file in (tmp_path / FOLDER).iterdir():
        file.unlink()
    with pytest.raises(store.failures):
        add(store, sample("two"))
    SampleStore(tmp_path, SampleKeys({"a": OLD}), LIMITS)
    add(store, sample("three"))
    assert ids(store) == ["three"]


def test_the_files_show_nothing_of_a_sample_even_after_it_is_deleted(tmp_path: Path) -> None:
    store = SampleStore(tmp_path, SampleKeys({"a": OLD}), LIMITS)
    secret = sample("marked-id", "marked-tenant")
    add(store, secret)
    token = SampleKeys({"a": OLD}).token("id", "marked-id")

    def content() -> bytes:
        return b"".join(file.read_bytes() for file in (tmp_path / FOLDER).iterdir())

    assert token in content()
    assert b"marked" not in content()
    store.delete(Choice(request_id="marked-id"))
    assert token not in content()
    token = SampleKeys({"a": OLD}).token("id", "marked-other")
    add(store, sample("marked-other", age_s=2 * LIMITS.age_s))
    assert token in content()  # the connection that adds is open, and keeps a log
    store.expire()
    assert token not in content()
    store.close()
    assert [file.name for file in (tmp_path / FOLDER).iterdir()] == [FILE]
    add(store, sample("later"))
    assert ids(store) == ["later"]
    assert (tmp_path / FOLDER).stat().st_mode & 0o077 == 0


def test_a_key_is_rotated_and_samples_without_their_key_cannot_be_read(tmp_path: Path) -> None:
    add(SampleStore(tmp_path, SampleKeys({"old": OLD}), LIMITS), sample("before"))
    both = SampleStore(tmp_path, SampleKeys({"new": NEW, "old": OLD}), LIMITS)
    add(both, sample("after"))
    assert ids(both) == ["before", "after"]
    assert ids(both, Choice(request_id="before")) == ["before"]
    assert ids(SampleStore(tmp_path, SampleKeys({"new": NEW}), LIMITS)) == [None, "after"]
    assert ids(SampleStore(tmp_path, SampleKeys({"new": OLD}), LIMITS)) == [None, None]  # a wrong key


def test_a_changed_sample_is_not_taken_for_a_sample(tmp_path: Path) -> None:
    store = SampleStore(tmp_path, SampleKeys({"a": OLD}), LIMITS)
    add(store, sample("one"), sample("two"))
    with sqlite3.connect(tmp_path / FOLDER / "samples.sqlite3") as database:
        database.execute("UPDATE samples SET model = 'other' WHERE number = 1")
    assert ids(store) == [None, "two"]


def test_the_oldest_samples_make_room(tmp_path: Path) -> None:
    few = SampleStore(tmp_path / "few", SampleKeys({"a": OLD}), StoreLimits(3, 10**7, 3600.0))
    add(few, *(sample(str(number)) for number in range(5)))
    assert ids(few) == ["2", "3", "4"]
    small = SampleStore(tmp_path / "small", SampleKeys({"a": OLD}), StoreLimits(1000, 70_000, 3600.0))
    for number in range(20):
        totals = add(small, sample(str(number), size=1000)).totals
        assert totals.nbytes <= 70_000
    assert ids(small)[-1] == "19"
    assert 4 <= totals.held < 20
    aged = SampleStore(tmp_path / "aged", SampleKeys({"a": OLD}), StoreLimits(1000, 10**7, 100.0))
    add(aged, sample("old", age_s=200), sample("new"))
    aged.expire()
    assert ids(aged) == ["new"]


def test_two_processes_write_to_one_store(tmp_path: Path) -> None:
    stores = [SampleStore(tmp_path, SampleKeys({"a": OLD}), LIMITS) for _ in range(2)]
    for number in range(4):
        add(stores[number % 2], sample(str(number)))
    assert ids(stores[0]) == ids(stores[1]) == ["0", "1", "2", "3"]


def test_a_folder_that_others_may_enter_or_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / FOLDER).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "open" / FOLDER).mkdir(parents=True)
    (tmp_path / "open" / FOLDER).chmod(0o777)
    for name in ("linked", "open"):
        with pytest.raises(ConfigError, match="no other user may enter"):
            SampleStore(tmp_path / name, SampleKeys({"a": OLD}), LIMITS)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="samples_dir"):
        SampleStore(tmp_path / "file", SampleKeys({"a": OLD}), LIMITS)


@pytest.mark.parametrize(
    "line", ["a", "a xyz", f"../a {'A' * 43}=", f"a {base64.b64encode(b'short').decode()}"]
)
def test_a_wrong_key_is_refused_without_being_shown(line: str, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# keys\n{line}\n")
    with pytest.raises(ConfigError, match="line 2 is no key") as error:
        read_keys(file)
    assert line.split()[-1] not in error.value.detail.replace("is no key", "") or line == "a"


def test_a_new_key_comes_to_the_top_of_a_file_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    add_key(file, "one")
    add_key(file, "two")
    keys = read_keys(file)
    assert keys is not None
    assert (keys.current, keys.names) == ("two", ["two", "one"])
    assert file.stat().st_mode & 0o077 == 0
    by_variable = read_keys(None, file.read_text().strip().replace("\n", ","))
    assert by_variable is not None
    assert by_variable.names == keys.names
    with pytest.raises(ConfigError, match="already"):
        add_key(file, "one")
    assert read_keys(None, None) is None
