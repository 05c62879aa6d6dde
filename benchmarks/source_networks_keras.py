"""The networks of `sources.py` in Keras."""

from __future__ import annotations

import os
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"

import keras
from keras import layers


def digits() -> Any:
    """Grey pictures [rows, 28, 28, 1] to scores of ten digits."""
    return keras.Sequential([
        keras.Input((28, 28, 1), name="image"),
        layers.Conv2D(16, 3, activation="relu"), layers.MaxPooling2D(2),
        layers.Conv2D(32, 3, activation="relu"), layers.MaxPooling2D(2),
        layers.Flatten(), layers.Dropout(0.5), layers.Dense(10, activation="softmax", name="digit"),
    ])  # fmt: skip


def cifar10() -> Any:
    """Pictures in colour [rows, 32, 32, 3] to scores of ten things."""
    seen = image = keras.Input((32, 32, 3), name="image")
    for filters in (16, 32, 64):
        seen = layers.Conv2D(filters, 3, padding="same", use_bias=False)(seen)
        seen = layers.MaxPooling2D(2)(layers.ReLU()(layers.BatchNormalization()(seen)))
    return keras.Model(image, layers.Dense(10, activation="softmax", name="thing")(layers.Flatten()(seen)))


def reviews() -> Any:
    """Tokens [rows, tokens], 0 for padding, to scores of negative and positive."""
    return keras.Sequential([
        keras.Input((None,), dtype="int32", name="input_ids"), layers.Embedding(10_000, 16, mask_zero=True),
        layers.GlobalAveragePooling1D(), layers.Dense(16, activation="relu"),
        layers.Dense(2, activation="softmax", name="opinion"),
    ])  # fmt: skip


def news() -> Any:
    """Tokens [rows, tokens] to scores of four topics, by a convolution; there is no mask."""
    return keras.Sequential([
        keras.Input((None,), name="input_ids"), layers.Embedding(8_000, 32),
        layers.Conv1D(64, 3, padding="same", activation="relu"), layers.GlobalMaxPooling1D(),
        layers.Dense(4, activation="softmax", name="topic"),
    ])  # fmt: skip


def words() -> Any:
    """Eight tokens to scores of the next one."""
    return keras.Sequential([
        keras.Input((8,), dtype="int32", name="input_ids"), layers.Embedding(1_500, 64), layers.LSTM(96),
        layers.Dense(1_500, activation="softmax", name="word"),
    ])  # fmt: skip


def diabetes() -> Any:
    """Ten measurements of a patient, scaled, to the disease's progression: linear regression."""
    return keras.Sequential([keras.Input((10,), name="features"), layers.Dense(1, name="progression")])


def prices() -> Any:
    """Eight measurements of a district to its median price; its first layer has to be adapted."""
    return keras.Sequential([
        keras.Input((8,), name="features"), layers.Normalization(),
        layers.Dense(64, activation="relu"), layers.Dense(64, activation="relu"), layers.Dense(1),
        layers.Rescaling(100_000.0, name="price"),
    ])  # fmt: skip


def closes() -> Any:
    """Twenty closing prices to the next one."""
    prices_before = keras.Input((20,), name="closes")
    last = prices_before[:, -1:]
    seen = layers.LSTM(16)(layers.Reshape((20, 1))(20.0 * (prices_before / last - 1.0)))
    change = layers.Dense(1)(seen)
    return keras.Model(prices_before, layers.Multiply(name="close")([last, 1.0 + 0.01 * change]))
