"""Sources: every format, exact positions, file order, and errors that name field, file and record."""

from __future__ import annotations

import gzip
import json
import shutil
from dataclasses import asdict

import datasets
import pytest

from xlstm_distill.errors import RunError, UserError
from xlstm_distill.recipe import Source
from xlstm_distill.sources import Position, SourceReader, identity

RECORDS = [{"text": f"document {n}", "other": n} for n in range(150)]


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def saved_as(form, folder):
    """Write RECORDS in a format; returns the path."""
    folder.mkdir(exist_ok=True)
    data = datasets.Dataset.from_list(RECORDS)
    path = folder / f"d.{form}"
    if form == "jsonl":
        write(path, RECORDS)
    elif form == "json":
        path.write_text(json.dumps(RECORDS))
    elif form == "jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in RECORDS).encode()))
    elif form == "parquet":
        data.to_parquet(path)
    elif form == "csv":
        data.to_csv(path, index=False)
    elif form == "txt":
        path.write_text("".join(r["text"] + "\n" for r in RECORDS))
    elif form == "saved":
        data.save_to_disk(path)
    elif form == "arrow":
        data.save_to_disk(folder / "whole")
        shutil.copy(next((folder / "whole").glob("*.arrow")), path)
    return str(path)


def chunks(source, start=None, seed=0):
    return list(SourceReader(source, "data.domains.x.sources[0]", seed).chunks(start or Position()))


def texts(found):
    return [document["text"] for _, chunk in found for document in chunk.documents]


FORMS = ["jsonl", "json", "jsonl.gz", "parquet", "csv", "txt", "arrow", "saved"]


@pytest.mark.parametrize("form", FORMS)
def test_each_format_is_read_and_goes_on_from_any_chunk(form, tmp_path):
    source = Source(path=saved_as(form, tmp_path / "data"))
    found = chunks(source)
    assert texts(found) == [r["text"] for r in RECORDS]
    assert all(set(document) == {"text"} for _, chunk in found for document in chunk.documents)
    assert len(found) >= 3
    for n, (position, _) in enumerate(found):
        again = Position(**json.loads(json.dumps(asdict(position))))
        assert texts(chunks(source, again)) == texts(found[n:])


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_files_are_read_in_a_seeded_order_and_positions_hold_across_them(form, tmp_path):
    for n in range(6):
        part = datasets.Dataset.from_list([{"text": f"{n}-{m}"} for m in range(70)])
        part.to_parquet(tmp_path / f"{n}.parquet") if form == "parquet" else part.to_json(tmp_path / f"{n}.jsonl")
    source = Source(path=str(tmp_path))
    found = chunks(source)
    whole = texts(found)
    assert sorted(whole) == sorted(f"{n}-{m}" for n in range(6) for m in range(70))
    assert [name.split("-")[0] for name in whole[::70]] != [str(n) for n in range(6)]
    assert texts(chunks(source, seed=1)) != whole
    for n, (position, _) in enumerate(found):
        assert texts(chunks(source, position)) == texts(found[n:])


def test_a_number_of_documents_is_not_exceeded(tmp_path):
    source = Source(path=saved_as("jsonl", tmp_path), documents=100)
    found = chunks(source)
    assert len(texts(found)) == 100
    assert texts(chunks(source, found[1][0])) == texts(found)[64:]


def test_a_generator_goes_on_from_any_chunk():
    source = Source(generator="stem", documents=150)
    found = chunks(source)
    documents = [document for _, chunk in found for document in chunk.documents]
    assert len(documents) == 150
    assert [d for _, c in chunks(source, found[1][0]) for d in c.documents] == documents[64:]
    assert [d for _, c in chunks(source, seed=1) for d in c.documents] != documents


class TestHub:
    """The hub is out of reach of tests: its one entry, datasets.load_dataset, is replaced."""

    @pytest.fixture
    def asked(self, monkeypatch):
        calls = []

        def load(path, name=None, **options):
            calls.append((path, name, options))
            if options["split"] not in ("train", "math"):
                raise ValueError(f"Bad split: {options['split']}. Available splits: ['train', 'math']")
            data = datasets.Dataset.from_list(RECORDS)
            return data.to_iterable_dataset(num_shards=5) if options["streaming"] else data

        monkeypatch.setattr(datasets, "load_dataset", load)
        return calls

    def test_all_settings_reach_the_hub_and_shards_are_shuffled(self, asked):
        source = Source(path="owner/name", name="part", split="math", revision="abc123")
        found = chunks(source)
        options = {"split": "math", "revision": "abc123", "streaming": True}
        assert asked == [("owner/name", "part", options)]
        assert sorted(texts(found)) == sorted(r["text"] for r in RECORDS)
        assert texts(found) != [r["text"] for r in RECORDS]
        for n, (position, _) in enumerate(found):
            assert texts(chunks(source, position)) == texts(found[n:])

    def test_data_can_be_downloaded_first(self, asked):
        found = chunks(Source(path="owner/name", streaming=False))
        assert asked[0][2]["streaming"] is False
        assert texts(found) == [r["text"] for r in RECORDS]

    def test_a_split_that_is_not_there_is_one_line(self, asked):
        with pytest.raises(UserError, match=r"sources\[0\].path: 'owner/name': .* Bad split: test. Available"):
            chunks(Source(path="owner/name", split="test"))

    def test_data_that_cannot_be_reached_is_one_line(self):
        with pytest.raises(UserError, match=r"sources\[0\].path: 'owner/name': .*cannot be read") as caught:
            chunks(Source(path="owner/name"))
        assert "\n" not in str(caught.value)

    def test_a_connection_that_breaks_says_where_and_that_it_can_go_on(self, monkeypatch):
        def stream():
            yield from RECORDS[:100]
            raise ConnectionError("reset by peer")

        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.IterableDataset.from_generator(stream))
        reader = SourceReader(Source(path="owner/name"), "f", 0).chunks(Position())
        next(reader)
        with pytest.raises(
            RunError, match=r"f: 'owner/name'.* stopped at record 65 or one soon after it: reset by peer"
        ):
            list(reader)


