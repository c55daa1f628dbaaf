"""Sources: formats, exact positions, file order, and errors that name field, file and record."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import zstandard

from xlstm_distill import embedded
from xlstm_distill.data.files import readers
from xlstm_distill.data.files.order import Position
from xlstm_distill.data.sources import SourceReader, generators_hash, identity
from xlstm_distill.errors import RunError, UserError
from xlstm_distill.recipe import Source

RECORDS = [{"text": f"document {n}", "other": n} for n in range(150)]


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


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
    elif form == "jsonl.zst":
        path.write_bytes(zstandard.compress(lines(*RECORDS)))
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


FORMS = ["jsonl", "json", "jsonl.gz", "jsonl.zst", "parquet", "csv", "txt", "arrow", "saved"]


@pytest.mark.parametrize("form", FORMS)
def test_each_format_is_read_and_goes_on_from_any_chunk(form, tmp_path):
    source = Source(path=saved_as(form, tmp_path / "data"))
    found = chunks(source)
    assert texts(found) == [r["text"] for r in RECORDS]
    assert all(set(document) == {"text"} for _, chunk in found for document in chunk.documents)
    assert len(found) >= 3
    for n, (position, _) in enumerate(found):
        assert texts(chunks(source, restored(position))) == texts(found[n:])


def restored(position):
    """A position as a checkpoint holds it."""
    return Position.restored(json.loads(json.dumps(asdict(position))))


@pytest.mark.parametrize("form", ["parquet", "jsonl", "csv"])
def test_files_are_read_in_a_seeded_order_and_positions_hold_across_them(form, tmp_path):
    for n in range(20):
        part = datasets.Dataset.from_list([{"text": f"{n}-{m}"} for m in range(70)])
        method = {"parquet": "to_parquet", "jsonl": "to_json", "csv": "to_csv"}[form]
        getattr(part, method)(tmp_path / f"{n}.{form}")
    source = Source(path=str(tmp_path))
    found = chunks(source)
    whole = texts(found)
    everything = [f"{n}-{m}" for n in range(20) for m in range(70)]
    assert sorted(whole) == sorted(everything)
    order = list(dict.fromkeys(name.split("-")[0] for name in whole))
    assert order != [str(n) for n in range(20)]
    assert texts(chunks(source, seed=1)) != whole
    # Within a file, the order is the file's.
    for n in range(20):
        own = [name for name in whole if name.split("-")[0] == str(n)]
        assert own == [f"{n}-{m}" for m in range(70)]
    for n in range(0, len(found), 7):
        assert texts(chunks(source, restored(found[n][0]))) == texts(found[n:])


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz"])
def test_any_part_of_a_source_has_its_files_in_their_shares(form, tmp_path):
    """60 small files and 6 large ones, which hold 80 % of the text."""
    random = np.random.default_rng(0)
    digits = ["".join(row) for row in random.integers(0, 10, (500, 400)).astype(str)]
    for n in range(66):
        count, kind = (75, "small") if n < 60 else (3000, "large")
        content = lines(*({"text": f"{kind} {n} {m} {digits[m % 500]}"} for m in range(count)))
        # The large ones lie among the small.
        path = tmp_path / f"{n * 7 % 66:02}.{form}"
        path.write_bytes(gzip.compress(content, 1) if form == "jsonl.gz" else content)
    whole = texts(chunks(Source(path=str(tmp_path))))
    assert len(whole) == len(set(whole)) == 22_500
    for part in (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 0.9):
        read = whole[: int(part * len(whole))]
        large = sum(text.startswith("large") for text in read) / len(read)
        assert abs(large - 0.8) < 0.03, f"{part}: {large:.3f}"
    # The first part has come from everywhere.
    assert len({text.split()[1] for text in whole[:3375]}) == 66


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
    """Tests cannot reach the hub: load_dataset and load_dataset_builder are replaced."""

    @pytest.fixture
    def asked(self, monkeypatch):
        calls = []

        def load(path, name=None, **options):
            calls.append((path, name, options))
            return datasets.Dataset.from_list(RECORDS)

        def stream(split):
            calls[-1][2]["split"] = split
            if split not in ("train", "math"):
                raise ValueError(f"Bad split: {split}. Available splits: ['train', 'math']")
            return datasets.Dataset.from_list(RECORDS).to_iterable_dataset(num_shards=5)

        def builder(path, name=None, **options):
            calls.append((path, name, options))
            return SimpleNamespace(
                config=SimpleNamespace(data_files=None), as_streaming_dataset=stream
            )

        monkeypatch.setattr(datasets, "load_dataset", load)
        monkeypatch.setattr(datasets, "load_dataset_builder", builder)
        return calls

    @pytest.fixture
    def served(self, monkeypatch, tmp_path):
        """Serve files of a format as those of a hub data set, under two splits."""
        real = datasets.load_dataset_builder

        def serve(form, *contents, **config):
            files = [tmp_path / f"{n}.{form}" for n in range(len(contents))]
            for file, content in zip(files, contents, strict=True):
                file.write_bytes(content)
            splits = {"train": [str(file) for file in files], "test": str(files[0])}
            kind = "csv" if "csv" in form else "json"
            built = real(kind, data_files=splits, cache_dir=str(tmp_path / "cache"), **config)
            monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: built)
            return Source(path="owner/name")

        return serve

    def test_all_settings_reach_the_hub_and_shards_are_shuffled(self, asked):
        source = Source(path="owner/name", name="part", split="math", revision="abc123")
        found = chunks(source)
        options = {"split": "math", "revision": "abc123"}
        assert asked == [("owner/name", "part", options)]
        assert sorted(texts(found)) == sorted(r["text"] for r in RECORDS)
        assert texts(found) != [r["text"] for r in RECORDS]
        for n, (position, _) in enumerate(found):
            assert texts(chunks(source, position)) == texts(found[n:])

    def test_data_can_be_downloaded_first(self, asked):
        found = chunks(Source(path="owner/name", streaming=False))
        assert asked == [("owner/name", None, {"split": "train", "revision": None})]
        assert texts(found) == [r["text"] for r in RECORDS]

    def test_a_split_that_is_not_there_is_one_line(self, asked):
        with pytest.raises(
            UserError, match=r"sources\[0\].path: 'owner/name': .* Bad split: test. Available"
        ):
            chunks(Source(path="owner/name", split="test"))

    def test_data_that_cannot_be_reached_is_one_line(self):
        with pytest.raises(
            UserError, match=r"sources\[0\].path: 'owner/name': .*cannot be read"
        ) as caught:
            chunks(Source(path="owner/name"))
        assert "\n" not in str(caught.value)

    def test_a_connection_that_breaks_says_where_and_that_it_can_go_on(self, monkeypatch):
        def stream():
            yield from RECORDS[:100]
            raise ConnectionError("reset by peer")

        data = datasets.IterableDataset.from_generator(stream)
        builder = SimpleNamespace(
            config=SimpleNamespace(data_files=None), as_streaming_dataset=lambda split: data
        )
        monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: builder)
        reader = SourceReader(Source(path="owner/name"), "f", 0).chunks(Position())
        next(reader)
        with pytest.raises(
            RunError,
            match=r"f: 'owner/name'.* stopped at record 65 or one soon after it: reset by peer",
        ):
            list(reader)

    @pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "jsonl.zst"])
    def test_json_is_read_file_by_file_without_a_schema(self, form, served):
        later = lines(*RECORDS[100:], {"text": "last", "other": {"a": 1}, "more": [1]})
        contents = [lines(*RECORDS[:100]), later]
        packed = {"jsonl.gz": gzip.compress, "jsonl.zst": zstandard.compress}.get(form, bytes)
        source = served(form, *map(packed, contents))
        found = chunks(source)
        assert sorted(texts(found)) == sorted([r["text"] for r in RECORDS] + ["last"])
        for n, (position, _) in enumerate(found):
            assert texts(chunks(source, position)) == texts(found[n:])
        assert texts(chunks(source.model_copy(update={"split": "test"}))) == [
            r["text"] for r in RECORDS[:100]
        ]
        with pytest.raises(
            UserError, match=r"Bad split: dev. Available splits: \['train', 'test'\]"
        ):
            chunks(source.model_copy(update={"split": "dev"}))

    def test_a_bad_line_of_hub_data_is_named_and_is_no_broken_connection(self, served):
        source = served("jsonl", lines(*RECORDS) + b'{"text": "cut')
        with pytest.raises(
            UserError, match=r"'owner/name', .*0.jsonl: line 151 cannot be read: Unterminated"
        ):
            chunks(source)

    def test_csv_values_are_texts(self, served):
        source = served("csv", b"prompt,response\n1+1,2\nwhich,NA\n")
        assert [d for _, c in chunks(source) for d in c.documents] == [
            {"prompt": "1+1", "response": "2"}, {"prompt": "which", "response": "NA"},
        ]  # fmt: skip

    def test_settings_of_the_data_set_for_its_files_hold(self, served):
        source = served("csv", b"prompt;response\nask;tell\n", sep=";")
        assert chunks(source)[0][1].documents == [{"prompt": "ask", "response": "tell"}]


@pytest.mark.parametrize(
    ("records", "columns", "message"),
    [
        (
            [{"body": "x"}],
            {},
            r"data.domains.x.sources\[0\]: .* none of the columns .*; it has body\.",
        ),
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
    with pytest.raises(
        UserError, match=r"sources\[0\].path: .*bad.jsonl: line 6 cannot be read: Expecting value"
    ):
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
    with pytest.raises(
        UserError, match=r"files of several formats \(1 text, 1 json\); name a folder with one"
    ):
        chunks(Source(path=str(tmp_path)))


def test_splits_are_taken_from_saved_data_and_refused_elsewhere(tmp_path):
    splits = {
        "train": datasets.Dataset.from_list(RECORDS[:2]),
        "test": datasets.Dataset.from_list(RECORDS[2:5]),
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "both")
    assert texts(chunks(Source(path=str(tmp_path / "both"), split="test"))) == [
        r["text"] for r in RECORDS[2:5]
    ]
    with pytest.raises(
        UserError, match=r"sources\[0\].split: .* has no split 'dev'; it has train, test"
    ):
        chunks(Source(path=str(tmp_path / "both"), split="dev"))
    with pytest.raises(
        UserError, match=r"sources\[0\].split: 'test' does not apply, plain files have no splits"
    ):
        chunks(Source(path=write(tmp_path / "d.jsonl", RECORDS), split="test"))


def test_a_local_source_is_identified_by_its_content(tmp_path):
    path = write(tmp_path / "d.jsonl", [{"text": "one"}])
    before = identity(Source(path=path))
    (tmp_path / "elsewhere").mkdir()
    assert identity(Source(path=str(shutil.copy(path, tmp_path / "elsewhere")))) == before
    write(tmp_path / "d.jsonl", [{"text": "two"}])
    assert identity(Source(path=path)) != before


@pytest.mark.parametrize(
    "error", [TypeError("Couldn't cast"), AttributeError("no"), KeyError("k"), Exception("its own")]
)
def test_whatever_a_reader_raises_names_the_file_and_the_place(error, tmp_path, monkeypatch):
    def batches(state):
        yield {"text": ["a"] * 64}, {}
        raise error

    monkeypatch.setattr(readers, "dataset_reader", lambda load: batches)
    with pytest.raises(
        UserError, match=r"d.parquet: record 65 or one soon after it cannot be read: "
    ) as caught:
        chunks(Source(path=saved_as("parquet", tmp_path)))
    assert "\n" not in str(caught.value)


def test_columns_are_chosen_alike_when_reading_goes_on(tmp_path):
    first, second = np.random.default_rng(0).permutation(2)
    write(tmp_path / f"{first}.jsonl", [{"text": str(n)} for n in range(70)])
    write(tmp_path / f"{second}.jsonl", [{"text": str(n), "messages": []} for n in range(70)])
    source = Source(path=str(tmp_path))
    found = chunks(source)
    for n, (position, _) in enumerate(found):
        assert texts(chunks(source, position)) == texts(found[n:])


def test_what_a_document_of_a_text_file_is_can_be_chosen(tmp_path):
    (tmp_path / "d.txt").write_text("one\ntwo\n\nthree\n")
    source = {"path": str(tmp_path)}
    assert texts(chunks(Source(**source))) == ["one", "two", "", "three"]
    assert [t.strip() for t in texts(chunks(Source(**source, sample_by="paragraph")))] == [
        "one\ntwo",
        "three",
    ]
    assert texts(chunks(Source(**source, sample_by="document"))) == ["one\ntwo\n\nthree\n"]
    path = write(tmp_path / "d.jsonl", RECORDS)
    with pytest.raises(
        UserError, match=r"sources\[0\].sample_by: does not apply to json files; leave it out"
    ):
        chunks(Source(path=path, sample_by="document"))


def test_a_generator_is_identified_by_its_code(monkeypatch, tmp_path):
    source = Source(generator="math", documents=5)
    before = identity(source)
    folder = Path(embedded.__file__).parent
    for name in embedded.GENERATOR_FILES:
        shutil.copy(folder / name, tmp_path / name)
    monkeypatch.setattr(embedded, "__file__", str(tmp_path / "__init__.py"))
    generators_hash.cache_clear()
    assert identity(source) == before
    with (tmp_path / "pools.py").open("a") as file:
        file.write("X = 1\n")
    generators_hash.cache_clear()
    assert identity(source) != before
    generators_hash.cache_clear()


def test_all_files_that_generators_import_are_in_their_identity():
    folder, needed, waiting = Path(embedded.__file__).parent, set(), ["conversations"]
    while waiting:
        name = waiting.pop()
        needed.add(f"{name}.py")
        source = (folder / f"{name}.py").read_text()
        below = re.findall(r"from xlstm_distill\.embedded\.(\w+) import", source)
        for found in re.findall(r"from xlstm_distill\.embedded import (.+)", source):
            below += found.split(", ")
        waiting += [found for found in below if f"{found}.py" not in needed]
    assert needed == set(embedded.GENERATOR_FILES)
