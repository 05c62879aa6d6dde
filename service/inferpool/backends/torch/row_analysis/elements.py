"""Operations on one element, or on elements in the same position; and those that draw random numbers."""

from __future__ import annotations

from typing import Final

from inferpool.backends.row_analysis.elementwise import combine
from inferpool.backends.row_analysis.values import Kind, Value, mixed, unknown
from inferpool.backends.torch.row_analysis.call import Call, CallRule


def elementwise(call: Call) -> list[Value]:
    """Every tensor is an operand, broadcast to the shape of the result."""
    return call.every(combine(call.step(call.operation), call.tensors()))


def first_input(call: Call) -> list[Value]:
    """The elements of the first tensor, one by one; the other arguments hold for all of them."""
    value, *others = call.tensors()
    if any(other.kind is not Kind.SHARED for other in others):
        return call.every(unknown(f"{call.label}: a parameter depends on the rows"))
    return call.every(combine(call.step(call.operation), [value]))


def identity(call: Call) -> list[Value]:
    """The first tensor as it is."""
    return call.every(call.first())


def dropout(call: Call) -> list[Value]:
    """Dropout does nothing unless it trains."""
    if call.flag("train", default=True):
        return call.every(unknown(f"{call.label} drops elements at random"))
    return call.every(call.first())


def per_channel(call: Call) -> list[Value]:
    """PReLU: a weight for each index of the second axis."""
    value = call.first()
    weight = call.value("weight")
    if weight is None or weight.kind is not Kind.SHARED:
        return call.every(unknown(f"{call.label}: its weights depend on the rows"))
    if value.kind is Kind.ROWED and value.axis == 1 and (weight.shape is None or weight.shape != ()):
        return call.every(unknown(f"{call.label} takes the rows for channels"))
    return call.every(combine(call.step(call.operation), [value]))


def quantise_channels(call: Call) -> list[Value]:
    """quantize_per_channel: a scale for each index of an axis."""
    value = call.first()
    if value.kind is Kind.ROWED and call.number("axis") == value.axis:
        return call.every(unknown(f"{call.label}: its scales lie along the rows"))
    return first_input(call)


def among(call: Call) -> list[Value]:
    """Isin and bucketize: each element among shared values."""
    if not isinstance(call.arguments.get("elements", call.arguments.get("self")), Value):
        return call.every(unknown(f"{call.label} compares one number with a tensor"))
    return first_input(call)


def where(call: Call) -> list[Value]:
    """Where: with three operands; with the condition alone it lists positions."""
    if "self" not in call.arguments and "other" not in call.arguments:
        if call.first().kind is Kind.SHARED:
            return call.without_rows()
        return call.every(mixed(f"{call.label} lists the elements of all rows one after another"))
    return elementwise(call)


def searchsorted(call: Call) -> list[Value]:
    """Searchsorted: in one sorted list, or in a list of each row."""
    lists, values = call.value("sorted_sequence"), call.value("self")
    if lists is None or values is None:
        return call.every(unknown(f"{call.label}: an input is left out"))
    if lists.kind is Kind.SHARED and lists.rank == 1:
        return call.every(combine(call.step(call.operation), [values]))
    if lists.kind is Kind.SHARED and values.kind is Kind.SHARED:
        return call.without_rows()
    if lists.kind is not Kind.ROWED or values.kind is not Kind.ROWED or lists.rank != values.rank:
        return call.every(unknown(f"{call.label}: only one of its inputs has rows"))
    if lists.axis != values.axis or not lists.lies_as(values) or lists.axis == (lists.rank or 0) - 1:
        return call.every(mixed(f"{call.label} searches among the rows"))
    return call.every(values)


def random(call: Call) -> list[Value]:
    """The operation draws random numbers."""
    return call.every(unknown(f"{call.label} draws random numbers"))


ELEMENTWISE: Final = (
    "abs", "absolute", "acos", "acosh", "add", "addcdiv", "addcmul", "angle", "arccos", "arcsin", "arctan",
    "asin", "asinh", "atan", "atan2", "atanh", "__and__", "__or__", "__xor__", "__lshift__", "__rshift__",
    "bitwise_and", "bitwise_left_shift", "bitwise_not", "bitwise_or", "bitwise_right_shift", "bitwise_xor",
    "ceil", "celu", "clamp", "clamp_max", "clamp_min", "clip", "complex", "conj", "conj_physical", "copy",
    "copysign", "cos", "cosh", "deg2rad", "digamma", "div", "divide", "elu", "eq", "erf", "erfc", "erfinv",
    "exp", "exp2", "expm1", "fill", "floor", "floor_divide", "fmax", "fmin", "fmod", "frac",
    "ge", "gelu", "greater", "greater_equal", "gt", "hardshrink", "hardsigmoid", "hardswish", "hardtanh",
    "heaviside", "hypot", "igamma", "isfinite", "isinf", "isnan", "isneginf", "isposinf", "leaky_relu", "le",
    "lerp", "less", "less_equal", "lgamma", "log", "log10", "log1p", "log2", "log_sigmoid", "logaddexp",
    "logaddexp2", "logical_and", "logical_not", "logical_or", "logical_xor", "logit", "lt", "masked_fill",
    "maximum", "minimum", "mish", "mul", "multiply", "nan_to_num", "ne", "neg", "negative", "not_equal",
    "polygamma", "positive", "pow", "rad2deg", "reciprocal", "relu", "relu6", "remainder",
    "resolve_conj", "resolve_neg", "round", "rsqrt", "rsub", "selu", "sgn", "sigmoid", "sign", "signbit",
    "silu", "sin", "sinc", "sinh", "softplus", "softshrink", "special_erf", "special_erfcx",
    "special_expit", "special_expm1", "special_i0", "special_log1p", "special_logit", "special_xlogy",
    "sqrt", "square", "sub", "subtract", "tan", "tanh", "threshold", "true_divide",
    "trunc", "xlogy", "zero", "real", "imag",
    # These make a tensor like the first one, with content of its own.
    "zeros_like", "ones_like", "full_like",
)  # fmt: skip

RANDOM: Final = (
    "bernoulli", "cauchy", "exponential", "geometric", "log_normal", "multinomial", "normal",
    "normal_functional", "poisson", "rand", "rand_like", "randint", "randint_like", "randn", "randn_like",
    "random", "randperm", "rrelu", "rrelu_with_noise", "uniform",
)  # fmt: skip

RULES: Final[dict[str, CallRule]] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys(RANDOM, random),
    **dict.fromkeys(
        ("alias", "clone", "contiguous", "detach", "detach_copy", "lift", "lift_fresh", "lift_fresh_copy",
         "to", "_to_copy", "type_as", "_conj"),
        identity,
    ),
    **dict.fromkeys(
        ("fake_quantize_per_tensor_affine", "fake_quantize_per_tensor_affine_cachemask",
         "quantized_decomposed.quantize_per_tensor", "quantized_decomposed.dequantize_per_tensor",
         "quantize_per_tensor", "dequantize"),
        first_input,
    ),
    **dict.fromkeys(
        ("quantized_decomposed.quantize_per_channel", "quantized_decomposed.dequantize_per_channel"),
        quantise_channels,
    ),
    **dict.fromkeys(
        ("dropout", "native_dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout"), dropout
    ),
    "prelu": per_channel,
    "_prelu_kernel": elementwise,
    "where": where,
    "bucketize": among,
    "isin": among,
    "searchsorted": searchsorted,
}  # fmt: skip
