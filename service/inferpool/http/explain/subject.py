"""A row that is explained: its inputs, divided into features, and how the answer names those."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from inferpool.codecs.text import Text, TextCodec
from inferpool.codecs.text_words import Span
from inferpool.errors import InvalidInput
from inferpool.explain import baselines
from inferpool.explain.features import (
    FIXED,
    MOST_FEATURES,
    VariedInput,
    blocks,
    patches,
    perturbed_rows,
    usual_side,
)
from inferpool.explain.integrated_gradients import INTEGRATED_GRADIENTS, PathPoints
from inferpool.http.explain.options import CONTINUOUS, OTHER_METHODS, ExplainQuery
from inferpool.http.predict.served_version import ServedVersion
from inferpool.pixel_table import Normalisation
from inferpool.tensors import Array, Tensors, TensorSpec, name_text, names_text

COLUMNS: Final = "columns"
WORDS: Final = "words"
TOKENS: Final = "tokens"
PATCHES: Final = "patches"


class Grid(NamedTuple):
    """How a picture is divided: patches of `side` pixels, and the patch of each pixel `[height, width]`."""

    side: int
    numbers: Array
    grey: Array


class Subject:
    """A row that is explained.

    Attributes:
        kind: whether its features are columns, words, tokens or patches.
        baseline: the name of what replaces features.
        features: how many there are.
        names: for each feature, the members that name it in the answer; empty for a picture.
        grid: the patches of a picture; None for everything else.
        row_bytes: the memory of a row.
        baselines: how many rows a coalition becomes.
    """

    def __init__(
        self,
        kind: str,
        baseline: str,
        inputs: Mapping[str, VariedInput],
        fixed: Tensors,
        names: Sequence[dict[str, Any]],
        grid: Grid | None = None,
        *,
        apart: bool = False,
        bf16: frozenset[str] = frozenset(),
    ) -> None:
        """`fixed` holds the inputs that stay; `apart` says that a row is all that the model takes at once.

        The inputs in `bf16` are bits of BF16.
        """
        self.kind = kind
        self.baseline = baseline
        self.names = names
        self.grid = grid
        self.features = len(names) if grid is None else int(grid.numbers.max()) + 1
        self._inputs = inputs
        self._fixed = fixed
        self._apart = apart
        self._bf16 = bf16
        each = list(inputs.values())
        self.row_bytes = max(1, sum(own.own.nbytes for own in each))
        self.baselines = len(each[0].baseline)

    def rows(self, masks: Array) -> Tensors:
        """Return the rows of coalitions; see `perturbed_rows`."""
        return perturbed_rows(self._inputs, masks) | self._fixed

    def single_rows(self, masks: Array) -> Iterator[Tensors]:
        """Yield the rows of coalitions one by one, for a model that takes nothing else at once."""
        rows = perturbed_rows(self._inputs, masks)
        for number in range(len(masks) * self.baselines):
            yield {
                name: tensor[number, ...] if self._apart else tensor[number : number + 1]
                for name, tensor in rows.items()
            } | self._fixed

    @property
    def varied_inputs(self) -> Iterable[str]:
        """The names of the inputs whose elements are features."""
        return self._inputs.keys()

    def path_rows(self, points: PathPoints) -> Tensors:
        """Return the rows at points between the baselines and the row."""
        rows: Tensors = {}
        for name, each in self._inputs.items():
            is_bf16 = name in self._bf16
            baseline = baselines.as_numbers(each.baseline, is_bf16)[points.baselines]
            own = baselines.as_numbers(each.own, is_bf16)
            positions = points.positions.reshape(-1, *[1] * each.own.ndim)
            numbers = baselines.as_datatype(baseline + positions * (own - baseline), each.own.dtype, is_bf16)
            rows[name] = numbers[0] if self._apart else numbers
        return rows | self._fixed

    def path_contributions(self, points: PathPoints, gradients: Tensors) -> Array:
        """Return what the gradients at some points of the path add to each feature, FP64 `[features]`."""
        total = np.zeros(self.features)
        for name, each in self._inputs.items():
            is_bf16 = name in self._bf16
            baseline = baselines.as_numbers(each.baseline, is_bf16)[points.baselines]
            lengths = baselines.as_numbers(each.own, is_bf16) - baseline
            slopes = gradients[name].reshape(lengths.shape) * points.weights.reshape(-1, *[1] * each.own.ndim)
            amounts = (slopes * lengths).sum(axis=0)
            features = np.broadcast_to(each.features, each.own.shape)
            total += np.bincount(features.reshape(-1), amounts.reshape(-1), self.features)
        return total


def make_subjects(
    served: ServedVersion, tensors: Tensors, columns: Sequence[str], query: ExplainQuery
) -> list[Subject]:
    """Return the rows of a request; `columns` are the names of a table's columns, if it had any.

    Raises InvalidInput.
    """
    view = served.view
    text = view.text
    if text is not None and text.input in tensors:
        _check_continuous({text.input: "a text"}, query)
        texts = tensors[text.input].tolist()
        return [_text(text, tuple(each) if text.pairs else each, query) for each in texts]
    apart = not view.batching.enabled
    fixed = {name: tensor for name, tensor in tensors.items() if name in served.optional}
    varied = {name: tensor for name, tensor in tensors.items() if name not in served.optional}
    if text is None and len(fixed) == len(tensors):
        fixed, varied = {}, fixed
    specs = served.signature.inputs_by_name
    _check_continuous({name: specs[name].datatype for name in varied}, query)
    rows = 1 if apart else served.rows(tensors)
    subjects = []
    for row in range(rows):
        own = varied if apart else {name: tensor[row, ...] for name, tensor in varied.items()}
        if text is not None:
            subject = _tokens(text, own, fixed, query, apart)
        elif view.image is not None:
            subject = _picture(view.image.picture, served, own, fixed, query, apart)
        else:
            subject = _columns(served, own, fixed, columns, query, apart)
        subjects.append(subject)
    return subjects


def _check_continuous(datatypes: Mapping[str, str], query: ExplainQuery) -> None:
    """Raise InvalidInput if gradients are wanted by an input that has none; `datatypes` are by name."""
    if query.method != INTEGRATED_GRADIENTS:
        return
    for name, datatype in datatypes.items():
        if datatype not in CONTINUOUS:
            raise InvalidInput(
                f"tensor {name_text(name)} is {datatype}, and gradients need floating-point numbers;"
                f" {OTHER_METHODS}",
                tensor=name,
            )


def _text(codec: TextCodec, text: Text, query: ExplainQuery) -> Subject:
    words = codec.words(text)
    if not words.spans:
        raise InvalidInput(f"tensor {name_text(codec.input)} has no word to explain", tensor=codec.input)
    names = [_word_name(text, span) for span in _joined(words.spans)]
    groups = np.append(_word_groups(words.spans), FIXED)
    own = {name: tensor[0] for name, tensor in words.tensors.items()}
    return _of_tokens(WORDS, codec, own, {}, groups[np.array(words.word_of)], names, query, apart=False)


def _word_name(text: Text, span: Span) -> dict[str, Any]:
    """Return the members that name a word: in a pair also which of the two texts it is from."""
    sentence = text if isinstance(text, str) else text[span.sentence]
    name: dict[str, Any] = {"word": sentence[span.start : span.end], "start": span.start, "end": span.end}
    return name if isinstance(text, str) else {"text": span.sentence, **name}


def _word_groups(spans: Sequence[Span]) -> Array:
    """Return the number of the feature of each word: its own, or that of a group if there are very many."""
    sentences = np.array([span.sentence for span in spans])
    first = blocks(int(np.count_nonzero(sentences == 0)), MOST_FEATURES // 2)
    second = blocks(int(np.count_nonzero(sentences)), MOST_FEATURES // 2)
    if not len(second) or not len(first):
        return blocks(len(spans), MOST_FEATURES)
    numbers = np.empty(len(spans), np.intp)
    numbers[sentences == 0] = first
    numbers[sentences != 0] = second + first[-1] + 1
    return numbers


def _joined(spans: Sequence[Span]) -> list[Span]:
    """Return the spans of the features: words, or some words together if there are very many."""
    joined: dict[int, Span] = {}
    for number, span in sorted(zip(_word_groups(spans).tolist(), spans, strict=True)):
        before = joined.get(number, span)
        start, end = min(before.start, span.start), max(before.end, span.end)
        joined[number] = Span(span.sentence, start, end)
    return list(joined.values())


def _tokens(text: TextCodec, own: Tensors, fixed: Tensors, query: ExplainQuery, apart: bool) -> Subject:
    ids = own[text.ids]
    features = blocks(ids.size, MOST_FEATURES).reshape(ids.shape)
    names = _element_names(text.ids, features, ids.shape)
    return _of_tokens(TOKENS, text, own, fixed, features, names, query, apart)


def _of_tokens(
    kind: str,
    text: TextCodec,
    own: Tensors,
    fixed: Tensors,
    features: Array,
    names: list[dict[str, Any]],
    query: ExplainQuery,
    apart: bool,
) -> Subject:
    has = {name: token for name in baselines.TOKENS if (token := text.substitute(name)) is not None}
    wanted = _choose(query, list(has))
    ids = own[text.ids]
    replaced = np.full((1, *ids.shape), has[wanted], ids.dtype)
    inputs = {text.ids: VariedInput(ids, replaced, features)}
    for name, tensor in own.items():
        if name != text.ids:
            inputs[name] = VariedInput(tensor, tensor[None], np.full(tensor.shape, FIXED))
    return Subject(kind, wanted, inputs, fixed, names, apart=apart)


def _picture(
    picture: Normalisation,
    served: ServedVersion,
    own: Tensors,
    fixed: Tensors,
    query: ExplainQuery,
    apart: bool,
) -> Subject:
    pixels = own[picture.input]
    if query.method == INTEGRATED_GRADIENTS and picture.is_among(own):
        # A point between two pictures is between the 256 values of pixels.
        pixels = picture.normalise(pixels) if apart else picture.normalise(pixels[None])[0]
    is_raw = pixels.dtype == np.uint8 and served.signature.inputs_by_name[picture.input].datatype != "UINT8"
    layout = "HWC" if is_raw else picture.layout
    is_bf16 = not is_raw and served.signature.inputs_by_name[picture.input].datatype == "BF16"
    unit = pixels[0] if apart else pixels
    side = query.patch or usual_side(picture.height, picture.width)
    numbers = patches(picture.height, picture.width, side)
    if numbers.max() >= MOST_FEATURES:
        raise InvalidInput(
            f'"patch" is {side}, which divides the picture into {int(numbers.max()) + 1} patches; at most'
            f" {MOST_FEATURES} are explained; choose larger ones",
            field="patch",
        )
    choices = [baselines.MEAN_COLOUR, baselines.BLUR, baselines.ZEROS]
    samples = {} if is_raw else _sample_rows(served, {picture.input: unit})
    if samples:
        choices += [baselines.SAMPLES_MEAN, baselines.SAMPLES]
    wanted = _choose(query, choices)
    if wanted == baselines.MEAN_COLOUR:
        baseline = baselines.mean_colour(unit, layout, is_bf16)
    elif wanted == baselines.BLUR:
        baseline = baselines.blurred(unit, layout, is_bf16)
    elif wanted == baselines.ZEROS:
        baseline = baselines.zeros(unit)
    else:
        rows = samples[picture.input]
        baseline = rows if wanted == baselines.SAMPLES else baselines.mean_row(rows, is_bf16)
    shape = [1, 1, 1]
    features = numbers
    if "C" in layout:
        shape[layout.index("H")], shape[layout.index("W")] = numbers.shape
        features = numbers.reshape(shape)
    if apart:
        baseline, features = baseline[:, None], features[None]
    grid = Grid(side, numbers, _grey(unit, layout))
    return Subject(
        PATCHES, wanted, {picture.input: VariedInput(pixels, baseline, features)}, fixed, (), grid,
        apart=apart, bf16=frozenset((picture.input,) if is_bf16 else ()),
    )  # fmt: skip


def _grey(unit: Array, layout: str) -> Array:
    numbers = unit.astype(np.float64)
    grey: Array = numbers.mean(axis=layout.index("C")) if "C" in layout else numbers
    return np.where(np.isfinite(grey), grey, 0.0)


def _columns(
    served: ServedVersion,
    own: Tensors,
    fixed: Tensors,
    columns: Sequence[str],
    query: ExplainQuery,
    apart: bool,
) -> Subject:
    specs = served.signature.inputs_by_name
    samples = _sample_rows(served, own)
    choices = [baselines.ZEROS]
    if samples:
        choices = [baselines.SAMPLES_MEAN, baselines.SAMPLES, baselines.ZEROS]
    wanted = _choose(query, choices)
    elements = sum(tensor.size for tensor in own.values())
    if not elements:
        raise InvalidInput("the row has no values to explain")
    if len(own) > MOST_FEATURES:
        raise InvalidInput(f"the model has {len(own)} inputs; rows of at most {MOST_FEATURES} are explained")
    inputs: dict[str, VariedInput] = {}
    names: list[dict[str, Any]] = []
    # Inputs of one value are features by themselves; the others share what is left.
    single = sum(tensor.size == 1 for tensor in own.values())
    others = elements - single
    for name, tensor in own.items():
        most = max(1, (MOST_FEATURES - len(own)) * tensor.size // max(1, others))
        if elements <= MOST_FEATURES or tensor.size <= 1:
            most = max(1, tensor.size)
        features = blocks(tensor.size, most).reshape(tensor.shape)
        named = columns if len(own) == 1 and tensor.ndim == 1 and len(columns) == tensor.size else ()
        names += _element_names(name, features, tensor.shape, named)
        features = features + (len(names) - (int(features.max()) + 1 if features.size else 0))
        baseline = _baseline_of(wanted, tensor, samples.get(name), specs[name])
        inputs[name] = VariedInput(tensor, baseline, features)
    bf16 = frozenset(name for name in inputs if specs[name].datatype == "BF16")
    return Subject(COLUMNS, wanted, inputs, fixed, names, apart=apart, bf16=bf16)


def _baseline_of(wanted: str, own: Array, rows: Array | None, spec: TensorSpec) -> Array:
    if wanted == baselines.ZEROS or rows is None:
        return baselines.zeros(own)
    return rows if wanted == baselines.SAMPLES else baselines.mean_row(rows, spec.datatype == "BF16")


def _sample_rows(served: ServedVersion, own: Tensors) -> Tensors:
    """Return the rows of the golden samples, if they have the shapes of a request's row `own`."""
    specs = served.signature.inputs_by_name
    found: Tensors = {}
    for name, tensor in own.items():
        if name not in served.view.sample_rows:
            return {}
        rows: Array = np.array(served.view.sample_rows[name], specs[name].dtype)
        if rows.shape[1:] != tensor.shape:
            rows = rows[:, None]
            if rows.shape[1:] != tensor.shape:
                return {}
        found[name] = rows
    return found


def _element_names(
    name: str, features: Array, shape: tuple[int, ...], columns: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Return the members that name each feature: the input, its column, and the indices of its elements."""
    if features.size <= 1:
        return [{"input": name}] * features.size
    flat = features.reshape(-1)
    names = []
    for number in range(int(flat[-1]) + 1):
        elements = np.flatnonzero(flat == number)
        member: dict[str, Any] = {"input": name}
        if len(columns):
            member["column"] = ", ".join(columns[element] for element in elements.tolist())
        member["index"] = [int(at) for at in np.unravel_index(elements[0], shape)]
        if len(elements) > 1:
            member["last_index"] = [int(at) for at in np.unravel_index(elements[-1], shape)]
        names.append(member)
    return names


def _choose(query: ExplainQuery, choices: Sequence[str]) -> str:
    """Return the baseline that the request names, or the first of `choices`; raises InvalidInput."""
    if query.baseline is None:
        return choices[0]
    if query.baseline not in choices:
        raise InvalidInput(
            f'"baseline" is {name_text(query.baseline)}; for this input it takes {names_text(choices)}',
            field="baseline",
            expected=list(choices),
            got=query.baseline,
        )
    return query.baseline
