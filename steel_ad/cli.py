"""What every binary does around its library call: flags, help, one sentence for an error, caches, log levels."""

import ast
import contextlib
import ctypes
import functools
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, NoReturn, TypeVar

from absl import app, flags, logging

from steel_ad import config as configs
from steel_ad import fields, recipes, usage
from steel_ad.errors import InputError

T = TypeVar("T", bound=fields.Settings)
FLAGS = flags.FLAGS

_CACHE = flags.DEFINE_string(
    "compilation_cache",
    str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "steel_ad" / "xla"),
    "Folder in which compiled programs are kept from run to run; empty: none are.",
)
_NATIVE = flags.DEFINE_bool(
    "native",
    True,
    "Convolutions (on CPU) and SSIM (also on a GPU) compiled once for this machine where it has a compiler; no: XLA's.",
)
_HELP = {"-h", "--h", "-help", "--help", "-helpshort", "--helpshort", "-helpfull", "--helpfull"}

program: list[str] = []  # what was typed before the flags; empty: python -m experiments.NAME


def run(
    main: Callable[..., int | None],
    commands: Mapping[str, Sequence[str]] | None = None,
    *,
    interrupted: str = "run the same command again to go on from the last checkpoint",
) -> None:
    """Parses flags and calls `main`; its return value is the exit status (None: 0).

    With `commands`, each with the names of its flags, exactly one of them is given beside the flags, and `main` is called with it.

    Ctrl-C ends it with what `interrupted` says. An InputError is printed as one sentence and ends with its status; a flag that does not
    exist or does not parse, and a command that is missing or none of `commands`, with 2.
    """
    app.run(
        lambda rest: _guarded(functools.partial(main, *rest[1:]), interrupted),
        flags_parser=functools.partial(_parse, commands=commands or {}),
    )


class _Parser(flags.ArgumentParser):
    def __init__(self, kind: Any):
        self._kind = kind

    def parse(self, argument: Any) -> Any:
        return fields.read(argument, self._kind) if isinstance(argument, str) else argument


class Flags(Generic[T]):
    """Settings as flags: one for each field of a dataclass, or for each of those in `only`.

    Attributes:
      names: field -> flag.
    """

    made: ClassVar[list["Flags"]] = []

    def __init__(
        self,
        kind: type[T],
        only: Sequence[str] = (),
        *,
        title: str = "settings",
        recipe: str = "",
    ):
        self.title, self.recipe, self._kind = title, recipe, kind
        self.fields = [f for f in fields.fields(kind) if not only or f.name in only]
        self.names = {f.name: f"{kind.flag}{f.name}".removeprefix("--") for f in self.fields}
        if "loss_options" in self.names:
            self.names["loss_options"] = "loss_option"
        for field, name in zip(self.fields, self.names.values(), strict=True):
            if name == "loss_option":
                flags.DEFINE_multi_string(name, [], field.help)
            elif name not in FLAGS:  # two commands of a binary may have it
                parser, serializer = _Parser(field.type), flags.ArgumentSerializer()  # type: ignore[var-annotated]
                flag = flags.Flag(parser, serializer, name, None, field.help, boolean=field.type is bool)
                flags.DEFINE_flag(flag)
        self.made.append(self)

    @property
    def given(self) -> dict[str, Any]:
        """Field -> value, of the flags that the command line has."""
        return {f: FLAGS[name].value for f, name in self.names.items() if not FLAGS[name].using_default_value}

    def base(self) -> dict[str, Any]:
        """The settings before flags change them; raises InputError where they cannot be loaded."""
        return recipes.load(FLAGS.config, self.recipe) if self.recipe else {}

    @property
    def value(self) -> T:
        """The settings.

        Raises:
          InputError: a recipe that cannot be loaded, or settings that their class refuses.
        """
        values, given = self.base(), self.given
        if options := given.pop("loss_options", None):
            given["loss_options"] = {**values.get("loss_options", {}), **dict(map(_option, options))}
        return configs.from_mapping(self._kind, {**values, **given})


