"""Files, folders and hub ids as rows: what is read exactly, and every way it can fail."""

import csv
import gzip
import json
import os
import socket
import sys

import datasets
import pytest

from polyrank.data import load_tasks
from polyrank.data.sources import Source
from polyrank.errors import DataError, RecipeError

ROWS = [
    {"task": "a", "instruction": "Add.", "input": "1 2", "output": ["3"], "unseen": False},
    {"task": "b", "instruction": "Say.", "input": "hé\u2028llo", "output": ["hi", "ho"]},
]


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def test_json_lines_gzip_and_a_json_list_give_the_same_rows(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(ROWS), encoding="utf-8")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines(ROWS).encode()))
    (tmp_path / "c.json").write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    (tmp_path / "d.jsonl").write_text("\ufeff\n" + lines(ROWS) + "\n\n", encoding="utf-8")
    for file in tmp_path.iterdir():
        assert list(Source(str(file)).rows()) == ROWS, file.name


def test_gzip_is_known_by_its_bytes_not_by_its_name(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(lines(ROWS).encode()))
    assert list(Source(str(tmp_path / "a.jsonl")).rows()) == ROWS


def test_dates_numbers_and_the_word_none_stay_the_text_that_they_are(tmp_path):
    answers = ["2020-01-01", "None", "NA", "01", "1.50", "null", "true"]
    (tmp_path / "a.jsonl").write_text(lines({"input": "q", "output": a} for a in answers))
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["input", "output"], *(["q", a] for a in answers)])
    for name in ("a.jsonl", "a.csv"):
        tasks = load_tasks(tmp_path / name)
        assert [example.references[0] for example in tasks.examples] == answers


def test_csv_keeps_quoted_line_breaks_and_delimiters(tmp_path):
    (tmp_path / "a.csv").write_text('input,output\n"a, ""b""\nc",d\n')
    (tmp_path / "a.tsv").write_text("input\toutput\na, b\tc\n")
    assert list(Source(str(tmp_path / "a.csv")).rows()) == [{"input": 'a, "b"\nc', "output": "d"}]
    assert list(Source(str(tmp_path / "a.tsv")).rows()) == [{"input": "a, b", "output": "c"}]


def test_lines_of_text_are_divided_at_the_first_separator(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"m | n||a||b \r\n\nx||y\n"))
    rows = list(Source(str(tmp_path / "a.txt.gz"), separator="||").rows())
    assert rows == [{"input": "m | n", "output": "a||b"}, {"input": "x", "output": "y"}]


def test_parquet_gives_classes_by_their_names(tmp_path):
    features = datasets.Features(
        {"input": datasets.Value("string"), "output": datasets.ClassLabel(names=["no", "yes"])}
    )
    data = datasets.Dataset.from_dict({"input": ["p", "q"], "output": [1, 0]}, features=features)
    path = tmp_path / "odd [name]*.parquet"
    data.to_parquet(str(path))
    rows = list(Source(str(path)).rows())
    assert rows == [{"input": "p", "output": "yes"}, {"input": "q", "output": "no"}]


def test_a_folder_that_datasets_saved_is_read_by_split(tmp_path):
    train = datasets.Dataset.from_list([{"input": "p", "output": "a"}])
    test = datasets.Dataset.from_list([{"input": "q", "output": "b"}])
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(str(tmp_path / "both"))
    train.save_to_disk(str(tmp_path / "one"))
    assert list(Source(str(tmp_path / "both"), split="test").rows()) == [
        {"input": "q", "output": "b"}
    ]
    assert list(Source(str(tmp_path / "one")).rows()) == [{"input": "p", "output": "a"}]
    with pytest.raises(DataError, match="one of train, test, got None"):
        list(Source(str(tmp_path / "both")).rows())


