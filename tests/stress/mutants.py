"""Changes one place of `steel_ad/` at a time and runs the tests that execute it: one of them must fail.

    python -m tests.stress.mutants --per_function=2 --seed=0 [--only=steel_ad/ops,steel_ad/losses.py] [--functions=ssim_map]

First the suite runs once under `coverage`, which tells the lines that each test executes, also in binaries that it starts; the
share of lines covered is printed. Then a process that imported everything but the project forks a child for every mutant, in which
the changed syntax tree is compiled in place of the module: no file is touched. A mutant is killed by a test that fails, by ten times
the CPU time that its tests need, or by too much memory. What kills must pass without a mutant. Strings, messages, annotations and
the numbers of drawings are left alone.
"""

import argparse
import ast
import contextlib
import dataclasses
import functools
import importlib
import importlib.abc
import importlib.machinery
import itertools
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent.parent
# By importance.
ROOMS = (
    "ops",
    "losses.py",
    "metrics.py",
    "inspection",
    "data",
    "train",
    "detectors",
    "models",
    "parallel.py",
    "config.py",
)
ROOMS += ("studies", "report", "progress.py", "cli.py", "errors.py")
IDLE_S, MEMORY = 90, 6 * 2**30
_SWAPS: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.USub: ast.UAdd,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
}
_NAMES = [
    ("min", "max"),
    ("minimum", "maximum"),
    ("argmin", "argmax"),
    ("any", "all"),
    ("floor", "ceil"),
    ("sin", "cos"),
]
_NAMES += [
    ("sum", "mean"),
    ("logical_and", "logical_or"),
    ("nanmin", "nanmax"),
    ("zeros", "ones"),
    ("zeros_like", "ones_like"),
]
_SWAPPED = {**dict(_NAMES), **{b: a for a, b in _NAMES}}
# Calls and arguments of which only a reader of the screen would see a change.
_WORDS = {"print", "warn", "InputError", "info", "warning", "error", "progress", "update", "draw", "write", "rule"}
_QUIET = {"indent", "flush", "every_s", "timeout", "stacklevel", "separators"}


class Mutation(NamedTuple):
    """One change: `file:index` names it; `line` to `last` are those of the statement."""

    file: str
    index: int
    function: str
    kind: str
    line: int
    last: int
    text: str

    @property
    def name(self) -> str:
        return f"{self.file}:{self.index}"


class _Site(NamedTuple):
    function: str
    kind: str
    line: int
    last: int
    text: str
    apply: Callable[[], None]


def functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    """(qualified name, node) of the functions and methods of a module, of those inside others too."""

    def below(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef):
                yield prefix + child.name, child
            elif isinstance(child, ast.ClassDef):
                yield from below(child, f"{prefix}{child.name}.")

    return below(tree, "")


def is_public(name: str) -> bool:
    return all(not part.startswith("_") or part.endswith("__") for part in name.split("."))


def _sites(tree: ast.Module, drawing: bool) -> Iterator[_Site]:
    for name, function in functions(tree):
        found = itertools.chain(_of_defaults(function), _of_body(function.body, drawing))
        for kind, node, text, apply in found:
            yield _Site(name, kind, node.lineno, node.end_lineno or node.lineno, text, apply)


_Found = tuple[str, Any, str, Callable[[], None]]


def _of_defaults(function: ast.FunctionDef) -> Iterator[_Found]:
    named = function.args.posonlyargs + function.args.args
    pairs = list(zip(named[::-1], function.args.defaults[::-1], strict=False))
    for argument, value in pairs + list(zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)):
        if isinstance(value, ast.Constant) and argument.arg not in _QUIET and (change := _constant(value)):
            # The line that calls it is any of the body.
            yield "default", function, f"{argument.arg}={value.value!r} -> {_other(value.value)!r}", change


def _other(value: Any) -> Any:
    return not value if isinstance(value, bool) else value + 1