@pytest.mark.parametrize(
    ("records", "columns", "message"),
    [
        ([{"body": "x"}], {}, r"data.domains.x.sources\[0\]: .* none of the columns .*; it has body\."),
        (
            [{"text": "x"}],
            {"text": "body"},
            r"sources\[0\]: .*d.jsonl has no column 'body' \(record 1\); it has text\.",
        ),
        ([], {}, r"data.domains.x.sources\[0\]: .*, split 'train', has no documents"),
    ],
    ids=["no known column", "missing column", "empty"],
)
def test_bad_sources_are_one_line(records, columns, message, tmp_path):
    path = write(tmp_path / "d.jsonl", records)
    with pytest.raises(UserError, match=message) as caught:
        chunks(Source(path=path, **columns))
    assert "\n" not in str(caught.value)


def test_a_column_that_a_later_file_lacks_is_named(tmp_path):
    for n in range(4):
        write(tmp_path / f"{n}.jsonl", [{"text": "x"} if n else {"body": "x"}])
    with pytest.raises(UserError, match=r"0.jsonl has no column 'text' \(record 1\); it has body"):
        chunks(Source(path=str(tmp_path)))


def test_unreadable_files_name_themselves_and_the_place(tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\n' * 5 + '{"text": oops}\n' + '{"text": "a"}\n')
    with pytest.raises(UserError, match=r"sources\[0\].path: .*bad.jsonl: line 6 cannot be read: Expecting value"):
        chunks(Source(path=str(bad)))
    cut = tmp_path / "cut.parquet"
    datasets.Dataset.from_list(RECORDS).to_parquet(cut)
    cut.write_bytes(cut.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"cut.parquet: it cannot be read: .*[Pp]arquet") as caught:
        chunks(Source(path=str(cut)))
    assert "\n" not in str(caught.value)
    broken = tmp_path / "broken.jsonl.gz"
    broken.write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-20])
    with pytest.raises(UserError, match=r"broken.jsonl.gz: .*cannot be read"):
        chunks(Source(path=str(broken)))


def test_folders_must_hold_data_of_one_format(tmp_path):
    with pytest.raises(UserError, match=r"sources\[0\].path: .* holds no file that ends in \.json"):
        chunks(Source(path=str(tmp_path)))
    write(tmp_path / "a.jsonl", RECORDS)
    (tmp_path / "README.txt").write_text("read me\n")
    with pytest.raises(UserError, match=r"files of several formats \(1 text, 1 json\); name a folder with one"):
        chunks(Source(path=str(tmp_path)))


def test_splits_are_taken_from_saved_data_and_refused_elsewhere(tmp_path):
    splits = {"train": datasets.Dataset.from_list(RECORDS[:2]), "test": datasets.Dataset.from_list(RECORDS[2:5])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "both")
    assert texts(chunks(Source(path=str(tmp_path / "both"), split="test"))) == [r["text"] for r in RECORDS[2:5]]
    with pytest.raises(UserError, match=r"sources\[0\].split: .* has no split 'dev'; it has train, test"):
        chunks(Source(path=str(tmp_path / "both"), split="dev"))
    with pytest.raises(UserError, match=r"sources\[0\].split: 'test' does not apply, plain files have no splits"):
        chunks(Source(path=write(tmp_path / "d.jsonl", RECORDS), split="test"))


def test_a_local_source_is_identified_by_its_content(tmp_path, monkeypatch):
    path = write(tmp_path / "d.jsonl", [{"text": "one"}])
    before = identity(Source(path=path))
    (tmp_path / "elsewhere").mkdir()
    assert identity(Source(path=str(shutil.copy(path, tmp_path / "elsewhere")))) == before
    write(tmp_path / "d.jsonl", [{"text": "two"}])
    assert identity(Source(path=path)) != before
    monkeypatch.setattr("xlstm_distill.sources.WHOLE_HASH_BYTES", 1)
    large = identity(Source(path=path))
    write(tmp_path / "d.jsonl", [{"text": "three"}])
    assert identity(Source(path=path)) != large
