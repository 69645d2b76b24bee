"""What every binary does around its library call: flags, one sentence for an error, caches, log levels."""

import argparse
import ast
import contextlib
import ctypes
import functools
import os
import shlex
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from absl import app, flags, logging
from ml_collections import config_flags

from steel_ad import config as configs
from steel_ad.errors import InputError

T = TypeVar("T")

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


def run(
    main: Callable[..., int | None],
    commands: Sequence[str] = (),
    *,
    interrupted: str = "run the same command again to go on from the last checkpoint",
) -> None:
    """Parses flags and calls `main`; its return value is the exit status (None: 0).

    With `commands`, exactly one of them is given beside the flags, and `main` is called with it.

    Ctrl-C ends it with what `interrupted` says. An InputError is printed as one sentence and ends with its status; a flag that does not
    exist or does not parse, and a command that is missing or none of `commands`, with 2.
    """
    for flag in flags.FLAGS.get_flags_for_module(__name__):
        # --help lists what the binary itself defines.
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    app.run(
        lambda rest: _guarded(functools.partial(main, *rest[1:]), interrupted),
        flags_parser=functools.partial(_parse, commands=commands),
    )


def define_config(default: str, *, loss: bool = True) -> flags.FlagHolder:
    """The flag --config, a recipe as `FILE:PRESET`, and --config.FIELD for each of its settings; --loss_option with a `loss`."""
    if loss:
        flags.DEFINE_multi_string(
            "loss_option", [], "Option of the loss as name=value, of a loss of one's own too; repeatable."
        )
    try:
        return config_flags.DEFINE_config_file("config", default, "Recipe and preset, FILE:PRESET.", lock_config=True)
    except (AttributeError, KeyError, ValueError, TypeError, ImportError, SyntaxError, OSError) as error:
        # An override of a setting that does not exist fails here already.
        _fail(f"a --config setting is wrong: {error}", 2)
        raise


def define_processes() -> None:
    """The flags of a run of several processes, which `run` then joins."""
    flags.DEFINE_string(
        "coordinator", "", "Of a run of several processes: host:port of process 0, or auto (Slurm, Open MPI, TPU pods)."
    )
    flags.DEFINE_integer(
        "num_processes", None, "Processes of the run, each started with the same command.", lower_bound=1
    )
    flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.", lower_bound=0)


def settings(holder: flags.FlagHolder, kind: type[T]) -> T:
    """The flag's value as the dataclass `kind`.

    Raises:
      InputError: a file that cannot be loaded, or a value that `kind` refuses.
    """
    try:
        values = dict(holder.value)
    except OSError as error:
        raise InputError(f"--config cannot be loaded: {str(error).splitlines()[-1].strip()}") from None
    if "loss_options" not in values:
        return configs.from_mapping(kind, values)
    options = dict(configs.plain(values["loss_options"]))
    for option in flags.FLAGS.loss_option:
        name, equals, value = option.partition("=")
        if not (name and equals):
            raise InputError(f"--loss_option={option} must have the form name=value")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value
    return configs.from_mapping(kind, {**values, "loss_options": options})


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
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{name}", f"-{name}", default=default)
    return getattr(parser.parse_known_args()[0], name)


def command(binary: str) -> str:
    """The command line that started this binary, without --compilation_cache, which changes no number."""
    arguments = [a for a in joined(sys.argv[1:]) if not a.startswith("--compilation_cache")]
    return shlex.join(["python", "-m", f"experiments.{binary}", *arguments])


def joined(words: Sequence[str]) -> list[str]:
    """Words of a command line with every flag as one, --name=value, whichever of the forms that flags take it had."""
    found: list[str] = []
    for word in words:
        if word.startswith("-"):
            found.append("--" + word.lstrip("-"))
        elif found and found[-1].startswith("--") and "=" not in found[-1]:
            found[-1] += f"={word}"
        else:
            found.append(word)
    return found


def _parse(argv: Sequence[str], commands: Sequence[str] = ()) -> list[str]:
    # What a user must know is said in one sentence; orbax would log the traceback as well.
    logging.set_verbosity(logging.FATAL)
    try:
        rest = flags.FLAGS(list(argv))
    except (flags.Error, AttributeError, KeyError, ValueError, TypeError, ImportError, SyntaxError, OSError) as error:
        # ml_collections passes on whatever the config file or an override raised, some of it with the traceback's text.
        reason = str(error)
        if "Traceback" in reason:
            reason = reason.strip().splitlines()[-1].partition(": ")[2]
        if isinstance(error, (AttributeError, KeyError)):  # an override of what is no setting
            name, _, hint = reason.replace("\\n", " ").strip("'\"").partition("Did you mean")
            reason = f"--config has no setting {name.strip()}" + (f": did you mean{hint}" if hint else "")
        _fail(f"{reason}; --help lists the flags", 2)
    if commands:
        given = " ".join(rest[1:])
        if given not in commands:
            names = ", ".join(commands)
            _fail(f"{given!r} is not a command: give one of {names}" if given else f"give a command: one of {names}", 2)
    elif len(rest) > 1:
        _fail(f"{rest[1]!r} is no flag: every argument has the form --name=value, --help lists them", 2)
    return rest


def _fail(message: str, status: int) -> None:
    # Messages of flag libraries come quoted inside quotes.
    text = message.replace("\\n", " ").replace("\\'", "").replace('"', "")
    print("error: " + " ".join(text.split()), file=sys.stderr, flush=True)
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
        _fail(str(error), error.status)
    except Exception as error:
        if _watcher is None:
            raise
        from steel_ad import parallel

        if gone := parallel.lost(error):
            _fail(str(gone), gone.status)
        traceback.print_exc()
        _fail("this process has failed, and with it the run", 1)
    except KeyboardInterrupt:
        _fail(f"interrupted: {interrupted}", 130)
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