def _constant(node: ast.Constant) -> Callable[[], None] | None:
    if isinstance(node.value, bool | int | float):
        return lambda: setattr(node, "value", _other(node.value))
    return None


def _of_body(body: list[ast.stmt], drawing: bool) -> Iterator[_Found]:
    for i, statement in enumerate(body):

        def leave_out(at: int = i) -> None:
            body[at] = ast.copy_location(ast.Pass(), body[at])

        text = ast.unparse(statement).splitlines()[0][:90]
        if isinstance(statement, ast.Raise):
            yield "raise", statement, f"without {text}", leave_out
            continue
        if isinstance(statement, ast.Return) and statement.value is None:
            yield "return", statement, "without return", leave_out
            continue
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
            if _called(statement.value) in _WORDS:
                continue
            if not drawing:
                yield "call", statement, f"without {text}", leave_out
        for kind, said, change in _of_expressions(statement, drawing):
            # Of a compound statement the first line stands for what is tested there.
            inner = getattr(statement, "body", None)
            yield (
                kind,
                ast.Pass(lineno=statement.lineno, end_lineno=inner[0].lineno if inner else statement.end_lineno),
                said,
                change,
            )
        for name in ("body", "orelse", "finalbody"):
            if isinstance(inner := getattr(statement, name, None), list):
                yield from _of_body(inner, drawing)
        for handler in [*getattr(statement, "handlers", []), *getattr(statement, "cases", [])]:
            yield from _of_body(handler.body, drawing)


def _called(call: ast.Call) -> str:
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def _of_expressions(statement: ast.stmt, drawing: bool) -> Iterator[tuple[str, str, Callable[[], None]]]:
    """The changes of a statement's own expressions, without those of the statements in it."""
    if isinstance(statement, ast.Return | ast.Expr):
        holder: Any = statement if isinstance(statement, ast.Return) else statement.value
        if isinstance(holder, ast.Return | ast.Yield) and holder.value:

            def change() -> None:
                holder.value = ast.Call(ast.Name("_changed_value", ast.Load()), [holder.value], [])

            yield "return", f"another value than {ast.unparse(holder)[:90]}", change
    if isinstance(statement, ast.If | ast.While):
        yield "condition", f"not ({ast.unparse(statement.test)[:90]})", lambda: _negate(statement, "test")
    if isinstance(statement, ast.AugAssign) and type(statement.op) in _SWAPS:
        yield "operator", *_swap(statement, statement)
    for name, value in ast.iter_fields(statement):
        if name in (
            "body",
            "orelse",
            "finalbody",
            "handlers",
            "cases",
            "decorator_list",
            "annotation",
            "args",
            "returns",
        ):
            continue
        for node in value if isinstance(value, list) else [value]:
            if isinstance(node, ast.AST):
                yield from _of_expression(node, drawing)


def _negate(holder: Any, name: str) -> None:
    setattr(holder, name, ast.UnaryOp(ast.Not(), getattr(holder, name)))


def _swap(node: Any, whole: ast.AST) -> tuple[str, Callable[[], None]]:
    to = _SWAPS[type(node.op)]
    return f"{type(node.op).__name__} -> {to.__name__} in {ast.unparse(whole)[:90]}", lambda: setattr(node, "op", to())


def _is_text(node: ast.AST) -> bool:
    return any(
        isinstance(n, ast.JoinedStr) or (isinstance(n, ast.Constant) and isinstance(n.value, str))
        for n in ast.walk(node)
    )