def _option(text: str) -> tuple[str, Any]:
    """Name and value of a --loss_option."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise InputError(f"--loss_option={text} must have the form name=value")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def define_config(kind: type[T], recipe: str, preset: str) -> Flags[T]:
    """The flag --config, a preset or a recipe of one's own, and --config.FIELD for each of its settings."""
    flags.DEFINE_string("config", preset, "Preset, or FILE.py:PRESET of a recipe of your own.")
    return Flags(kind, recipe=recipe)


def define_run() -> tuple[flags.FlagHolder[str | None], flags.FlagHolder[bool]]:
    """The flags --workdir and --evaluate_only of an experiment that trains, and those of several processes."""
    workdir = flags.DEFINE_string(
        "workdir", None, "Folder of the run: checkpoints, metrics, figures. Run again to resume."
    )
    define_processes()
    return workdir, flags.DEFINE_bool(
        "evaluate_only", False, "Evaluation of the last checkpoint in --workdir, without training."
    )


def define_processes() -> None:
    """The flags of a run of several processes, which `run` then joins."""
    flags.DEFINE_string(
        "coordinator", "", "Process 0 of a run of several processes as host:port, or auto (Slurm, Open MPI, TPU pods)."
    )
    flags.DEFINE_integer(
        "num_processes", None, "Processes of the run, each started with the same command.", lower_bound=1
    )
    flags.DEFINE_integer("process_id", None, "Number of this process among them, from 0.", lower_bound=0)


def define_model() -> flags.FlagHolder[str | None]:
    """The flag --model, a run whose detector is used."""
    return flags.DEFINE_string(
        "model", None, "Workdir of a run of the experiment autoencoder, segmentation, transfer or spectrum."
    )


def define_defects() -> flags.FlagHolder[str]:
    """The flag --defects of the supervised experiments."""
    return flags.DEFINE_string(
        "defects",
        "",
        "Folder of defects on plain steel with masks; procedural (drawn ones); line (pieces of the line's good plates, smoothed "
        "spots and stains); line,FOLDER or line,procedural for both; or labelled (the data set's own). By default its own, else "
        "procedural.",
    )


def required(holder: flags.FlagHolder) -> str:
    """The value of a flag that a run needs.

    Raises:
      InputError: it was not given.
    """
    if not holder.value:
        raise InputError(f"--{holder.name} is missing: --help says what it is")
    return holder.value


def early(name: str, default: str) -> str:
    """The value of a flag before flags are parsed, for what depends on it where flags are defined."""
    values = [w.partition("=")[2] for w in joined(sys.argv[1:]) if w.startswith(f"--{name}=")]
    return values[-1] if values else default


def joined(words: Sequence[str]) -> list[str]:
    """Words of a command line with every flag as one, --name=value, whichever of the forms that flags take it had."""
    found: list[str] = []
    for word in words:
        if re.match(r"-+[A-Za-z]", word):
            found.append("--" + word.lstrip("-"))
        elif found and found[-1].startswith("--") and "=" not in found[-1]:
            found[-1] += f"={word}"
        else:
            found.append(word)
    return found


def _parse(argv: Sequence[str], commands: Mapping[str, Sequence[str]]) -> list[str]:
    # What a user must know is said in one sentence; orbax would log the traceback as well.
    logging.set_verbosity(logging.FATAL)
    words = [re.sub(r"^--?config\.loss_options\.", "--loss_option=", word) for word in argv if word not in _HELP]
    try:
        rest = FLAGS(words)
        if len(words) < len(argv):
            print(usage.text(Flags.made, program), flush=True)
            sys.exit(0)
        _check(rest[1:], commands)
    except BrokenPipeError:
        os._exit(0)  # the reader of the help has seen enough
    except flags.UnrecognizedFlagError as error:
        fail(usage.unknown(error.flagname), 2)
    except flags.Error as error:
        fail(f"{str(error).removeprefix('flag ')}; --help lists the flags", 2)
    except InputError as error:
        fail(str(error), error.status)
    return rest


