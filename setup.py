"""What is compiled where the package is installed; all else about it is in pyproject.toml.

Those are modules in C, and the hot path. Without a compiler all are left out, with a warning: the server does
the same without them, more slowly.
"""

import os
import runpy
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HOT_PATH = [
    *(f"service/http/{name}.py" for name in (
        "bodies", "call", "dialect", "exchange", "head", "heads", "heavy", "intake", "link", "lines",
        "muster", "native", "outlet", "predict", "recorder", "served", "turn", "v2", "volley")),
    *(f"service/pool/{name}.py" for name in (
        "assembly", "batch", "counts", "drops", "engine", "instance", "line", "pool", "ports", "profile",
        "queue", "retries")),
    *(f"service/wire/{name}.py" for name in ("document", "infer", "infer_answer", "json", "numbers")),
    "service/metrics.py",
    "service/tensors.py",
]  # fmt: skip
"""What every prediction goes through, but for two kinds of modules.

Classes that interpreted ones inherit from: C forbids that. And loops over what may be millions of elements,
in `wire`: interpreted they let other threads run now and then, compiled they would not.
"""

ROOT = Path(__file__).resolve().parent
# By its path: the package's other modules need what is not installed here.
COMPILED = runpy.run_path(str(ROOT / "service" / "compiled.py"))


class Build(build_ext):
    """Builds the extensions below, then the hot path by mypyc, into the package's folder for such modules."""

    def run(self):
        """Build all there is to build."""
        super().run()
        package = ROOT / "service" if self.inplace or self.editable_mode else Path(self.build_lib) / "service"
        folder = package / COMPILED["FOLDER"]
        if COMPILED["is_off"]():
            shutil.rmtree(folder, ignore_errors=True)
        elif not is_sealed(folder):
            try:
                self.compile_hot_path(folder)
            except (Exception, SystemExit) as error:  # mypyc ends the process where it finds an error
                if os.environ.get(COMPILED["SWITCH"]) == "1":
                    raise
                self.warn(f"the hot path is not compiled, and will run interpreted: {error}")

    def compile_hot_path(self, folder):
        """Compile the hot path, and put it in place in one go: a server may be starting meanwhile."""
        parent = folder.parent
        parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=".compiled-", dir=parent))
        try:
            self.try_compiler(made)
            from mypyc.build import mypycify

            # Types of other packages change nothing in the C, and need not be there.
            modules = mypycify(
                ["--config-file=", "--ignore-missing-imports", *HOT_PATH],
                opt_level="2", debug_level="0", group_name="inferpool", target_dir=str(made / "c"),
            )  # fmt: skip
            with ThreadPoolExecutor() as compilers:
                list(compilers.map(lambda module: self.compile_module(module, made), modules))
            shutil.rmtree(made / "c")
            (made / COMPILED["SEAL"]).write_text(COMPILED["sources"](ROOT / "service"))
            made.chmod(0o755)
            shutil.rmtree(folder, ignore_errors=True)
            made.rename(folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)

    def try_compiler(self, folder):
        """Raise before mypyc takes its time, where there is no compiler or none of Python's headers."""
        probe = folder / "probe.c"
        probe.write_text("#include <Python.h>\n")
        self.compiler.compile([str(probe)], output_dir=str(folder / "c"))
        probe.unlink()

    def compile_module(self, module, folder):
        """Compile and link one of mypyc's extensions into `folder`, under its full name."""
        # Other compilers than mypyc's authors have find other things to warn of.
        flags = [flag for flag in module.extra_compile_args if flag != "-Werror"]
        objects = self.compiler.compile(
            module.sources,
            output_dir=str(folder / "c" / module.name),
            include_dirs=module.include_dirs,
            extra_postargs=flags,
        )
        target = folder / (module.name + self.get_ext_filename("x")[1:])
        self.compiler.link_shared_object(objects, str(target))


def is_sealed(folder):
    """Whether the folder has all of the hot path already, of these very sources."""
    seal = folder / COMPILED["SEAL"]
    if not seal.is_file() or seal.read_text() != COMPILED["sources"](ROOT / "service"):
        return False
    names = (file.removesuffix(".py").replace("/", ".") for file in HOT_PATH)
    return all(any(folder.glob(f"{name}.*")) for name in names)


sys.path.insert(0, str(ROOT))  # mypyc takes the modules' names from where they lie
setup(
    cmdclass={"build_ext": Build},
    ext_modules=[
        # Without them the package does the same, but what reads numbers or moves bytes holds up all else.
        Extension(f"service.{name}", [f"service/{name.replace('.', '/')}.c"],
                  extra_compile_args=["-O3", "-std=c11"], optional=True)
        for name in ("http._lines", "http._muster", "http._volley", "wire._numbers")
    ],
)  # fmt: skip