def test_a_folder_of_data_files_is_read_and_a_changed_file_is_noticed(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    file = folder / "train.jsonl"
    file.write_text(lines([{"input": "p", "output": "a"}]))
    status = file.stat()
    assert list(Source(str(folder)).rows()) == [{"input": "p", "output": "a"}]
    file.write_text(lines([{"input": "p", "output": "b"}]))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # same size, same time
    assert list(Source(str(folder)).rows()) == [{"input": "p", "output": "b"}]


def test_local_sources_touch_no_network_no_cache_and_print_nothing(tmp_path, monkeypatch, capfd):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_list(ROWS[:1]).to_parquet(str(path))
    (tmp_path / "a.jsonl").write_text(lines(ROWS))
    before = set(tmp_path.iterdir())
    capfd.readouterr()
    list(Source(str(path)).rows())
    list(Source(str(tmp_path / "a.jsonl")).rows())
    assert capfd.readouterr() == ("", "")
    assert set(tmp_path.iterdir()) == before


def test_a_hub_id_goes_to_datasets_with_split_subset_and_revision(monkeypatch):
    seen = {}

    def fake(path, **options):
        seen.update(options, path=path)
        return datasets.Dataset.from_list([{"input": "p", "output": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", fake)
    source = Source("owner/name", split="train[:1%]", subset="en", revision="abc")
    assert list(source.rows()) == [{"input": "p", "output": "a"}]
    expected = {"path": "owner/name", "split": "train[:1%]", "name": "en", "revision": "abc"}
    assert seen == expected


def test_a_hub_that_cannot_be_reached_is_a_data_error(monkeypatch):
    def fake(path, **options):
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", fake)
    with pytest.raises(DataError, match=r"owner/name: cannot be loaded: Couldn't reach.*network"):
        list(Source("owner/name").rows())


BAD = {
    "broken line": ("a.jsonl", b'{"input": "a"}\n{"input": \n', r"a\.jsonl, line 2: not valid"),
    "nested too deep": ("a.json", b'{"a": ' + b"[" * 10**5 + b"}", "line 1: not readable as JSON"),
    "a number too long": ("a.json", b'{"a": ' + b"1" * 5000 + b"}", "line 1: not readable as JSON"),
    "a column twice": ("a.csv", b"\na,b,a\n1,2,3\n", "two columns are called 'a'"),
    "broken list": ("a.json", b'[{"a": 1},\n{"b" 2}]', "line 2: not valid JSON"),
    "not an object": ("a.jsonl", b'{"input": "a"}\n\n[1]\n', r"line 3: expected a JSON object.*li"),
    "list of texts": ("a.json", b'["a"]', "item 1: expected a JSON object"),
    "not UTF-8": ("a.jsonl", b'{"input": "a"}\n{"input": "\xe9"}', "line 2: expected UTF-8.*0xe9"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99)[:-12], "gzip stream is broken"),
    "not gzip": ("a.jsonl.gz", b'{"input": "a"}', "named .gz, but not a gzip file"),
    "empty": ("a.jsonl", b"", "empty, it has no rows"),
    "empty gzip": ("a.jsonl.gz", gzip.compress(b""), "empty, it has no rows"),
    "blank lines": ("a.txt", b"\n \n", "empty, it has no rows"),
    "header alone": ("a.csv", b"input,output\n", "empty, it has no rows"),
    "ragged": ("a.csv", b"input,output\na,b\nc,d,e\n", "line 3: expected 2 fields .*got 3"),
    "open quote": ("a.csv", b'input,output\na,"b\n', "not valid CSV"),
    "not parquet": ("a.parquet", b"hello", "cannot be loaded"),
    "unknown suffix": ("a.xlsx", b"hello", "does not tell the format.*jsonl"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_data_errors_that_name_the_place(tmp_path, case):
    name, content, message = BAD[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_tasks(tmp_path / name)


@pytest.mark.parametrize("name", ["gone.jsonl", "./gone", "/no/such/folder", "a/b/c", "gone.gz"])
def test_a_missing_file_is_not_looked_for_on_the_hub(name, monkeypatch):
    monkeypatch.delattr(datasets, "load_dataset")
    with pytest.raises(DataError, match="there is no such file"):
        list(Source(name).rows())


def test_a_folder_without_data_and_a_folder_for_a_file_are_data_errors(tmp_path):
    with pytest.raises(DataError, match="cannot be loaded"):
        list(Source(str(tmp_path)).rows())
    with pytest.raises(DataError, match="expected a json file, got a folder"):
        list(Source(str(tmp_path), format="json").rows())


def test_settings_that_do_not_fit_the_format_are_refused(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(lines(ROWS))
    with pytest.raises(RecipeError, match="separator is for text sources, this one is json"):
        list(Source(str(file), separator="||").rows())
    with pytest.raises(RecipeError, match="expected auto or one of json"):
        list(Source(str(file), format="yaml").rows())
    with pytest.raises(DataError, match="one split"):
        list(Source(str(file), split="test").rows())


def test_a_missing_extra_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"pip install 'polyrank\[data\]'"):
        list(Source(str(tmp_path / "a.parquet")).rows())
