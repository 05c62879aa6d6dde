"""Which files of a store are models, and where they belong."""

from __future__ import annotations

import pytest
from inferpool.errors import StoreError
from inferpool.repository.stores.arrangement import arrange

SUFFIXES = (".onnx", ".pt")


def targets(*paths: str) -> tuple[int, dict[str, str]]:
    return tuple(arrange(paths, "name", SUFFIXES))  # type: ignore[return-value]


def test_a_repository_is_taken_as_it_is() -> None:
    paths = ("a/1/model.onnx", "a/model.toml", "a/samples/x.json", "b.onnx")
    assert targets(*paths) == (1, {path: path for path in paths})


def test_the_folder_of_one_model_is_taken_as_it_is() -> None:
    paths = ("1/model.onnx", "2/model.pt", "labels.txt")
    assert targets(*paths) == (0, {path: path for path in paths})


def test_a_folder_around_everything_is_taken_off() -> None:
    assert targets("x/y/a/1/model.onnx") == (1, {"a/1/model.onnx": "x/y/a/1/model.onnx"})
    assert targets("my/a/1/model.onnx", "my/b/1/model.onnx") == (
        1, {"a/1/model.onnx": "my/a/1/model.onnx", "b/1/model.onnx": "my/b/1/model.onnx"},
    )  # fmt: skip


def test_one_model_without_a_version_becomes_version_one() -> None:
    hub = ("README", "config.json", "onnx/model.onnx", "onnx/model.onnx_data", "onnx/model_fp16.onnx",
           "onnx/model_fp16.onnx_data", "tokenizer.json", "labels.txt", "samples/a.json")  # fmt: skip
    assert targets(*hub) == (
        0,
        {
            "1/model.onnx": "onnx/model.onnx",
            "1/model.onnx_data": "onnx/model.onnx_data",
            "labels.txt": "labels.txt",
            "samples/a.json": "samples/a.json",
            "tokenizer.json": "tokenizer.json",
        },
    )
    assert targets("model.onnx", "weights.bin")[1] == {
        "1/model.onnx": "model.onnx",
        "1/weights.bin": "weights.bin",
    }


def test_bare_files_are_models_of_their_own() -> None:
    assert targets("a.onnx", "b.onnx") == (1, {"a.onnx": "a.onnx", "b.onnx": "b.onnx"})


def test_what_other_programs_leave_is_left_out() -> None:
    paths = (
        "a/1/model.onnx",
        ".DS_Store",
        "a/._x",
        "__MACOSX/a/1/model.onnx",
        ".git/config",
        "a/.labels.json",
    )
    assert targets(*paths) == (1, {"a/1/model.onnx": "a/1/model.onnx"})


@pytest.mark.parametrize(
    "path", ["/a/1/model.onnx", "../a", "a/../../b", "a//b", "a/./b", "a\\b", "a\x00b", "a\nb", "x" * 300]
)
def test_a_name_that_could_mean_another_folder_is_refused(path: str) -> None:
    with pytest.raises(StoreError, match="rename it"):
        targets("a/1/model.onnx", path)


def test_a_name_that_is_a_file_and_a_folder_is_refused() -> None:
    with pytest.raises(StoreError, match="both a file and a folder"):
        targets("a/1/model.onnx", "a")


def test_nothing_to_serve_says_what_is_there() -> None:
    with pytest.raises(StoreError, match=r"expected name/1/model.onnx, .* there is a.bin, c/b.bin"):
        targets("a.bin", "c/b.bin")
    with pytest.raises(StoreError, match="there is nothing"):
        targets()
