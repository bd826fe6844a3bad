"""The command line is generated from dataclasses: flags, `--help`, `--config FILE.yaml`.

The options of an entry point are a frozen dataclass, put together from the groups in `avion/engine/options/`. Values
come from the defaults, then from the YAML file, then from the command line. All three go through the same parser, which
checks types, ranges and choices. Every number declares its range, and the method `check` of a group refuses
combinations that make no sense. All checks happen before any other file is read and before processes meet.
"""

import argparse
import contextlib
import dataclasses
import difflib
import re
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from avion.elsewhere import flag_elsewhere, value_elsewhere
from avion.errors import NOBODY_READS, USER_ERROR, UserError, called_names, stdout_is_closed
from avion.numbers import Number, shown, whole
from avion.plugins import import_plugins
from avion.remote import check_address, is_remote

from .yaml_files import read_yaml_mapping, recipe_flags, unknown_key

T = TypeVar("T", bound="Options")


@dataclass(frozen=True)
class Options:
    """Base of all groups of flags. The values of an object do not change once they are parsed.

    A field that `flag` makes is a flag. An object remembers which flags were given, on the command line or in the YAML
    file; the other flags have their defaults.
    """

    REMOTE_OUTPUT: ClassVar[bool] = False  # whether `--output-dir` may be an address

    _given: frozenset[str] = dataclasses.field(default=frozenset(), repr=False, kw_only=True)
    # What `--output-dir` says, where it is an address and `output_dir` is the working folder of this machine.
    address: str = dataclasses.field(default="", repr=False, kw_only=True)

    def given(self) -> frozenset[str]:
        """The names of the fields whose flags were given."""
        return self._given

    def was_given(self, name: str) -> bool:
        """Return whether the flag of a field was given.

        Args:
            name: The name of the field.

        Returns:
            True where the flag was given on the command line or in the YAML file.

        Raises:
            AttributeError: There is no such field.
        """
        if name not in flag_fields(type(self)):
            raise AttributeError(f"{type(self).__name__} has no flag {name}")
        return name in self._given

    def values(self) -> dict[str, Any]:
        """Return the values of all flags by the names of their fields."""
        values = {name: getattr(self, name) for name in flag_fields(type(self))}
        return {**values, "output_dir": self.address} if self.address else values


def flag_fields(config: type) -> dict[str, dataclasses.Field]:
    """Return the fields of an options class that are flags, by name."""
    return {f.name: f for f in dataclasses.fields(config) if "flag" in f.metadata}


def flag(
    default: Any,
    help: str,
    within: Number | None = None,
    *,
    names: Sequence[str] = (),
    off: str | None = None,
    choices: Sequence | None = None,
    metavar: str | None = None,
) -> Any:
    """Make a dataclass field that is a command-line flag.

    A list takes several values. A `bool | None` is None until it is set.

    Args:
        default: The value without the flag.
        help: The text of the flag in `--help`.
        within: The numbers that the flag takes. An int or float flag without `choices` must state them. Where the flag
            takes a list, they are the range of every number in it.
        names: Other spellings of the flag, beside `--field-name`.
        off: The flag that turns a bool off, if it is not `--no-field-name`; "" for a bool that cannot be turned off.
        choices: The values that the flag takes, where there are only a few.
        metavar: The name of the value in `--help`.

    Returns:
        A field for the body of an options class.
    """
    spec = {"help": help, "within": within, "names": tuple(names), "off": off, "choices": choices, "metavar": metavar}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"flag": spec})
    return dataclasses.field(default=default, metadata={"flag": spec})


def other_default(group: type, name: str, default: Any, help: str | None = None) -> Any:
    """Make a field that changes the default of a flag of a shared group.

    Args:
        group: The shared group.
        name: The name of the field.
        default: The other default.
        help: Another help text; None keeps the text of the shared group.

    Returns:
        A field for the body of an options class that inherits from the group.
    """
    (field,) = (f for f in dataclasses.fields(group) if f.name == name)
    spec = field.metadata["flag"]
    return flag(default, help or spec["help"], **{k: v for k, v in spec.items() if k != "help"})


