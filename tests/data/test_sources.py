from pathlib import Path

import huggingface_hub
import pytest

from qsharded.data.sources import choose_split, find_files

ULTRACHAT = [f"data/{split}-00000-of-00001-a0b1.parquet" for split in ("train_sft", "train_gen", "test_sft")]

SAVED = ["train/data-00000-of-00001.arrow", "test/data-00000-of-00001.arrow"]


@pytest.mark.parametrize(
    ("names", "split", "chosen"),
    [
        (["b.jsonl", "a.jsonl"], "train", ["a.jsonl", "b.jsonl"]),
        (["train.jsonl", "val.jsonl", "test.jsonl"], "train", ["train.jsonl"]),
        (["train.jsonl", "val.jsonl", "test.jsonl"], "validation", ["val.jsonl"]),
        (["train.jsonl", "val.jsonl", "test.jsonl"], "dev", ["val.jsonl"]),
        (["contest.jsonl", "retrained.jsonl"], "train", ["contest.jsonl", "retrained.jsonl"]),
        (["train/1.json", "train/0.json", "test/0.json"], "train", ["train/0.json", "train/1.json"]),
        (["test_set/train.json"], "train", ["test_set/train.json"]),
        (["my-training-data-2.json", "eval.json"], "train", ["my-training-data-2.json"]),
        (["train_v1.json", "train_v2.json"], "train_v2", ["train_v2.json"]),
        (ULTRACHAT, "train_sft", ULTRACHAT[:1]),
        (ULTRACHAT, "test_sft", ULTRACHAT[2:]),
        (
            ["validation-00000-of-00002.parquet", "validation-00001-of-00002.parquet"],
            "val",
            ["validation-00000-of-00002.parquet", "validation-00001-of-00002.parquet"],
        ),
        # as `save_to_disk` names them: a Dataset, a DatasetDict
        (["data-00000-of-00001.arrow"], "train", ["data-00000-of-00001.arrow"]),
        (SAVED, "train", SAVED[:1]),
        (SAVED, "test", SAVED[1:]),
    ],
)
def test_names_tell_the_split(names, split, chosen):
    assert choose_split(names, split, "here") == chosen


@pytest.mark.parametrize(
    ("names", "split"), [(["train.json"], "test"), (["a.json"], "validation"), (ULTRACHAT, "train"), ([], "train")]
)
def test_a_missing_split_is_an_error_that_lists_what_there_is(names, split):
    with pytest.raises(ValueError, match=rf"here has no '{split}' split.*{names[0] if names else 'no .jsonl'}"):
        choose_split(names, split, "here")


def test_a_single_file_needs_no_split_in_its_name(tmp_path):
    path = tmp_path / "test.JSONL"
    path.touch()
    assert find_files(path, "train") == [path]


def test_a_folder_is_searched_in_depth_without_metadata_or_hidden_files(tmp_path):
    for name in ("b.jsonl", "in/a.parquet", "dataset_info.json", ".cache/c.json", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_files(tmp_path, "train") == [tmp_path / "b.jsonl", tmp_path / "in/a.parquet"]


def test_other_file_types_are_refused(tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(ValueError, match=r"a\.txt must end in one of \.jsonl"):
        find_files(tmp_path / "a.txt", "train")


@pytest.mark.parametrize("source", ["nothing.jsonl", "/no/such/file.jsonl", "../there", "data/mistyped.jsonl", "data"])
def test_no_such_source(source):
    with pytest.raises(ValueError, match="is no file, no folder and no Hub dataset"):
        find_files(source, "train")


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the Hub: set its list of files."""

    class Hub:
        def __init__(self):
            self.files = []

        def list_repo_files(self, repo, *, repo_type):
            assert (repo, repo_type) == ("owner/name", "dataset")
            return self.files

        def hf_hub_download(self, repo, name, *, repo_type):
            assert repo_type == "dataset"
            return f"/cache/{repo}/{name}"

    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "list_repo_files", hub.list_repo_files)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.hf_hub_download)
    return hub


def cached(*names):
    return [Path("/cache/owner/name") / name for name in names]


def test_hub_files_are_chosen_by_split(hub):
    hub.files = [".gitattributes", "README.md", "data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"]
    assert find_files("owner/name", "test") == cached("data/test-00000-of-00001.parquet")


def test_hub_folder_or_file_may_be_named(hub):
    hub.files = ["main/train.jsonl", "main/test.jsonl", "socratic/train.jsonl"]
    assert find_files("owner/name/socratic", "train") == cached("socratic/train.jsonl")
    assert find_files("owner/name/main/test.jsonl", "train") == cached("main/test.jsonl")


@pytest.mark.parametrize("names", [["main/train.jsonl", "socratic/train.jsonl"], ["train.jsonl", "train.parquet"]])
def test_several_kinds_of_hub_files_are_not_mixed(hub, names):
    hub.files = names
    with pytest.raises(ValueError, match="name one folder or file"):
        find_files("owner/name", "train")


def test_an_empty_name_is_not_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="a dataset's name is empty"):
        find_files("", "train")
    assert find_files(".", "train") == [Path("rows.jsonl")]


def test_the_hubs_refusal_is_told():
    # The tests run offline.
    with pytest.raises(
        ValueError, match=r"owner/name is no local file or folder, and the Hub did not give it: .*offline"
    ):
        find_files("owner/name", "train")
