"""The data of `sources.py`: read from their usual layouts, and cut to what trains in a minute."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from sklearn.datasets import load_diabetes
from sklearn.model_selection import train_test_split
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

SEED = 0
LEARNT_PICTURES, JUDGED_PICTURES = {"digits": 1000, "cifar10": 2000}, 200
"""Pictures of each class that are learnt from, and held out."""
LEARNT_REVIEWS, JUDGED_REVIEWS = 5000, 1000
"""Reviews of each opinion that are learnt from, and held out."""
WORDS = {"reviews": 10_000, "news": 8_000, "words": 1_500}
MOST_TOKENS = {"reviews": 200, "news": 60, "words": 8}
LEARNT_WORDS, JUDGED_WORDS = 20_000, 3_000
WINDOW = 20
COLUMNS = (
    "longitude", "latitude", "housing_median_age", "total_rooms", "total_bedrooms", "population",
    "households", "median_income",
)  # fmt: skip
PRICE = "median_house_value"


class Data(NamedTuple):
    """The rows that train a model, and those that judge it.

    Attributes:
        rows: the rows that are learnt from, as a network takes them; channels are last.
        answers: the right answer of each: the number of its class, or a number.
        example: some held-out rows, for `inferpool import`.
        labels: the names of the classes, or None if the answers are numbers.
        held_out: the file or folder for `inferpool evaluate`.
        asked: the body that is explained, and its media type.
        tokenizer: turns texts into rows, if the rows are texts.
        about: what was read, and how much of it.
    """

    rows: Any
    answers: Any
    example: Any
    labels: Sequence[str] | None
    held_out: Path
    asked: tuple[bytes, str]
    tokenizer: Tokenizer | None
    about: str


def read_digits(folder: Path, work: Path) -> Data:
    """Read MNIST: `train/CLASS/*.png` and `test/CLASS/*.png`, 28×28 and grey."""
    return _pictures("digits", folder, work, "L", "MNIST as PNG")


def read_cifar10(folder: Path, work: Path) -> Data:
    """Read CIFAR-10: `train/CLASS/*.jpg` and `test/CLASS/*.jpg`, 32×32 and in colour."""
    return _pictures("cifar10", folder, work, "RGB", "CIFAR-10 as JPEG")


def _pictures(name: str, data: Path, work: Path, mode: str, what: str) -> Data:
    folder = data / name
    labels = sorted(each.name for each in (folder / "train").iterdir() if each.is_dir())
    rows, answers, example = [], [], []
    held_out = work / "held-out"
    shutil.rmtree(held_out, ignore_errors=True)
    for number, label in enumerate(labels):
        learnt = sorted((folder / "train" / label).iterdir())[: LEARNT_PICTURES[name]]
        rows += [_pixels(file, mode) for file in learnt]
        answers += [number] * len(learnt)
        (held_out / label).mkdir(parents=True)
        for file in sorted((folder / "test" / label).iterdir())[:JUDGED_PICTURES]:
            shutil.copyfile(file, held_out / label / file.name)
        example += [_pixels(file, mode) for file in sorted((held_out / label).iterdir())[:6]]
    asked = sorted((held_out / labels[3]).iterdir())[0]
    kind = "image/png" if asked.suffix == ".png" else "image/jpeg"
    about = f"{what}: {len(rows)} pictures of its training part, {JUDGED_PICTURES} a class of its test part"
    return Data(
        np.stack(rows), np.array(answers), np.stack(example), labels, held_out,
        (asked.read_bytes(), kind), None, about,
    )  # fmt: skip


def _pixels(file: Path, mode: str) -> Any:
    with Image.open(file) as picture:
        found = np.asarray(picture.convert(mode), np.float32) / 255
    return found[..., None] if found.ndim == 2 else found


def read_reviews(folder: Path, work: Path) -> Data:
    """Read the reviews of IMDb: `aclImdb/train/pos/*.txt` and so on."""

    def some(half: str, count: int) -> tuple[list[str], list[int]]:
        texts, answers = [], []
        for number, opinion in enumerate(("neg", "pos")):
            files = sorted((folder / "reviews" / "aclImdb" / half / opinion).glob("*.txt"))[:count]
            texts += [file.read_text("utf-8") for file in files]
            answers += [number] * len(files)
        return texts, answers

    learnt, held_out = some("train", LEARNT_REVIEWS), some("test", JUDGED_REVIEWS)
    about = f"IMDb: {len(learnt[0])} reviews of its training part, {len(held_out[0])} of its test part"
    asked = "The acting was wonderful and the story moving, although the ending is a little dull."
    return _texts("reviews", work, learnt, held_out, ("negative", "positive"), asked, about)


def read_news(folder: Path, work: Path) -> Data:
    """Read AG News: every `*.csv` without a header, whose columns are class from 1, title, description."""
    texts, answers = [], []
    for file in sorted((folder / "news").glob("*.csv")):
        with file.open(encoding="utf-8", newline="") as lines:
            for number, title, description in csv.reader(lines):
                texts.append(f"{title} {description}".replace("\\", " "))
                answers.append(int(number) - 1)
    parts = train_test_split(texts, answers, test_size=0.2, random_state=SEED)
    learnt, held_out = (parts[0], parts[2]), (parts[1], parts[3])
    about = f"AG News: {len(learnt[0])} of {len(texts)} articles, the others held out"
    asked = "Oil prices rise again after the central bank warns investors of inflation"
    return _texts(
        "news", work, learnt, held_out, ("World", "Sports", "Business", "Sci/Tech"), asked, about
    )  # fmt: skip


def _texts(
    name: str,
    work: Path,
    learnt: tuple[Sequence[str], Sequence[int]],
    held_out: tuple[Sequence[str], Sequence[int]],
    labels: Sequence[str],
    asked: str,
    about: str,
) -> Data:
    tokenizer = make_tokenizer(learnt[0], WORDS[name], MOST_TOKENS[name])
    rows = padded(tokenizer, learnt[0], MOST_TOKENS[name])
    _write_texts(work / "held-out.csv", held_out[0], [labels[each] for each in held_out[1]])
    example = padded(tokenizer, held_out[0][:64], MOST_TOKENS[name])
    return Data(
        rows, np.array(learnt[1]), example, labels, work / "held-out.csv",
        (asked.encode(), "text/plain"), tokenizer, about,
    )  # fmt: skip


def make_tokenizer(texts: Iterable[str], words: int, most: int) -> Tokenizer:
    """Learn a vocabulary of whole words in small letters; padding has id 0, an unknown word id 1."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace("<br />", " "), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]"]
    trainer = trainers.WordLevelTrainer(vocab_size=words, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.enable_truncation(most)
    return tokenizer


def padded(tokenizer: Tokenizer, texts: Sequence[str], size: int) -> Any:
    """Return the tokens of `texts`, filled up on the right with zeros: [rows, size]."""
    rows = np.zeros((len(texts), size), np.int64)
    for row, encoding in zip(rows, tokenizer.encode_batch(list(texts)), strict=True):
        row[: len(encoding.ids)] = encoding.ids
    return rows


def _write_texts(file: Path, texts: Sequence[str], targets: Sequence[str]) -> None:
    with file.open("w", encoding="utf-8", newline="") as lines:
        writer = csv.writer(lines, quoting=csv.QUOTE_ALL)
        writer.writerow(["text", "target"])
        writer.writerows(zip(texts, targets, strict=True))


def read_words(folder: Path, work: Path) -> Data:
    """Read the texts of Python's `help()`: eight words of a paragraph, and the one that follows."""
    from pydoc_data.topics import topics

    paragraphs = [each for text in topics.values() for each in text.split("\n\n") if len(each) > 40]
    learnt, held_out = train_test_split(paragraphs, test_size=0.1, random_state=SEED)
    size = MOST_TOKENS["words"]
    tokenizer = make_tokenizer(learnt, WORDS["words"], size)
    labels = [tokenizer.id_to_token(number) for number in range(tokenizer.get_vocab_size())]
    tokenizer.no_truncation()

    def windows(texts: Sequence[str]) -> tuple[list[list[int]], list[int], list[str]]:
        rows, following, written = [], [], []
        for text, found in zip(texts, tokenizer.encode_batch(list(texts)), strict=True):
            for end in range(size, len(found.ids)):
                if found.ids[end] != 1:  # the vocabulary has the word
                    rows.append(found.ids[end - size : end])
                    following.append(found.ids[end])
                    written.append(text[found.offsets[end - size][0] : found.offsets[end - 1][1]])
        return rows, following, written

    rows, answers, _ = windows(learnt)
    picked = np.random.default_rng(SEED).permutation(len(rows))[:LEARNT_WORDS]
    judged, following, written = windows(held_out)
    some = np.random.default_rng(SEED).permutation(len(judged))[:JUDGED_WORDS]
    texts = [" ".join(written[each].split()) for each in some]
    _write_texts(work / "held-out.csv", texts, [labels[following[each]] for each in some])
    tokenizer.enable_truncation(size, direction="left")
    about = f"Python's help(): {len(picked)} windows of eight words, {len(some)} of other paragraphs held out"
    return Data(
        np.array(rows)[picked], np.array(answers)[picked], np.array(judged)[some[:64]], labels,
        work / "held-out.csv", (b"is raised if the value of the expression", "text/plain"), tokenizer, about,
    )  # fmt: skip


def read_diabetes(folder: Path, work: Path) -> Data:
    """Read scikit-learn's patients: ten measurements, scaled, and the progression."""
    rows, answers = load_diabetes(return_X_y=True)
    names = load_diabetes().feature_names
    return _columns(work, names, rows * 20, answers, "patients of scikit-learn")


def read_prices(folder: Path, work: Path) -> Data:
    """Read the districts of California: the columns of numbers of `housing.csv`, and the median price."""
    with (folder / "prices" / "housing.csv").open(encoding="utf-8", newline="") as lines:
        complete = [row for row in csv.DictReader(lines) if all(row[name] for name in COLUMNS)]
    rows = np.array([[float(row[name]) for name in COLUMNS] for row in complete])
    prices = np.array([float(row[PRICE]) for row in complete])
    return _columns(work, COLUMNS, rows, prices, "districts of California, those without a gap")


def _columns(work: Path, names: Sequence[str], rows: Any, answers: Any, what: str) -> Data:
    parts = train_test_split(
        rows.astype(np.float32), answers.astype(np.float32), test_size=0.2, random_state=SEED
    )
    return _numbers(work, names, *parts, about=f"{len(rows)} {what}, a fifth of them held out")


def _numbers(
    work: Path, names: Sequence[str], learnt: Any, held_out: Any, right: Any, truth: Any, about: str
) -> Data:
    with (work / "held-out.csv").open("w", encoding="utf-8", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerow([*names, "target"])
        writer.writerows([*row, value] for row, value in zip(held_out.tolist(), truth.tolist(), strict=True))
    asked = ",".join(names) + "\n" + ",".join(map(str, held_out[0].tolist())) + "\n"
    return Data(
        learnt, right, held_out[:64], None, work / "held-out.csv", (asked.encode(), "text/csv"), None, about
    )


def read_closes(folder: Path, work: Path) -> Data:
    """Read the closing prices of a share, oldest first: the column `Close` of `closes.csv`."""
    with (folder / "closes" / "closes.csv").open(encoding="utf-8", newline="") as lines:
        closes = np.array([float(row["Close"].replace(",", "")) for row in csv.DictReader(lines)], np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(closes, WINDOW + 1)
    rows, answers = windows[:, :-1].copy(), windows[:, -1].copy()
    first = len(rows) * 4 // 5  # the days that are held out come after all others
    error = float(np.sqrt(np.mean((rows[first:, -1] - answers[first:]) ** 2)))
    about = (
        f"{len(closes)} closes of a share, the last fifth held out; to repeat the last close has a root"
        f" of the mean squared error of {error:.4g}"
    )
    names = [f"day_{day}" for day in range(1 - WINDOW, 1)]
    return _numbers(work, names, rows[:first], rows[first:], answers[:first], answers[first:], about)


READERS: dict[str, Callable[[Path, Path], Data]] = {
    "digits": read_digits,
    "cifar10": read_cifar10,
    "reviews": read_reviews,
    "news": read_news,
    "words": read_words,
    "diabetes": read_diabetes,
    "prices": read_prices,
    "closes": read_closes,
}