class ToolParser(argparse.ArgumentParser):
    """An argument parser that ends the program with one line and status 2 for words that it refuses.

    Help and errors name programs as they were called (`avion.errors.called_names`). Every tool takes `--import MODULE`.

    Args:
        doc: The docstring of the program: the first paragraph stands above the flags in the help text, the rest below.
    """

    def __init__(self, *args: Any, doc: str | None = None, **keywords: Any):
        if doc is not None:
            above, _, below = doc.partition("\n\n")
            keywords |= {"description": above, "epilog": below or None}
            keywords |= {"formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(*args, **keywords)
        if self.add_help and type(self) is ToolParser:  # options of dataclasses have a flag of their own for it
            self.add_argument(
                "--import",
                dest="plugins",
                action="append",
                type=self._imported,
                default=[],
                metavar="MODULE",
                help="module, or path of a .py file, to import first, which registers models and mixers (repeatable)",
            )
        self.prog = called_names(self.prog)
        # argparse takes -1e-3 and -inf for flags, and then says that a value is missing.
        self._negative_number_matcher = re.compile(r"-\.?\d.*|-inf.*|-nan", re.IGNORECASE)

    def _imported(self, name: str) -> str:
        """Import the module of `--import` when the flag is read, and return its name."""
        try:
            import_plugins([name])
        except UserError as e:
            self.error(str(e))
        return name

    def error(self, message: str):
        """End the program with status 2 and one line."""
        self.exit(USER_ERROR, f"{UserError(f'{self.prog}: error: {message} (--help says more)')}\n")

    def format_help(self) -> str:
        """Return the help text, in which programs are named as they were called."""
        return called_names(super().format_help())

    def _print_message(self, message: str, file: Any = None) -> None:
        with contextlib.suppress(BrokenPipeError):  # `exit`, which follows, looks for it
            (file or sys.stderr).write(message)

    def exit(self, status: int = 0, message: str | None = None):
        """End the program; status 141, without a message, where nobody reads its output."""
        if message:
            self._print_message(message, sys.stderr)
        raise SystemExit(NOBODY_READS if stdout_is_closed() else status)


_CHOICE = re.compile(r"argument (?:\S+/)?(--[\w-]+): invalid choice: '([^']*)'")


class _Parser(ToolParser):
    """A ToolParser whose errors are UserErrors that suggest a flag of a similar name."""

    def error(self, message: str):
        """Raise UserError with a message that suggests a flag or says where an unknown choice went."""
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            message = "; ".join(self._unknown(a) for a in message[len(prefix) :].split())
        elif (choice := _CHOICE.match(message)) and (elsewhere := value_elsewhere(choice[1], choice[2])):
            message = f"{choice[1]} {choice[2]}: {elsewhere}"
        raise UserError(f"{self.prog}: {message}")

    def _unknown(self, argument: str) -> str:
        if not argument.startswith("-"):
            return f"unexpected value {argument!r} (a value without its flag, or one value too many)"
        name = argument.split("=")[0]
        if elsewhere := flag_elsewhere(name):
            return f"unknown flag {name}: {elsewhere}"
        near = difflib.get_close_matches(name, self._option_string_actions, n=3, cutoff=0.6)
        cure = f"did you mean {' or '.join(near)}?" if near else "see --help for all flags"
        return f"unknown flag {name}: {cure}"


class _Help(argparse.HelpFormatter):
    """Adds the range and the default of a flag to its help text. The defaults None, '' and [] are not shown."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=34, width=110)

    def _get_help_string(self, action):
        text = action.help or ""
        if isinstance(action.type, Number) and action.choices is None:
            text += f"; {action.type.range}"
        default = getattr(action, "shown_default", None)
        if default in (None, "", [], False):
            return text
        if isinstance(default, (list, tuple)):
            default = " ".join(map(str, default))
        return f"{text} [{'on' if default is True else str(default).replace('%', '%%')}]"


def _option_names(field: dataclasses.Field) -> list[str]:
    return [*field.metadata["flag"]["names"], "--" + field.name.replace("_", "-")]


def _off_name(field: dataclasses.Field) -> str:
    return field.metadata["flag"]["off"] or "--no-" + field.name.replace("_", "-")


def _unwrap(annotation: Any) -> tuple[Any, bool]:
    """Return the element type of an annotation, and whether the annotation is a list."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
    if typing.get_origin(annotation) is list:
        return typing.get_args(annotation)[0], True
    return annotation, False


def _default(field: dataclasses.Field) -> Any:
    return field.default_factory() if field.default is dataclasses.MISSING else field.default


def _reader(spec: dict[str, Any], element: type, name: str) -> type | Number:
    """Return the function that makes a value of a word. A number without a range is a mistake of the program."""
    if element not in (int, float):
        return element
    if spec["choices"] is not None:
        return whole(min(spec["choices"]), max(spec["choices"]))
    if not isinstance(spec["within"], Number) or spec["within"].kind is not element:
        raise TypeError(f"flag {name}: {element.__name__} without `within`, the numbers of this type that it takes")
    return spec["within"]


def _add(group, field: dataclasses.Field, annotation: Any) -> None:
    spec, names = field.metadata["flag"], _option_names(field)
    element, is_list = _unwrap(annotation)
    common = {"dest": field.name, "default": argparse.SUPPRESS}
    if element is bool:
        action = group.add_argument(*names, action="store_true", help=spec["help"], **common)
        if spec["off"] != "":
            group.add_argument(_off_name(field), action="store_false", help=argparse.SUPPRESS, **common)
            action.help += f" (off: {_off_name(field)})"
    else:
        default = _default(field)
        count = len(default) if is_list and default else "*" if is_list else None
        action = group.add_argument(
            *names,
            type=_reader(spec, element, field.name),
            nargs=count,
            choices=spec["choices"],
            help=spec["help"],
            metavar=spec["metavar"],
            **common,
        )
        if spec["choices"] is None and spec["metavar"] is None:
            action.metavar = {int: "N", float: "X", str: "STR"}[element]
    action.shown_default = _default(field)


def _groups(config: type) -> dict[str, list[dataclasses.Field]]:
    """Return the flags by the title of the class that declares them first: those of the task, then the shared ones.

    A flag whose default a task changes (`other_default`) stays in the shared group that it comes from.
    """
    fields = flag_fields(config)
    owner = {name: cls for cls in config.__mro__ for name in cls.__dict__.get("__annotations__", {}) if name in fields}
    groups: dict[str, list[dataclasses.Field]] = {}
    for cls in config.__mro__:
        for name in cls.__dict__.get("__annotations__", {}):
            if owner.get(name) is cls:
                groups.setdefault(cls.__dict__.get("TITLE", "options"), []).append(fields[name])
    return groups


def build_parser(config: type, prog: str, description: str) -> argparse.ArgumentParser:
    """Make the argument parser of an options class. The parsed values do not contain flags that were not given.

    Args:
        config: The options class.
        prog: The name of the program, for `--help` and errors.
        description: What the program does, for `--help`.

    Returns:
        The parser.
    """
    parser = _Parser(prog=prog, description=description, formatter_class=_Help, allow_abbrev=False)
    hints = typing.get_type_hints(config)
    parser.add_argument(
        "--config",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="YAML file whose keys are these flags, or a recipe; flags on the command line override the file",
    )
    for title, fields in _groups(config).items():
        group = parser.add_argument_group(title)
        for field in fields:
            _add(group, field, hints[field.name])
    return parser


def flag_words(where: str, flags: dict[Any, Any], config: type) -> list[str]:
    """Return a mapping of flags to values as command-line words.

    Args:
        where: The file, with which messages begin.
        flags: The values by the names of the flags, without dashes in front.
        config: The options class that has the flags.

    Returns:
        The words.

    Raises:
        UserError: A key is unknown, or a value is of another type than the flag.
    """
    fields = flag_fields(config)
    hints = typing.get_type_hints(config)
    words: list[str] = []
    for key, value in flags.items():
        field = fields.get(str(key).replace("-", "_"))
        if field is None:
            raise unknown_key(where, key, fields, "keys are the flags of --help without `--`")
        words += _flag_words(where, str(key), value, field, hints[field.name])
    return words


def _flag_words(where: str, key: str, value: Any, field: dataclasses.Field, annotation: Any) -> list[str]:
    name = "--" + field.name.replace("_", "-")
    if value is None:
        raise UserError(f"{where}: key {key!r} has no value; give one or remove the line")
    element, is_list = _unwrap(annotation)
    if isinstance(value, bool) != (element is bool):
        raise UserError(f"{where}: key {key!r} is {shown(value)}, expected {_expected(element, is_list)}")
    if isinstance(value, bool):
        if field.metadata["flag"]["off"] == "":  # a flag that is off unless it is given
            return [name] if value else []
        return [name] if value else [_off_name(field)]
    if isinstance(value, (dict, list)) and not is_list:
        raise UserError(f"{where}: key {key!r} is {shown(value)}, expected {_expected(element, is_list)}")
    if isinstance(value, dict):  # --model-args {depth: 4} reads better than a list of depth=4
        value = [f"{k}={v}" for k, v in value.items()]
    if isinstance(value, list):
        return [name, *map(str, value)]
    return [f"{name}={value}"]


def _expected(element: type, is_list: bool) -> str:
    one, several = {
        int: ("a whole number", "whole numbers"),
        float: ("a number", "numbers"),
        str: ("a text", "texts"),
        bool: ("true or false", ""),
    }[element]
    return f"a list of {several}" if is_list else one


def _read_file(parser: argparse.ArgumentParser, where: str, content: dict[Any, Any], config: type) -> dict[str, Any]:
    """Return the values of the flags of a file. Each flag is parsed alone, so that an error names its key."""
    values: dict[str, Any] = {}
    for key, value in content.items():
        words = flag_words(where, {key: value}, config)
        try:
            read = vars(parser.parse_args(words))
        except UserError as e:
            reason = str(e).removeprefix(f"{parser.prog}: ")
            raise UserError(f"{where}: key {str(key)!r}: {reason}") from e
        if twice := values.keys() & read.keys():
            raise UserError(f"{where}: key {str(key)!r}: {twice.pop()} is there already, in another spelling; keep one")
        values |= read
    return values


def parse(config: type[T], argv: Sequence[str] | None, prog: str, description: str) -> T:
    """Parse a command line.

    Args:
        config: The options class.
        argv: The words of the command line (None: `sys.argv[1:]`).
        prog: The name of the program, for `--help` and errors.
        description: What the program does, for `--help`.

    Returns:
        The options.

    Raises:
        UserError: The parser refuses a word. The message names the YAML file where the fault is in the file.
    """
    parser = build_parser(config, prog, description)
    values = vars(parser.parse_args(argv))
    path = values.pop("config", None)
    if path is None:
        return _settled(config, values)
    content, where = read_yaml_mapping(path), f"--config {path}"
    if "flags" in content or "entry-point" in content:
        content = recipe_flags(where, content, prog)
    from_file = _read_file(parser, where, content, config)
    try:
        return _settled(config, {**from_file, **values})
    except UserError as e:
        theirs = {"--" + name.replace("_", "-") for name in from_file.keys() - values.keys()}
        if theirs & set(re.findall(r"--[a-z][a-z-]*", str(e))):
            raise UserError(f"{where}: {e}") from e
        raise


def _settled(config: type[T], values: dict[str, Any]) -> T:
    """Make the options of these values, and call the methods `settle` and `check` of each group.

    The modules of `--import` are imported first, because they may register the model that the groups ask about.
    """
    import_plugins(values.get("plugins", ()))
    for group in config.__mro__:
        if "settle" in group.__dict__:
            values = group.settle(values, config)
    for value in values.values():
        for word in value if isinstance(value, list) else [value]:
            if isinstance(word, str):
                check_address(word)
    if is_remote(values.get("output_dir") or "") and not config.REMOTE_OUTPUT:
        raise UserError(f"--output-dir {values['output_dir']}: is an address; a folder of this machine is required")
    result = config(**values, _given=frozenset(values))
    for group in config.__mro__:
        if "check" in group.__dict__:
            group.check(result)
    return result
