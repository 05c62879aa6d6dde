"""Measures whether requests should travel to the card straight from the memory that they were received in.

    python benchmarks/gpu_slots.py [--mebibytes 256] [--rows 16] [--seconds S] [--out FOLDER]

A request of ROWS FP16 pictures of 224 × 224 lies in memory that processes share (a memfd). Today its rows are
copied into page-locked memory by one thread, and from there to the card in one copy. If the shared memory
were registered with CUDA, each request could be copied to the card from where it lies. The script measures
how long registering takes, and both ways in GB/s, for batches of four requests. It needs PyTorch and a card.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

REQUESTS: Final = 4
"""Requests in a batch."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--mebibytes", type=int, default=256, help="size of the shared memory")
    parser.add_argument("--rows", type=int, default=16, help="rows of a request")
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    size = options.mebibytes << 20
    descriptor = os.memfd_create("slots")
    os.ftruncate(descriptor, size)
    shared = np.frombuffer(mmap.mmap(descriptor, size), np.uint8)
    shared[:] = 1
    length = options.rows * 3 * 224 * 224 * 2
    slots = [torch.from_numpy(shared[at : at + length]) for at in range(0, size - length, length)]
    device = torch.empty(REQUESTS * length, dtype=torch.uint8, device="cuda")
    staged = torch.empty(REQUESTS * length, dtype=torch.uint8, pin_memory=True)
    report: dict[str, Any] = {"bytes": size, "request_bytes": length, "device": torch.cuda.get_device_name()}

    def gather(batch: list[torch.Tensor]) -> None:
        for number, slot in enumerate(batch):
            staged[number * length : (number + 1) * length].copy_(slot)
        device.copy_(staged, non_blocking=True)
        torch.cuda.synchronize()

    def straight(batch: list[torch.Tensor]) -> None:
        for number, slot in enumerate(batch):
            device[number * length : (number + 1) * length].copy_(slot, non_blocking=True)
        torch.cuda.synchronize()

    def rate(copy: Callable[[list[torch.Tensor]], None]) -> float:
        copies, began = 0, time.perf_counter()
        while time.perf_counter() < began + options.seconds:
            first = copies * REQUESTS % (len(slots) - REQUESTS)
            copy(slots[first : first + REQUESTS])
            copies += 1
        return float(copies * REQUESTS * length / (time.perf_counter() - began) / 1e9)

    torch.set_num_threads(1)
    report["gathered_gb_s"] = rate(gather)
    report["not_registered_gb_s"] = rate(straight)
    began = time.perf_counter()
    status = torch.cuda.cudart().cudaHostRegister(shared.ctypes.data, size, 0)
    report["register_ms"] = 1000 * (time.perf_counter() - began)
    report["register_status"] = int(status)
    report["registered_gb_s"] = rate(straight)
    # Slots give their memory back by punching holes: does a copy see what is written there afterwards?
    slot = slots[0]
    fallocate(descriptor, slot.numel())
    slot[:] = 7
    straight(slots[:REQUESTS])
    report["sees_what_is_written_after_a_hole"] = bool((device[:length] == 7).all())
    print(json.dumps(report, indent=1))
    (options.out / "gpu-slots.json").write_text(json.dumps(report, indent=1) + "\n")


def fallocate(descriptor: int, length: int) -> None:
    """Give the first `length` bytes of a file back, and keep its size."""
    keep_size_and_punch_hole = 0x01 | 0x02
    libc = ctypes.CDLL(None, use_errno=True)
    offset, pages = ctypes.c_long(0), ctypes.c_long(length // 4096 * 4096)
    if libc.fallocate(descriptor, keep_size_and_punch_hole, offset, pages):
        raise OSError(ctypes.get_errno(), "fallocate")


if __name__ == "__main__":
    main()