def _check(words: Sequence[str], commands: Mapping[str, Sequence[str]]) -> None:
    """Looks at what is no flag, and at all settings, before anything that takes time.

    Raises:
      InputError: there is something wrong with them.
    """
    given, names = " ".join(words), ", ".join(commands)
    if commands and given not in commands:
        raise InputError(f"{given!r} is not a command: give one of {names}" if given else f"give a command: {names}")
    if words and not commands:
        raise InputError(f"{given!r} is no flag: every argument has the form --name=value, --help lists them")
    known = commands.get(given, ())
    for name in {name for names in commands.values() for name in names} - set(known):
        if FLAGS[name].present:
            raise InputError(f"--{name} is not a flag of {given}, which has --{', --'.join(known)}")
    for part in Flags.made:
        if not commands or set(part.names.values()) <= set(known):
            _ = part.value


def fail(message: str, status: int) -> NoReturn:
    """Ends the process with one sentence."""
    print("error: " + " ".join(message.splitlines()), file=sys.stderr, flush=True)
    if _watcher is not None:
        _watcher.communicate(b"said")
        # An orderly end would wait for processes that are waiting for this one.
        os._exit(status)
    sys.exit(status)


def _guarded(main: Callable[[], int | None], interrupted: str) -> None:
    keep_freed_memory()
    use_compilation_cache(_CACHE.value)
    if _NATIVE.value:
        from steel_ad import native

        native.enable(_CACHE.value)
    sys.excepthook, sys.unraisablehook = (
        without_closed_loops(sys.excepthook),
        without_closed_loops(sys.unraisablehook),
    )
    try:
        with _as_one_of_several():
            status = main()
    except InputError as error:
        fail(str(error), error.status)
    except Exception as error:
        if _watcher is None:
            raise
        from steel_ad import parallel

        if gone := parallel.lost(error):
            fail(str(gone), gone.status)
        traceback.print_exc()
        fail("this process has failed, and with it the run", 1)
    except KeyboardInterrupt:
        fail(f"interrupted: {interrupted}", 130)
    sys.exit(status or 0)


_watcher: subprocess.Popen | None = None  # says what to do when this process, one of several, ends without a word


@contextlib.contextmanager
def _as_one_of_several() -> Iterator[None]:
    """Joins the run's other processes where flags name them; only process 0 prints."""
    given: dict[str, Any] = {
        name: flags.FLAGS[name].value for name in ("coordinator", "num_processes", "process_id") if name in flags.FLAGS
    }
    if all(value in (None, "") for value in given.values()):
        yield
        return
    from steel_ad import parallel

    global _watcher
    # Where another process dies, the runtime may abort this one, which Python does not survive.
    speak = "import sys; sys.stdin.read() or print(sys.argv[1], file=sys.stderr)"
    command = [sys.executable, "-ISc", speak, f"error: {parallel.LOST}"]
    _watcher = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    parallel.start(**given)
    with contextlib.ExitStack() as stack:
        if not parallel.is_main():
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        yield
    _watcher.communicate(b"done")


def without_closed_loops(hook: Callable) -> Callable:
    """Orbax's background writers and readers go on failing after a full disk or a damaged checkpoint has been reported; nobody
    needs their tracebacks."""

    def filtered(*arguments) -> None:
        value = arguments[1] if len(arguments) > 1 else arguments[0].exc_value
        if not any(sign in str(value) for sign in ("Event loop is closed", "error while reading array index")):
            hook(*arguments)

    return filtered


def keep_freed_memory() -> None:
    """Lets glibc hand out again what has been freed, instead of returning it to the system.

    A step's buffers are else mapped anew and filled with zeros by the system every time: a seventh to a quarter of a training
    step on CPU. To be called before other threads allocate; without glibc it does nothing.
    """
    with contextlib.suppress(OSError, AttributeError, ValueError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        # No arena but the main one can hold a large block; no block is mapped; nothing is trimmed.
        for option, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)):
            mallopt(option, value)


_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # of malloc.h


def use_compilation_cache(folder: str) -> None:
    """Keeps compiled programs in `folder` ("" for none), however quickly they compiled."""
    import jax

    if folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