def _of_expression(node: ast.AST, drawing: bool) -> Iterator[tuple[str, str, Callable[[], None]]]:
    if isinstance(node, ast.JoinedStr):
        return
    text = ast.unparse(node)[:90] if isinstance(node, ast.expr) else ""
    if isinstance(node, ast.Call):
        if _called(node) in _WORDS:
            return
        if (to := _SWAPPED.get(_called(node))) and not (to == "mean" and isinstance(node.func, ast.Name)):
            name = "attr" if isinstance(node.func, ast.Attribute) else "id"
            yield "function", f"{to} for {text}", lambda: setattr(node.func, name, to)
    elif isinstance(node, ast.IfExp):
        yield "condition", f"not ({ast.unparse(node.test)[:90]})", lambda: _negate(node, "test")
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "condition", f"not ({text})", lambda: _negate(node, "operand")
    elif isinstance(node, ast.BoolOp):
        yield "logic", *_swap(node, node)
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in _SWAPS:
        to_op = _SWAPS[type(node.ops[0])]

        def compare() -> None:
            node.ops[0] = to_op()

        yield "comparison", f"{type(node.ops[0]).__name__} -> {to_op.__name__} in {text}", compare
    elif not drawing and isinstance(node, ast.BinOp | ast.UnaryOp) and type(node.op) in _SWAPS:
        parts = (node.left, node.right) if isinstance(node, ast.BinOp) else (node.operand,)
        if not any(_is_text(part) for part in parts):
            yield "operator", *_swap(node, node)
    elif not drawing and isinstance(node, ast.Constant) and (change := _constant(node)):
        yield "constant", f"{_other(node.value)!r} for {text}", change
    for name, value in ast.iter_fields(node):
        if name == "annotation" or (isinstance(node, ast.keyword) and node.arg in _QUIET):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _of_expression(child, drawing)


def mutations(file: str) -> list[Mutation]:
    """Every mutation of a file, given by its path below the root."""
    tree = ast.parse((ROOT / file).read_text())
    sites = _sites(tree, file.startswith("steel_ad/report/"))
    return [Mutation(file, i, *site[:-1]) for i, site in enumerate(sites)]


def mutated(path: str, file: str, index: int) -> Any:
    """The code of a module with one mutation."""
    tree = ast.parse(Path(path).read_text())
    site = next(itertools.islice(_sites(tree, file.startswith("steel_ad/report/")), index, None))
    site.apply()
    return compile(ast.fix_missing_locations(tree), path, "exec")


def changed(value: Any) -> Any:
    """A value of the same type that is not the same: one more, the opposite, one letter more, one item less."""
    if value is None:
        return 0
    if isinstance(value, str):
        return value + "?"
    if isinstance(value, bool | int | float | complex):
        return _other(value)
    if isinstance(value, Path):
        return value.with_name(value.name + "x")
    if isinstance(value, tuple | list):
        others = [changed(value[0]), *value[1:]] if value else [0]
        return value._replace(**{value._fields[0]: others[0]}) if hasattr(value, "_replace") else type(value)(others)
    if isinstance(value, dict):
        return type(value)({k: changed(v) if i == 0 else v for i, (k, v) in enumerate(value.items())} or {"x": 0})
    if isinstance(value, set | frozenset):
        return type(value)(list(value)[1:] or [0])
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        if "key" in str(value.dtype):
            import jax

            return jax.random.fold_in(value, 1)
        return ~value if str(value.dtype) == "bool" else value + 1
    if dataclasses.is_dataclass(value) and dataclasses.fields(value):
        for field in dataclasses.fields(value):
            with contextlib.suppress(Exception):
                return dataclasses.replace(value, **{field.name: changed(getattr(value, field.name))})
        return None
    if isinstance(value, Iterator):
        return itertools.islice(value, 1, None)
    if callable(value):
        return functools.wraps(value, updated=())(lambda *a, **k: changed(value(*a, **k)))
    return None


class _Loader(importlib.machinery.SourceFileLoader):
    file, index = "", -1

    def get_code(self, fullname: str) -> Any:
        return mutated(self.path, self.file, self.index)

    def exec_module(self, module: Any) -> None:
        module._changed_value = changed
        super().exec_module(module)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, file: str, index: int) -> None:
        self.file, self.index = file, index
        self.module = ".".join(Path(file).with_suffix("").parts).removesuffix(".__init__")

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.module:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec
        assert spec.origin
        loader = _Loader(name, spec.origin)
        loader.file, loader.index = self.file, self.index
        spec.loader = loader
        return spec


