"""The messages of the protocol, as classes of protobuf.

The classes are made of a descriptor, in a pool of its own. Code that protoc writes would ask for the versions
of protobuf that protoc knows, and would share a pool with clients in the same process: the names of messages
are those of every client of the protocol.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClassesForFiles
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

SERVICE: Final = "inference.GRPCInferenceService"
HEALTH_SERVICE: Final = "grpc.health.v1.Health"
REFLECTION_SERVICE: Final = "grpc.reflection.v1alpha.ServerReflection"
_PACKAGE: Final = "inference"


def _make_pool() -> tuple[DescriptorPool, dict[str, Any]]:
    """Return the pool, which reflection shows, and the classes of the protocol's messages by name."""
    pool = DescriptorPool()
    files = FileDescriptorSet.FromString(Path(__file__).with_name("open_inference.binpb").read_bytes())
    for file in files.file:
        pool.Add(file)
    for module in (health_pb2, reflection_pb2):
        pool.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
    return pool, GetMessageClassesForFiles([file.name for file in files.file], pool)


POOL, _CLASSES = _make_pool()


def message(name: str) -> Any:
    """Return the class of the message `name`, such as `ModelInferRequest`."""
    return _CLASSES[f"{_PACKAGE}.{name}"]
