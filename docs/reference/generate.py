"""Write the tables of the reference pages from the code; `--check` only says which pages are out of date.

A page keeps its own text. The generator replaces the lines between `<!-- generated: NAME -->` and
`<!-- end -->`, for the names in `TABLES`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import yaml
from inferpool import cli, errors
from inferpool.backends.onnx.row_analysis.analysis import RULES as ONNX_RULES
from inferpool.backends.torch.row_analysis.rules import RULES as ATEN_RULES
from inferpool.http.problems import GRPC_STATUSES, STATUSES
from inferpool.observe.families import FAMILIES
from inferpool.repository.config import ModelConfig
from inferpool.settings import Settings
from inferpool.settings_sources import add_flags
from pydantic import BaseModel
from pydantic.fields import FieldInfo

DOCS: Final = Path(__file__).parents[1]
RULES: Final = DOCS.parent / "docker" / "prometheus" / "rules.yml"
REGION: Final = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

REMEDIES: Final = {
    "malformed_body": "Send what the headers say. `detail` names the position or the tensor.",
    "unauthorized": "Send a key as `Authorization: Bearer` or `X-Api-Key`; `reason` says what is wrong.",
    "forbidden": "Use a key with the scope that `detail` names. Without keys, the admin routes are off.",
    "not_found": "See `/docs` for the paths.",
    "model_not_found": "See `GET /models` for the names.",
    "version_not_found": "See `GET /models/MODEL` for the versions and labels.",
    "method_not_allowed": "Use a method that `Allow` lists.",
    "malformed_request": "Send a request that follows HTTP/1.1; the connection is closed.",
    "unsupported_transfer_coding": "Send `Transfer-Encoding: chunked` alone, without other codings.",
    "head_too_large": "Send fewer or shorter headers: `max_head_bytes` is the most, by default 64 KiB.",
    "too_slow": "Send the request within a minute, or at least 64 KiB of it in each minute.",
    "body_too_large": "Stay below `limit` bytes or characters, or `max_pixels` pixels.",
    "unsupported_media_type": "Send a format that `expected` lists.",
    "invalid_input": "Compare `expected` with `got`; `tensor` or `field` says where.",
    "model_rejected": "Change the input; `detail` has the operation and the runtime's reason.",
    "queue_full": "Try again after `Retry-After`.",
    "conflict": "Do what the answer says, or wait for the job that is under way.",
    "load_failed": "Correct the file that `detail` names, and load the model again.",
    "rate_limited": "Try again after `Retry-After`; see [tenants](../tenants.md).",
    "internal_error": "Look into the log for the `request_id`, and report the defect.",
    "model_failed": "Look into the log for the `request_id`.",
    "model_crashed": "Do not send this input again: the log names the request. Report the model.",
    "not_ready": "See `GET /models/MODEL` for the state and its reason; try again after `Retry-After`.",
    "draining": "Send the request to another server.",
    "overloaded": "Try again after `Retry-After`, or raise `in_flight_bytes`.",
    "deadline_exceeded": "Give a longer timeout, or send less.",
    "run_timeout": "Send less, or raise the setting `run_timeout_s` if the model needs that long.",
}
"""The action that a client takes for each error."""


def row(*cells: str) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def table(header: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    """A Markdown table."""
    return "\n".join([row(*header), "|" + "---|" * len(header), *(row(*cells) for cells in rows)])


def code(text: str) -> str:
    """Text as code in Markdown."""
    return f"`{text}`"


def settings() -> str:
    """Every setting: its flag, variable, default and meaning."""
    parser = argparse.ArgumentParser(add_help=False)
    add_flags(parser)

    def rows() -> Iterator[tuple[str, ...]]:
        for action in parser._actions:
            described = re.fullmatch(r"(.*) \[(\w+); default: (.*)\]", action.help or "", re.DOTALL)
            assert described is not None, action.help
            text, variable, default = described.groups()
            shown = default if default == "none" else code(default)
            yield code(action.option_strings[0]), code(variable), shown, text

    return table(("flag", "variable", "default", "meaning"), rows())


def config_keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key that a `model.toml` may have, with its field."""
    for name, info in model.model_fields.items():
        kinds: list[Any] = [info.annotation, *getattr(info.annotation, "__args__", ())]
        inner = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
        if inner is not None:
            yield from config_keys(inner, f"{prefix}{name}.")
        else:
            yield prefix + name, info


def default_text(info: FieldInfo) -> str:
    """The default of a key, as a reader of the table needs it."""
    if info.is_required():
        return "required"
    default = info.get_default(call_default_factory=True)
    if default is None or default == {}:
        extra = info.json_schema_extra
        return str(extra["unset"]) if isinstance(extra, dict) and "unset" in extra else "none"
    if isinstance(default, bool):
        return code(str(default).lower())
    return code(f'"{default}"' if isinstance(default, str) else str(default))


def model_toml() -> str:
    """Every key of a `model.toml`: its default and meaning."""

    def rows() -> Iterator[tuple[str, ...]]:
        for key, info in config_keys(ModelConfig):
            assert info.description, f"{key} has no description"
            yield code(key), default_text(info), info.description

    return table(("key", "default", "meaning"), rows())