def install() -> None:
    """In every process that has STEEL_AD_MUTANT=file:index the module is imported with that mutation."""
    if mutant := os.environ.get("STEEL_AD_MUTANT"):
        file, _, index = mutant.rpartition(":")
        sys.meta_path.insert(0, _Finder(file, int(index)))


_SITE = f"""
import importlib.util, os, sys
if os.environ.get("STEEL_AD_MUTANT"):
    spec = importlib.util.spec_from_file_location("_mutants", {str(Path(__file__).absolute())!r})
    sys.modules["_mutants"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.install()
elif os.environ.get("COVERAGE_PROCESS_START"):
    import coverage
    coverage.process_startup()
"""
_RC = """
[run]
source = {root}/steel_ad
data_file = {work}/coverage/data
parallel = true
context = ${{STEEL_AD_CONTEXT}}
disable_warnings = no-data-collected, module-not-imported, module-not-measured
"""


def _prepare(work: Path) -> None:
    """What the processes find by their environment: one cache of programs, and the hook that Python runs as it starts."""
    (work / "site").mkdir(parents=True, exist_ok=True)
    (work / "site" / "sitecustomize.py").write_text(_SITE)
    (work / "coveragerc").write_text(_RC.format(root=ROOT, work=work))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(work / "site"), str(ROOT)])
    os.environ["STEEL_AD_TEST_CACHE"] = str(work / "cache")
    warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
    importlib.import_module("tests.conftest")
    packages = "pytest _pytest.assertion.rewrite numpy flax.linen flax.struct optax orbax.checkpoint grain cv2 matplotlib.pyplot "
    packages += (
        "rich.progress absl.app ml_collections scipy.ndimage scipy.signal scipy.stats scipy.optimize skimage.metrics "
    )
    packages += "skimage.morphology sklearn.metrics PIL.Image tifffile dm_pix jax.experimental.multihost_utils"
    for name in packages.split():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


class _Child(NamedTuple):
    status: int  # of the process; -1: stopped for CPU time, -2: idle, -3: memory
    cpu: float
    told: dict


