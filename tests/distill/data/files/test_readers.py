"""JSON and CSV are read without a schema; a bad record is named by its line or number."""

from __future__ import annotations

import json

import pytest

from xlstm_distill.data.files.readers import BadRecord, csv_reader, json_reader

RECORDS = [{"text": f"document {n}", "other": n} for n in range(150)]
LONG = "x" * 1000


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


@pytest.fixture
def json_texts(tmp_path):
    """Read the column `text` of a JSON file with this content."""

    def read(content):
        path = tmp_path / "d.json"
        path.write_bytes(content)
        return [text for batch, _ in json_reader(str(path))(None) for text in batch["text"]]

    return read


@pytest.mark.parametrize(
    ("first", "last"),
    [
        ({"text": LONG, "source": None}, {"text": "b", "source": "web"}),
        ({"text": LONG, "metadata": {"a": 1}}, {"text": "b", "metadata": {"a": 1, "b": 2}}),
        ({"text": LONG, "metadata": {"a": 1}}, {"text": "b", "metadata": {"a": "u"}}),
        ({"text": None, "pad": LONG}, {"text": "b", "pad": "x"}),
    ],
    ids=["null then text", "another key", "another type", "null text"],
)
def test_json_records_may_differ_after_any_number_of_bytes(first, last, json_texts):
    # `datasets` would fix a schema by the first 10 MB.
    found = json_texts(lines(first) * 11_000 + lines(last))
    assert (len(found), found[0], found[-1]) == (11_001, first["text"], "b")


def test_json_values_are_taken_as_they_are(json_texts):
    records = [
        {"text": "2024-01-31"},
        {"text": 5},
        {"other": 1},
        {"text": "a\u2028b \ud83d\ude00 \ud83d"},
    ]
    found = json_texts(b"\xef\xbb\xbf" + lines(*records).replace(b"\n", b"\n\n"))
    assert found == ["2024-01-31", 5, None, "a\u2028b \U0001f600 ?"]


def test_a_list_in_json_may_hold_texts_and_lie_on_many_lines(json_texts):
    assert json_texts(json.dumps(["a", "b"], indent=1).encode()) == ["a", "b"]
    whole = "\n" + json.dumps(RECORDS, indent=1)
    assert json_texts(whole.encode()) == [r["text"] for r in RECORDS]


@pytest.mark.parametrize(
    ("content", "where", "reason"),
    [
        (b'\n{"text": "a"}\n\n{"text": oops}\n', "line 4", "Expecting value"),
        (b'{\n "text": "a"\n}\n', "line 1", "one object per line, or one list of them"),
        (b'{"text": "a"}\n5\n', "line 2", "it is int; an object with columns is needed"),
        (b'[{"text": "a"}, null]', "record 2", "it is NoneType; an object"),
        (b'[{"text": "a"}, ', "its list", "Expecting value"),
        (b'{"text": "gr\xf6n"}\n', "line 1", "'utf-8' codec can't decode"),
    ],
)
def test_bad_json_names_its_line(content, where, reason, json_texts):
    with pytest.raises(BadRecord, match=reason) as caught:
        json_texts(content)
    assert caught.value.where == where
    assert "\n" not in str(caught.value)


def test_csv_values_are_the_texts_that_they_are(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("prompt,response,n\n1+1,2,1\nwhich,NA,\nnull,None,2\n3,,4\nshort\n")
    ((batch, _),) = csv_reader(str(path))(None)
    found = list(zip(batch["prompt"], batch["response"], strict=True))
    assert found == [("1+1", "2"), ("which", "NA"), ("null", "None"), ("3", ""), ("short", "")]
