"""Parsing, errors and exit statuses, whatever the command."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import bitgrain
from bitgrain.cli import schemes
from bitgrain.cli.main import COMMANDS, main
from bitgrain.errors import PlanError


def shell(*arguments: str, **settings) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bitgrain", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **settings)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["plan", "--help"], ["quantize", "m", "-o", "o"]])
def test_answers_that_need_no_model_are_fast(arguments: list[str]):
    def seconds() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime  # of the processor: the machine may be busy with other tests

    began = seconds()
    shell(*arguments)
    assert seconds() - began < 0.5


def test_nothing_heavy_is_imported_before_a_command_runs():
    code = "import sys, bitgrain.cli.main; print({'torch', 'transformers', 'rich', 'numpy'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"    {name} " in shown for name in COMMANDS)
    assert "bitgrain demo" in shown


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_that_fits(command: str, capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert COMMANDS[command].__doc__.splitlines()[0] in shown
    assert max(map(len, shown.splitlines())) <= 120


def test_version(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"bitgrain {bitgrain.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say what to do: quantize, plan,"),
        (["quantise", "m"], "unknown command 'quantise'; did you mean 'quantize'?"),
        (["xyzzy"], "unknown command 'xyzzy'; choose from quantize,"),
        (["plan", "m", "--schme", "W4A16"], "unknown option '--schme'; did you mean --scheme?"),
        (["plan", "m"], "say what to do: --scheme S"),
        (["plan", "m", "n", "-s", "W4A16"], "unknown argument 'n'; see bitgrain plan --help"),
        (["plan"], "the following arguments are required: MODEL"),
        (["quantize", "m", "-s", "W4A16"], "required: -o/--out"),
        (["plan", "m", "-s", "W4A16", "--max-shard-size", "5 apples"], "'5 apples' is not a size; write for instance"),
        (["plan", "m", "-s", "W4A16", "--workers", "0"], "'0' is not a whole number of at least 1"),
        (["plan", "m", "-s", "W4A16", "--on-indivisible", "drop"], "invalid choice: 'drop'"),
        (["eval", "m"], "required: --text"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(run, arguments: list[str], message: str):
    ran = run(*arguments)
    assert ran.status == 2
    assert ran.out == ""
    assert ran.err.splitlines()[-1].startswith("error: ")
    assert message in ran.err
    assert "Traceback" not in ran.err


def test_errors_are_red_on_a_terminal_only(run, monkeypatch: pytest.MonkeyPatch):
    assert run("xyzzy").err.startswith("error:")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert run("xyzzy").err.startswith("\x1b[1;31merror:\x1b[0m ")
    monkeypatch.setenv("NO_COLOR", "1")
    assert run("xyzzy").err.startswith("error:")


def _raise(error: BaseException):
    def run(_) -> int:
        raise error

    return run


def test_a_known_error_is_one_line(run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(schemes, "run", _raise(PlanError("no room: free some")))
    ran = run("schemes")
    assert (ran.status, ran.out, ran.err) == (1, "", "error: no room: free some\n")


@pytest.mark.parametrize("arguments", [("--debug", "schemes"), ("schemes", "--debug")])
def test_debug_lets_it_through(run, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]):
    monkeypatch.setattr(schemes, "run", _raise(PlanError("no room")))
    with pytest.raises(PlanError):
        run(*arguments)


def test_ctrl_c(run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(schemes, "run", _raise(KeyboardInterrupt()))
    ran = run("schemes")
    assert (ran.status, ran.err) == (130, "stopped\n")


def test_a_bug_keeps_its_traceback_and_says_so(run, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(schemes, "run", _raise(ZeroDivisionError("oops")))
    with pytest.raises(ZeroDivisionError) as caught:
        run("schemes")
    sys.excepthook(caught.type, caught.value, caught.tb)
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert shown.endswith("error: this is a bug in bitgrain: please report it, with the lines above and the command\n")


def test_a_reader_that_goes_away_is_no_error():
    read, write = os.pipe()
    os.close(read)
    code = "from bitgrain.cli import schemes, main; import sys; schemes.run = lambda _: print('x' * 99999) or 0; "
    code += "sys.exit(main.main(['schemes']))"
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


def test_the_terminal_sees_no_remarks_of_libraries(model: Path):
    done = shell("plan", str(model), "-s", "W4A16", "--json")
    assert done.returncode == 0
    assert done.stderr == ""