def _child(work: Path, function: Callable[[], dict], cpu_limit: float, limited: bool = True) -> _Child:
    """What `function` returns in a forked child of a session of its own, ended with all that it started."""
    told = work / "told.json"
    told.unlink(missing_ok=True)
    shutil.rmtree(work / "tmp", ignore_errors=True)
    child = os.fork()
    if not child:
        status = 1
        try:
            os.setsid()
            log = os.open(work / "words.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            told.write_text(json.dumps(function()))
            status = 0
        except BaseException:
            traceback.print_exc()
        os._exit(status)
    reason, cpu, idle = 0, 0.0, 0.0
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        now, memory, stopped = _usage(child)
        # Counted by steps, so that it makes nothing of a pause of all processes.
        if now > cpu + 0.05 or stopped:
            idle, cpu = 0, max(cpu, now)
        else:
            idle += 0.1
        if limited and (reason := -1 if now > cpu_limit else -2 if idle > IDLE_S else -3 if memory > MEMORY else 0):
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            break
        time.sleep(0.1)
    for left in _session(child):
        with contextlib.suppress(ProcessLookupError):
            os.kill(left, signal.SIGKILL)
    found = json.loads(told.read_text()) if told.exists() and not reason else {}
    return _Child(reason or os.waitstatus_to_exitcode(status), cpu, found)


def _session(leader: int) -> list[int]:
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            with contextlib.suppress(OSError):
                if int((path / "stat").read_text().rpartition(")")[2].split()[3]) == leader:
                    found.append(int(path.name))
    return found


def _usage(leader: int) -> tuple[float, int, bool]:
    """(CPU seconds, bytes, whether somebody stopped it) of a session's processes."""
    ticks, pages, stopped = 0, 0, False
    for pid in _session(leader):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(map(int, words[11:15]))
            pages += int(words[21])
            stopped |= words[0] == "T"
    return ticks / os.sysconf("SC_CLK_TCK"), pages * os.sysconf("SC_PAGE_SIZE"), stopped


# The suite under coverage --------------------------------------------------------------------------------------------------------


class _Recorder:
    """Tells coverage which test or which shared fixture runs, and keeps what each test costs, uses and ends with."""

    def __init__(self, coverage: Any) -> None:
        self.coverage = coverage
        self.tests: dict[str, dict] = {}
        self.fixtures: dict[str, float] = {}
        self.context = ""

    def switch(self, context: str) -> str:
        before, self.context = self.context, context
        os.environ["STEEL_AD_CONTEXT"] = context or "none"
        self.coverage.switch_context(context)
        return before

    def hooks(self) -> Any:
        import pytest

        recorder = self

        class Hooks:
            @pytest.hookimpl(wrapper=True)
            def pytest_runtest_protocol(self, item):
                recorder.switch(item.nodeid)
                recorder.tests[item.nodeid] = {"cost": 0.0, "fixtures": [], "passed": True}
                result = yield
                recorder.switch("")
                # What is traced once and kept would be covered by the first test alone.
                import jax

                jax.clear_caches()
                for name in [n for n in sys.modules if n.startswith("steel_ad")]:
                    for value in vars(sys.modules[name]).values():
                        if hasattr(value, "cache_clear"):
                            value.cache_clear()
                return result

            @pytest.hookimpl(wrapper=True)
            def pytest_fixture_setup(self, fixturedef, request):
                if fixturedef.scope == "function":
                    return (yield)
                before = recorder.switch(self._name(fixturedef))
                start = time.monotonic()
                try:
                    return (yield)
                finally:
                    recorder.fixtures[self._name(fixturedef)] = time.monotonic() - start
                    recorder.switch(before)

            @staticmethod
            def _name(fixturedef):
                return f"fixture {fixturedef.baseid}::{fixturedef.argname}"

            def pytest_runtest_call(self, item):
                known = item._fixtureinfo.name2fixturedefs.values()
                used = [d for defs in known for d in defs if d.scope != "function"]
                recorder.tests[item.nodeid]["fixtures"] = sorted({self._name(d) for d in used})

            def pytest_runtest_logreport(self, report):
                test = recorder.tests[report.nodeid]
                test["passed"] &= report.passed
                if report.when != "teardown":
                    test["cost"] += report.duration

        return Hooks()


def measure(work: Path, arguments: list[str]) -> None:
    """Runs the suite under coverage; leaves `tests.json` and `coverage.json`, the lines that each context executes."""

    def suite() -> dict:
        os.environ["COVERAGE_PROCESS_START"] = str(work / "coveragerc")
        os.environ["STEEL_AD_CONTEXT"] = "none"
        import coverage
        import pytest

        cover = coverage.Coverage(
            data_file=str(work / "coverage" / "data"), data_suffix="suite", source=[str(ROOT / "steel_ad")]
        )
        cover.start()
        recorder = _Recorder(cover)
        line = ["-n", "0", "-q", "-p", "no:cacheprovider", f"--basetemp={work / 'tmp'}", *arguments]
        status = pytest.main(line, plugins=[recorder.hooks()])
        cover.stop()
        cover.save()
        return {"status": int(status), "tests": recorder.tests, "fixtures": recorder.fixtures}

    shutil.rmtree(work / "coverage", ignore_errors=True)
    (work / "coverage").mkdir()
    found = _child(work, suite, 0, limited=False)
    if not found.told:
        raise RuntimeError((work / "words.txt").read_text()[-3000:])
    shutil.copy(work / "words.txt", work / "suite.txt")
    import coverage

    whole = coverage.Coverage(data_file=str(work / "coverage" / "data"), source=[str(ROOT / "steel_ad")])
    whole.combine([str(work / "coverage")], keep=True)
    whole.save()
    data = whole.get_data()
    lines = {}
    for path in sorted((ROOT / "steel_ad").rglob("*.py")):
        _, statements, _, missing, _ = whole.analysis2(str(path))
        contexts = data.contexts_by_lineno(str(path))
        lines[str(path.relative_to(ROOT))] = {"statements": statements, "missing": missing, "contexts": contexts}
    (work / "coverage.json").write_text(json.dumps(lines))
    (work / "tests.json").write_text(json.dumps(found.told))


def _print_coverage(lines: dict[str, dict], told: Path) -> None:
    rooms: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for file, of in lines.items():
        room = "/".join(Path(file).parts[:2])
        for name in (room, "all"):
            rooms[name][0] += len(of["statements"])
            rooms[name][1] += len(of["missing"])
    print(f"{'':>24}{'statements':>12}{'not run':>10}{'covered':>10}")
    for name, (statements, missing) in sorted(rooms.items(), key=lambda r: (r[0] == "all", r[0])):
        print(f"{name:>24}{statements:>12}{missing:>10}{(1 - missing / max(statements, 1)):>10.1%}")
    rows = [f"{file}: {', '.join(_ranges(of['missing']))}\n" for file, of in lines.items() if of["missing"]]
    told.write_text("".join(rows))
    print(f"the lines that no test runs are in {told}", flush=True)


def _ranges(numbers: list[int]) -> Iterator[str]:
    for _, group in itertools.groupby(enumerate(numbers), lambda p: p[1] - p[0]):
        run = [n for _, n in group]
        yield f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0])


