"""The module in C; all else about the package is in pyproject.toml."""

from setuptools import Extension, setup

# Where there is no compiler, pysimdjson reads large bodies: as fast, but nothing else runs meanwhile.
setup(
    ext_modules=[
        Extension(
            "service.wire._numbers",
            ["service/wire/_numbers.c"],
            extra_compile_args=["-O3", "-std=c11"],
            optional=True,
        )
    ]
)
