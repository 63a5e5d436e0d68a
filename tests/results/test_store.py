"""store: whole files or none, broken files named and passed over, keys found by prefix."""

import errno
import json
import os
import stat

import pytest

from results import store


def record(key="0123456789ab", method="gptq", machine="epyc-2c", started="2026-11-22T10:00:00"):
    return {
        "key": key,
        "status": "ok",
        "started": started,
        "machine": {"name": machine},
        "job": {"model": "tiny-llama", "method": method},
        "values": {"perplexity": 12.5, "block_nll_nats": [1.0, 2.0]},
    }


def files(root):
    return sorted(str(file.relative_to(root)) for file in root.rglob("*") if file.is_file())


def test_path_content_and_round_trip(tmp_path):
    file = store.save(record(), tmp_path)
    assert files(tmp_path) == ["runs/epyc-2c/tiny-llama/gptq-0123456789ab.json"]
    text = file.read_text()
    assert text == json.dumps(record(), sort_keys=True, indent=1) + "\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert store.load(file) == record()
    assert store.load_all(tmp_path) == [record()]


def test_names_cannot_leave_the_folder(tmp_path):
    bad = record(method="../../x:y(z)", machine="..")
    bad["job"]["model"] = "org/../model"
    store.save(bad, tmp_path / "results")
    assert files(tmp_path) == [
        "results/runs/unnamed/org-..-model/x-y-z-0123456789ab.json",
    ]


def test_saving_again_replaces(tmp_path):
    store.save(record(), tmp_path)
    newer = record() | {"status": "failed"}
    store.save(newer, tmp_path)
    assert store.load_all(tmp_path) == [newer]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_record_and_nothing_else(tmp_path, monkeypatch, call):
    store.save(record(), tmp_path)
    before = files(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"):
        store.save(record() | {"status": "failed"}, tmp_path)
    assert files(tmp_path) == before
    assert store.load_all(tmp_path) == [record()]


def test_refuses_numbers_that_json_does_not_have(tmp_path):
    bad = record()
    bad["values"]["perplexity"] = float("nan")
    with pytest.raises(ValueError, match="JSON compliant"):
        store.save(bad, tmp_path)
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '"text"', "{}", '{"key": 1}', "\x00\xff", "[" * 100_000]
)
def test_a_broken_file_is_named_and_passed_over(tmp_path, caplog, text):
    good = store.save(record(), tmp_path)
    bad = good.with_name("rtn-ffff.json")
    bad.write_bytes(text.encode("latin-1"))
    assert store.load_all(tmp_path) == [record()]
    assert [str(bad) in message for message in caplog.messages] == [True]


def test_a_missing_file_is_no_record_and_no_warning(tmp_path, caplog):
    assert store.load(tmp_path / "none.json") is None
    assert store.load_all(tmp_path / "nowhere") == []
    assert not caplog.messages


def test_find_by_prefix(tmp_path):
    for key in ("aaaa11112222", "aabb11112222"):
        store.save(record(key), tmp_path)
    assert store.find(tmp_path, "aaa")["key"] == "aaaa11112222"
    assert store.find(tmp_path, "AAB")["key"] == "aabb11112222"
    with pytest.raises(store.UnknownKey, match="aaaa11112222, aabb11112222"):
        store.find(tmp_path, "aa")
    for unknown in ("c", ""):
        with pytest.raises(store.UnknownKey, match="no record"):
            store.find(tmp_path, unknown)


def test_one_key_on_two_machines_means_the_newest(tmp_path):
    store.save(record(machine="old", started="2026-11-20T10:00:00"), tmp_path)
    store.save(record(machine="new", started="2026-11-21T10:00:00"), tmp_path)
    assert store.find(tmp_path, "0123")["machine"]["name"] == "new"


def test_prepare_deletes_abandoned_temporary_files_only(tmp_path):
    file = store.save(record(), tmp_path)
    fresh = file.with_name(f".{file.name}.fresh.tmp")
    old = file.with_name(f".{file.name}.old.tmp")
    for temporary in (fresh, old):
        temporary.write_text("{")
    os.utime(old, (0, 0))
    store.prepare(tmp_path)
    assert not old.exists() and fresh.exists() and file.exists()


def test_prepare_refuses_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "results").write_text("")
    with pytest.raises(OSError):
        store.prepare(tmp_path / "results")