class Covering:
    """Which tests execute a line, the fastest first."""

    def __init__(self, work: Path) -> None:
        told = json.loads((work / "tests.json").read_text())
        self.lines = json.loads((work / "coverage.json").read_text())
        self.tests = {t: of for t, of in told["tests"].items() if of["passed"]}
        self.fixtures = told["fixtures"]
        self.users = defaultdict(list)
        for test, of in self.tests.items():
            for fixture in of["fixtures"]:
                self.users[fixture].append(test)

    def cost(self, test: str) -> float:
        of = self.tests[test]
        return of["cost"] + sum(self.fixtures.get(f, 0) for f in of["fixtures"])

    def of(self, file: str, first: int, last: int) -> list[str]:
        found = set()
        for line, contexts in self.lines[file]["contexts"].items():
            if first <= int(line) <= last:
                for context in contexts:
                    found.update(self.users.get(context, [context]))
        return sorted(found & set(self.tests), key=self.cost)


# Mutants -------------------------------------------------------------------------------------------------------------------------


class Runner:
    """Runs tests in children, with a mutant or without."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.sound: dict[str, bool] = {}

    def run(self, tests: list[str], mutant: str, cpu_limit: float) -> tuple[str, str]:
        """("killed", by what), ("survived", "") or ("broken", why) where pytest itself fails."""

        def child() -> dict:
            import pytest

            found: dict[str, str] = {}

            class Hooks:
                def pytest_runtest_logreport(self, report):
                    if report.failed and not found:
                        text = getattr(getattr(report.longrepr, "reprcrash", None), "message", str(report.longrepr))
                        found.update(test=report.nodeid, message=text.splitlines()[0][:160] if text else "")

                def pytest_collectreport(self, report):
                    if report.failed and not found:
                        found.update(test=report.nodeid, message="cannot be imported")

            os.environ["STEEL_AD_MUTANT"] = mutant
            install()
            line = ["-x", "-n", "0", "-q", "-p", "no:cacheprovider", f"--basetemp={self.work / 'tmp'}", *tests]
            status = -1
            try:
                status = int(pytest.main(line, plugins=[Hooks()]))
            except BaseException:  # what a test that failed leaves behind
                traceback.print_exc()
            return {"status": status, **found}

        end = _child(self.work, child, cpu_limit)
        if end.status < 0:
            why = {-1: f"hangs: over {cpu_limit:.0f} s of CPU time", -2: "hangs: idle", -3: "takes too much memory"}
            return "killed", why.get(end.status, f"crashes: signal {-end.status}")
        if "test" in end.told:
            return "killed", f"{end.told['test']}: {end.told['message']}"
        if end.told.get("status") == 0:
            return "survived", ""
        return "broken", (self.work / "words.txt").read_text()[-1500:]

    def judge(self, mutant: str, tests: list[str], costs: list[float]) -> tuple[str, str]:
        """First by the fastest few tests, then by the others; a test that fails without a mutant too is left out."""
        some = [(t, c) for t, c in zip(tests, costs, strict=True) if self.sound.get(t, True)]
        for stage in (some[:4], some[4:]):
            while stage:
                limit = 60 + 10 * sum(c for _, c in stage)
                verdict, by = self.run([t for t, _ in stage], mutant, limit)
                test = by.partition(": ")[0]
                if verdict != "killed" or test not in dict(stage):
                    break
                if test not in self.sound:
                    self.sound[test] = self.run([test], "", 60)[0] == "survived"
                if self.sound[test]:
                    break
                stage = [(t, c) for t, c in stage if t != test]
                verdict = "survived"
            if stage and verdict != "survived":
                return verdict, by
        return "survived", ""


def draw(found: list[Mutation], count: int, seed: int) -> list[Mutation]:
    """Some mutations of a function, of as many kinds as there are, drawn anew only by another seed."""
    import numpy as np

    rng = np.random.default_rng([seed, zlib.crc32(f"{found[0].file} {found[0].function}".encode())])
    kinds: Counter[str] = Counter()
    ranked = []
    for k in rng.permutation(len(found)):
        kinds[found[k].kind] += 1
        # What is computed comes before where the border lies, of which a change may be none.
        ranked.append(
            (kinds[found[k].kind] + 0.5 * (found[k].kind in ("comparison", "default")), len(ranked), found[k])
        )
    return [m for *_, m in sorted(ranked)[:count]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--per_function", type=int, default=2)
    parser.add_argument(
        "--until_killed", action="store_true", help="Of a function no further mutant once one is killed."
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="Files or folders, steel_ad/ops,steel_ad/losses.py; all by default.")
    parser.add_argument("--functions", default="", help="Names of functions, or Class.method.")
    parser.add_argument("--mutants", default="", help="Just these, by name (file:number).")
    parser.add_argument("--private", action="store_true", help="Functions of a leading underscore too.")
    parser.add_argument("--tests", default="", help="Tests or files of tests to run in place of those that cover.")
    parser.add_argument(
        "--seconds", type=float, default=60, help="Of the tests that cover a mutant those that take so long."
    )
    parser.add_argument("--minutes", type=float, default=1e9, help="No further mutant after so long.")
    parser.add_argument("--list", action="store_true", help="Print the mutants and run nothing.")
    parser.add_argument("--suite", default="", help="Arguments for the suite under coverage, say a file of tests.")
    parser.add_argument(
        "--work", default="", help="Folder for everything; coverage that lies there already is used again."
    )
    flags = parser.parse_args()
    chosen = _choose(flags)
    if flags.list:
        for mutation in chosen:
            print(f"{mutation.name} {mutation.function}, line {mutation.line}, {mutation.kind}: {mutation.text}")
        return 0
    work = Path(flags.work or tempfile.mkdtemp(prefix="steel_ad_mutants_")).absolute()
    try:
        _prepare(work)
        covering = None
        if not flags.tests:
            if not (work / "tests.json").exists():
                measure(work, flags.suite.split())
            covering = Covering(work)
            _print_coverage(covering.lines, work / "missing.txt")
        return _report(chosen, covering, Runner(work), flags)
    finally:
        if not flags.work:
            shutil.rmtree(work)


def _choose(flags: argparse.Namespace) -> list[Mutation]:
    names = flags.only.split(",") if flags.only else [f"steel_ad/{room}" for room in ROOMS]
    files = [f for n in names for f in (sorted((ROOT / n).rglob("*.py")) if (ROOT / n).is_dir() else [ROOT / n])]
    chosen, wanted = [], set(filter(None, flags.functions.split(",")))
    for path in files:
        by_function = defaultdict(list)
        for mutation in mutations(str(path.relative_to(ROOT))):
            name = mutation.function
            if (
                wanted & {name, name.rpartition(".")[2]}
                if wanted
                else flags.private or flags.mutants or is_public(name)
            ):
                by_function[name].append(mutation)
        for found in by_function.values():
            chosen += draw(found, 10**9 if flags.mutants else flags.per_function, flags.seed)
    if flags.mutants:
        chosen = [m for m in chosen if m.name in flags.mutants.split(",")]
    return chosen


def _report(chosen: list[Mutation], covering: Covering | None, runner: Runner, flags: argparse.Namespace) -> int:
    start = time.monotonic()
    lines = {name: node for file in {m.file for m in chosen} for name, node in _spans(file)}
    done: dict[str, Counter[str]] = defaultdict(Counter)
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    bad = []
    fell: set[tuple[str, str]] = set()
    log = (runner.work / "mutants.jsonl").open("a")
    number = 0
    for number, m in enumerate(chosen, 1):
        if time.monotonic() - start > 60 * flags.minutes:
            number -= 1
            print(f"{len(chosen) - number} mutants were not tried")
            break
        if flags.until_killed and (m.file, m.function) in fell:
            continue
        if not covering:
            tests, costs = flags.tests.split(","), [30.0] * len(flags.tests.split(","))
        else:
            first, last = lines[m.file, m.function]
            tests = [] if m.kind == "default" else covering.of(m.file, m.line, m.last)
            tests = tests or covering.of(m.file, first, last)
            sums = list(itertools.accumulate(map(covering.cost, tests)))
            tests = [t for t, s in zip(tests, sums, strict=True) if s < flags.seconds] or tests[:1]
            costs = [covering.cost(t) for t in tests]
        verdict, by = runner.judge(m.name, tests, costs) if tests else ("no test", "")
        place = f"{m.name} {m.function}, line {m.line}, {m.kind}: {m.text}"
        log.write(json.dumps({**m._asdict(), "verdict": verdict, "by": by, "tests": len(tests)}) + "\n")
        log.flush()
        done["/".join(Path(m.file).parts[:2])][verdict] += 1
        kinds[m.kind][verdict] += 1
        if verdict == "killed":
            fell.add((m.file, m.function))
        else:
            bad.append(f"{place}: {verdict}" + (f" {len(tests)} tests" if verdict == "survived" else f" {by}"))
            print(bad[-1], flush=True)
        if number % 20 == 0:
            print(f"{number}/{len(chosen)} {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    columns = ("killed", "survived", "no test", "broken")
    for table in (done, kinds):
        print("\n" + f"{'':>24}" + "".join(f"{c:>12}" for c in columns))
        for name, of in table.items():
            print(f"{name:>24}" + "".join(f"{of[c]:>12}" for c in columns))
    total = sum((of for of in done.values()), Counter[str]())
    tried = {(m.file, m.function): None for m in chosen[:number]}
    without = [f"{file} {function}" for file, function in tried if (file, function) not in fell]
    print(f"Functions of which none was killed: {len(without)}", *without, sep="\n  ")
    print(
        f"{total.total()} mutants of {len(tried)} functions in {time.monotonic() - start:.0f} s; {len(bad)} were not killed"
    )
    for text in bad:
        print(f"- {text}")
    return int(bool(without if flags.until_killed else bad))


def _spans(file: str) -> Iterator[tuple[tuple[str, str], tuple[int, int]]]:
    """((file, function), (first line of the body, last line))"""
    for name, node in functions(ast.parse((ROOT / file).read_text())):
        yield (file, name), (node.body[0].lineno, node.end_lineno or node.lineno)


if __name__ == "__main__":
    sys.exit(main())