def error_classes(root: type[errors.InferpoolError] = errors.InferpoolError) -> Iterator[type]:
    """Every class of the error tree."""
    yield root
    for child in root.__subclasses__():
        yield from error_classes(child)


def error_codes() -> str:
    """Every error code: its statuses of HTTP and gRPC, its meaning and what to do."""
    by_name = {kind.__name__.lower(): kind for kind in error_classes()}

    def rows() -> Iterator[tuple[str, ...]]:
        for name, status in STATUSES.items():
            kind = by_name[name.replace("_", "")]
            meaning = " ".join((kind.__doc__ or "").split("\n\n")[0].split())
            yield code(name), str(status), code(GRPC_STATUSES[name]), meaning, REMEDIES[name]

    return table(("code", "status", "of gRPC", "meaning", "what to do"), rows())


def metrics() -> str:
    """Every metric: its kind, labels and meaning."""

    def rows() -> Iterator[tuple[str, ...]]:
        for family in FAMILIES.values():
            yield code(family.full_name), family.kind, ", ".join(map(code, family.labels)), family.help

    return table(("metric", "kind", "labels", "meaning"), rows())


def alerts() -> str:
    """Every alert: how long its condition must hold, its severity and its summary."""
    found = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]

    def plain(text: str) -> str:
        text = re.sub(r"\{\{ \$labels\.(\w+) \}\}", lambda match: match[1].upper(), text)
        return re.sub(r"\{\{ \$value.*?\}\}", "N", text)

    def rows() -> Iterator[tuple[str, ...]]:
        for rule in (rule for group in found for rule in group["rules"] if "alert" in rule):
            name, summary = rule["alert"], plain(rule["annotations"]["summary"])
            link = f"[{code(name)}](../operate/runbook.md#{name.lower()})"
            yield link, rule["labels"]["severity"], rule.get("for", "at once"), summary

    return table(("alert", "severity", "for", "summary"), rows())


def commands() -> str:
    """Every command: its usage, what it does, and the options that are no settings."""
    flags = {"--" + name.replace("_", "-") for name in Settings.model_fields}
    parts = []
    for name, parser in _all_commands(cli._parser()).items():
        options = [
            action
            for action in parser._actions
            if action.help != argparse.SUPPRESS and not flags.intersection(action.option_strings)
        ]
        lines = [f"## inferpool {name}", "", parser.description or "", ""]
        rows = ((code(_spelled(action)), (action.help or "").replace("%%", "%")) for action in options)
        lines.append(table(("argument", "meaning"), rows))
        accepted = [flag for action in parser._actions for flag in action.option_strings if flag in flags]
        if len(accepted) == len(flags):
            lines += ["", "It also takes a flag for each of the [settings](settings.md)."]
        elif accepted:
            listed = ", ".join(map(code, accepted))
            lines += ["", f"It also takes the flags of these [settings](settings.md): {listed}."]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def scripts() -> str:
    """Every script: the first sentence of the comment at its top."""

    def rows() -> Iterator[tuple[str, ...]]:
        for file in sorted((DOCS.parent / "scripts").iterdir()):
            if file.is_file() and not file.name.startswith("_"):
                comment = file.read_text(encoding="utf-8").splitlines()[1].removeprefix("# ")
                yield code(f"scripts/{file.name}"), comment

    return table(("script", "job"), rows())


def onnx_rules() -> str:
    """The operations of ONNX that have a rule."""
    return _names(ONNX_RULES)


def aten_rules() -> str:
    """The operations of ATen that have a rule."""
    return _names(ATEN_RULES)


def _names(rules: Mapping[str, object]) -> str:
    return ", ".join(map(code, sorted(rules, key=str.lower)))


def _all_commands(parser: argparse.ArgumentParser, prefix: str = "") -> dict[str, argparse.ArgumentParser]:
    """The parser of each command and of the commands below it, by its name."""
    found = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, own in action.choices.items():
                found |= {prefix + name: own, **_all_commands(own, f"{prefix}{name} ")}
    return found


def _spelled(action: argparse.Action) -> str:
    if not action.option_strings:
        return str(action.metavar or action.dest)
    value = "" if action.nargs == 0 else f" {action.metavar or action.dest.upper()}"
    return ", ".join(action.option_strings) + value


TABLES: Final[dict[str, Callable[[], str]]] = {
    "settings": settings,
    "model-toml": model_toml,
    "errors": error_codes,
    "metrics": metrics,
    "alerts": alerts,
    "commands": commands,
    "scripts": scripts,
    "onnx-rules": onnx_rules,
    "aten-rules": aten_rules,
}


def written(text: str) -> str:
    """The page `text` with its tables as the code has them now."""
    return REGION.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}", text)


def main() -> int:
    """Write the pages; with `--check`, write nothing and exit with 1 if a page would change."""
    parser = argparse.ArgumentParser(description="Write the tables of the reference pages from the code.")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 if a page is out of date"
    )
    check = parser.parse_args().check
    stale = []
    for page in sorted(DOCS.rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        new = written(text)
        if new != text:
            stale.append(page)
            if not check:
                page.write_text(new, encoding="utf-8")
    for page in stale:
        state = "out of date" if check else "written"
        sys.stderr.write(f"{page.relative_to(DOCS.parent)}: {state}\n")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
