"""PyTriton: Triton's web server, scheduler and dynamic batcher; the model in a Python process."""

from __future__ import annotations

import os
import signal
import sysconfig
import tempfile
from typing import Any

# Triton must use exactly this Python: the machine may have another library of the same version.
os.environ["LD_LIBRARY_PATH"] = sysconfig.get_config_var("LIBDIR")
os.environ["PYTRITON_HOME"] = tempfile.gettempdir()

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, QueuePolicy, Tensor
from pytriton.triton import Triton, TritonConfig
from shared import Model, arguments, free_port

given = arguments()
model = Model(given.model, given.kind)


@batch
def predict(inputs: np.ndarray) -> list[np.ndarray]:
    """A batch that Triton has put together: (rows, …), or (rows, 1) of bytes."""
    if given.kind in ("jpeg", "text"):
        return [model.run([model.decode(item[0]) for item in inputs])]
    return [model.run_batch(inputs)]


width = model.run([model.decode(b"a")]).shape[1:] if given.kind == "text" else None
of_bytes = given.kind in ("jpeg", "text")
policy: dict[str, Any] = (
    {"default_queue_policy": QueuePolicy(max_queue_size=given.queue)} if given.queue else {}
)
# The same as Ctrl-C: stops Triton and frees its shared memory.
signal.signal(signal.SIGTERM, signal.default_int_handler)
settings = TritonConfig(
    http_address="127.0.0.1", http_port=given.port, allow_grpc=False, allow_metrics=False,
    metrics_port=free_port(), grpc_port=free_port(),
)  # fmt: skip
with Triton(config=settings) as triton:
    triton.bind(
        model_name="model",
        infer_func=[predict] * given.workers,
        inputs=[
            Tensor(name="inputs", dtype=bytes, shape=(1,))
            if of_bytes
            else Tensor(name="inputs", dtype=np.float32, shape=tuple(model.shape))
        ],
        outputs=[Tensor(name="outputs", dtype=np.float32, shape=width or (-1,))],
        config=ModelConfig(
            batching=True,
            max_batch_size=given.rows,
            # No delay: Triton's batcher takes all waiting requests when an instance is free.
            batcher=DynamicBatcher(max_queue_delay_microseconds=0, **policy),
        ),
    )
    triton.serve()
