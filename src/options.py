"""From the signature of a function to its command line: options, YAML files, help, and errors that suggest.

jsonargparse reads types, defaults and docstrings; what is added here is the spelling (`--dashed-names`,
`--flag/--no-flag`) and errors that fit on one line, name the file they stem from and suggest the right name.
"""

from __future__ import annotations

import inspect
import re
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, NoReturn, get_args, get_origin

from jsonargparse import ActionConfigFile, ActionYesNo, ArgumentParser, set_parsing_settings  # type: ignore[attr-defined]
from omegaconf.errors import OmegaConfBaseException

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

_DOT = "%2E"
"""Stands for a dot within the key of a table while the parser reads it."""


def read_options(function: Callable[..., None], prog: str, argv: Sequence[str]) -> dict[str, Any]:
    """The keyword arguments of `function` that the words of `argv` and its `--config` files stand for.

    A first word that is no option is the value of the first one, if that is required: `mmrlhf data check DIR`.
    """
    parser = option_parser(function, prog)
    first = next(iter(inspect.signature(function).parameters.values()), None)
    if argv and not argv[0].startswith("-") and first is not None and first.default is first.empty:
        argv = [f"--{first.name}", *argv]
    try:
        arguments = parser.parse_args(parser.keyed([parser.dashed(word) for word in argv]))
    except OmegaConfBaseException as error:  # some of them are no ValueError
        raise ValueError(f"interpolation: {error}") from error
    arguments.pop("config", None)
    return dict(parser.instantiate(parser.with_dots(arguments)))


def option_parser(function: Callable[..., None], prog: str) -> OptionParser:
    """The parser of one function, made from its signature and its docstring."""
    guard_configs()
    parser = OptionParser(
        prog=prog,
        description=(inspect.getdoc(function) or "").split("\nArgs:")[0],
        parser_mode="omegaconf+",  # resolves ${...} after the command line, so that an override reaches it
        print_config="--print-config",
        allow_abbrev=False,
    )
    parser.add_argument(
        "-c",
        "--config",
        action=ConfigFile,
        metavar="FILE",
        help="YAML with values for the options below; repeatable. Of two values, the later on the line wins.",
    )
    parser.add_function_arguments(function, as_group=False)
    return parser


def guard_configs() -> None:
    """A config may come from somebody else: it may name classes, but none that run commands or unpickle."""
    set_parsing_settings(import_path_denylist=[], instantiate_subclass_spec_in_any=False)


class ExplainingParser(ArgumentParser):
    """jsonargparse with errors that fit on one line and suggest the right name."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what the parser found, as an error of the user."""
        raise ValueError(self.explain(message)) from ex

    def explain(self, message: str) -> str:
        """A message of the parser on one line, with a suggestion where a name is unknown."""
        message = " ".join(message.split())
        if found := re.match(r"unrecognized arguments: ([^\s=]+)", message):
            return f"unknown option {found[1]!r}{did_you_mean(found[1], self._option_string_actions)}"
        if found := re.match(r"the following arguments are required: (.+)", message):
            return f"required, but neither an option nor in a --config file: {found[1]}"
        if found := re.match(r"Unexpected config: ?(.*)", message):
            return f"expected lines of the form `key: value`, got {found[1] or 'none'}"
        if found := re.fullmatch(r"(?:Group '(.+)' does not accept o|O)ption '(.+?)'(?: is .+)?", message):
            key = ".".join(filter(None, found.groups()))
            return f"unknown key {key!r}{did_you_mean(key, [action.dest for action in self._actions])}"
        if found := re.match(r"Value not boolean: (.+)\.$", message):
            flags = ", ".join(action.dest for action in self._actions if isinstance(action, ActionYesNo))
            return f"expected true or false, got {found[1]!r} (for one of: {flags})"
        message = re.sub(r"Expected a <class '(\w+)'>\. Got value:", r"expected \1, got", message)
        return re.sub(r'^Parser key "([^"]+)":', r"\1:", message)


class OptionParser(ExplainingParser):
    """The same with `--dashed-names` and `--flag/--no-flag`."""

    def add_argument(self, *args: str, **kwargs: Any) -> Any:  # noqa: ANN401 - as the method it extends
        """Add one option, spelt with dashes; a bool becomes a pair of flags."""
        if kwargs.get("type") is bool:
            del kwargs["type"]
            kwargs["action"] = ActionYesNo(no_prefix="no-")
        return super().add_argument(*(word.replace("_", "-") for word in args), **kwargs)

    def dashed(self, word: str) -> str:
        """`--max_parallel=2` as `--max-parallel=2` if that is an option; keys of a class stay as they are."""
        name, equals, value = word.partition("=")
        parts = name.split(".")
        for cut in range(len(parts), 0, -1):
            head = ".".join(parts[:cut]).replace("_", "-")
            if head in self._option_string_actions:
                return ".".join([head, *parts[cut:]]) + equals + value
        return word

    def keyed(self, words: Sequence[str]) -> list[str]:
        """`--axes.model.beta.w 0,0.5` as one word, where `axes` is a table of lists by dotted names.

        The parser takes what stands behind a dot for the key of a table, and another dot for a table within it.
        """
        found, waiting = [], iter(words)
        for word in waiting:
            name, equals, value = word.partition("=")
            table = next((table for table in self._tables() if name.startswith(f"--{table}.")), None)
            if table is None:
                found.append(word)
                continue
            value = value if equals else next(waiting, "--")
            if value.startswith("--"):
                raise ValueError(f"{name}: expected a value, got none")
            if self._tables()[table] is list and not value.startswith("["):
                value = f"[{value}]"
            key = name.removeprefix(f"--{table}.").replace(".", _DOT)
            found.append(f"--{table}.{key}={value}")
        return found

    def with_dots(self, arguments: Any) -> Any:  # noqa: ANN401 - the parser's namespace
        """The same values, the keys of tables as they were written; of a key given twice, the later value."""
        for table in self._tables():
            name = table.replace("-", "_")
            if isinstance(there := arguments.get(name), dict):
                arguments[name] = {key.replace(_DOT, "."): value for key, value in there.items()}
        return arguments

    def dump(self, cfg: Any, **kwargs: Any) -> str:  # noqa: ANN401 - as the method it extends
        """Print values as they were written."""
        return str(super().dump(self.with_dots(cfg.clone()), **kwargs))

    def _tables(self) -> dict[str, Any]:
        """The options that are tables by name, and of what."""
        found = {}
        for action in self._actions:
            hints = [getattr(action, "_typehint", None)]
            hints += [hint for hint in get_args(hints[0]) if hint is not NoneType]
            for hint in (hint for hint in hints if get_origin(hint) is dict):
                found[action.dest.replace("_", "-")] = get_origin(get_args(hint)[1])
        return found


class ConfigFile(ActionConfigFile):
    """`--config FILE`, whose errors name the file."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:  # noqa: ANN401
        """Read one file into the values so far."""
        if not Path(values).is_file():
            raise ValueError(f"config {values!r}: no such file")
        try:
            super().__call__(parser, cfg, values, option_string)  # type: ignore[no-untyped-call]
            # The parser compares keys only after everything is merged, when nobody knows their file any more.
            parser.validate(cfg, skip_required=True)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"config {values!r}: {parser.explain(str(error))}") from error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The nearest known name as the end of an error message, or nothing.

    >>> did_you_mean("--quereis", ["--queries", "--seed"])
    "; did you mean '--queries'?"
    >>> did_you_mean("zebra", ["--queries", "--seed"])
    ''
    """
    nearest = get_close_matches(name, list(known), n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""
