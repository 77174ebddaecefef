"""Documentation is run: each command and each Python block of README.md and docs/, on tiny models offline.

A block runs in a folder of its own page, which holds small models under the names that the documentation uses
(`STAND_INS`), so that nothing in the text has to be replaced. Blocks of one page follow each other as a reader would
type them. A block after `<!-- only parsed: reason -->` is not run: its commands are parsed by the command line, its
Python is compiled. Lines that are no `qwen-jax` are checked by a rule in `CHECKS`; a line without a rule fails.
"""

import io
import pathlib
import re
import shlex
import sys
import tomllib

import click
import pytest
import typer

from qwen_jax import cli
from qwen_jax.quantize.round_to_nearest import quantize_folder
from tests.successor import write_successor

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(<!-- only parsed: [^>]+ -->\n+)?^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
STAND_INS = {
    "int4": (
        "Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4",
        "Qwen/Qwen-7B-Chat-Int4",
        "Qwen2.5-7B-Instruct-GPTQ-Int4",
        "Qwen-7B-Chat-Int4",
        "int4",
    ),
    "float": ("Qwen/Qwen2.5-7B-Instruct", "float", "model"),
}
TURNS = '[{"from": "user", "value": "Hello, who are you?"}, {"from": "assistant", "value": "Me."}]'
TEXTS = {
    "text.txt": "Some text to read. " * 40,
    "book.txt": "A book to read. " * 40,
    "conversations.json": f'[{{"conversations": {TURNS}}}]',
}
FILE = re.compile(r"^python ((?:benchmarks|scripts)/[\w/]+\.py)")


def blocks(page):
    """(language, text, only parsed) of each fenced block."""
    return [(found[2], found[3], bool(found[1])) for found in BLOCK.finditer(page.read_text(encoding="utf-8"))]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A float model that answers "Hi 😊!", and the same in 4 bits."""
    folder = tmp_path_factory.mktemp("models")
    write_successor(folder / "float", "Hi 😊!", layers=2)
    quantize_folder(folder / "float", folder / "int4", group_size=32)
    return folder


@pytest.fixture
def working_folder(models, tmp_path, monkeypatch):
    for kind, names in STAND_INS.items():
        for name in names:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).symlink_to(models / kind, target_is_directory=True)
    for name, text in TEXTS.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QWEN_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("qwen_jax.compilation_cache.enable", lambda: None)
    monkeypatch.setattr("builtins.input", lambda *prompt: pytest.fail("documentation asked for input"))
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page(page, working_folder, monkeypatch, capsys):
    names = {"__name__": page.stem}
    for language, text, only_parsed in blocks(page):
        if language == "python":
            code = compile(text, f"{page.name}: {text[:60]!r}", "exec")
            if not only_parsed:
                exec(code, names)
        elif language == "sh":
            for line in commands(text):
                run_line(line, only_parsed, monkeypatch)
        else:
            assert language in ("text", "json"), f"{page.name}: a block of {language or 'no language'}: {text[:80]}"


def commands(text):
    """The lines of a block without comments, continued lines joined, split at && into commands."""
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    found = (re.split(r"\s&&\s", re.sub(r"(^|\s)#.*$", "", line).strip()) for line in lines)
    return [command for line in found for command in line if command]


def run_line(line, only_parsed, monkeypatch):
    """Runs or parses one command; an `echo … |` in front is its input."""
    typed = ""
    if found := re.match(r"echo (.*?) \| (.*)", line):
        typed, line = " ".join(shlex.split(found[1])) + "\n", found[2]
    words = shlex.split(line)
    if words[0] != "qwen-jax":
        assert any(rule(line) for rule in CHECKS), f"no rule in CHECKS for this line: {line}"
        return
    arguments = [word for word in words[1:] if not word.startswith("| ")]
    if only_parsed or arguments[0] in PARSED:
        parse(arguments)
        return
    if not {"--length", "--batch-size"} & set(arguments):  # a page's own sizes are run
        arguments += SMALLER.get(arguments[0], ())
    if arguments[0] in ("quantize", "convert") and pathlib.Path(arguments[2]).is_symlink():
        pathlib.Path(arguments[2]).unlink()  # a page that makes this model itself goes on with its own
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert not exit.value.code, f"{line}: exit code {exit.value.code}"


def parse(arguments):
    """Lets the command line read the arguments, without running the command."""
    group = typer.main.get_command(cli.build())
    if arguments[0].startswith("-"):
        assert arguments[0] in {option for each in group.params for option in each.opts}, arguments
        return
    assert arguments[0] in cli.COMMANDS, f"{arguments[0]}: no such command"
    context = group.commands[arguments[0]].make_context(arguments[0], arguments[1:])
    if isinstance(context.command, click.Group):
        name, command, rest = context.command.resolve_command(context, [*context._protected_args, *context.args])
        command.make_context(name, rest, parent=context)


def make_target(line):
    found = re.match(r"make ([\w-]+)( \w+=.*)?$", line)
    return found and re.search(rf"^{found[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def pip_install(line):
    found = re.match(r"pip install (?:-e )?'?(?:\.|qwen-jax)(?:\[([\w,]+)\])?'?$", line)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    return found and set((found[1] or "").split(",")) - {""} <= set(extras)


def script(line):
    found = FILE.match(line)
    return found and (ROOT / found[1]).is_file()


def clone(line):
    return re.fullmatch(r"git clone https://github\.com/qwen-jax/qwen-jax|cd qwen-jax", line)


CHECKS = (make_target, pip_install, script, clone)
# Run by tests of their own, or they wait for a network, a person or a GPU; here their arguments are checked.
PARSED = {"demo", "bench", "serve", "--install-completion"}
# Most of the defaults' 4 rows of 1024 tokens would be padding.
SMALLER = {"finetune": ("--length", "128", "--batch-size", "1")}


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_examples_of_help_are_parsed(command):
    import importlib

    module = importlib.import_module(f"qwen_jax.commands.{command}")
    for line in commands(module.EXAMPLES):
        # after what starts it (echo … |, srun …) and before what takes its output
        found = re.search(r"\bqwen-jax (.*)", line.removesuffix(" &"))
        assert found, line
        parse(shlex.split(found[1].partition(" | ")[0]))


@pytest.mark.parametrize(
    "line", ["qwen-jax chat model --no-such", "qwen-jax nothing", "qwen-jax chat nowhere", "rm -rf x", "make nothing"]
)
def test_a_wrong_line_fails(line, working_folder, monkeypatch):
    with pytest.raises(AssertionError):
        run_line(line, False, monkeypatch)


def test_a_wrong_example_fails():
    with pytest.raises(Exception, match="[Nn]o such option"):
        parse(["chat", "model", "--no-such"])


def test_the_table_of_models_is_the_arithmetic():
    """docs/models.md: bytes and ceilings as `qwen-jax plan` computes them."""
    from qwen_jax.bench.models import MODELS
    from qwen_jax.kv_cache import bytes_per_token
    from qwen_jax.plan.abstract import Storage
    from qwen_jax.plan.chips import parse as chips
    from qwen_jax.plan.plan import plans

    def plan(config, bits, topology):
        return plans(config, Storage(bits=bits), chips(topology), batch=1, context=2048, kv_bits=8)[0]

    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    for name, config in MODELS.items():
        cells = [f"{plan(config, bits, 'h100:1').weights / 1e9:.2f}" for bits in (16, 8, 4)]
        cells += [f"{2048 * bytes_per_token(config, 'bfloat16', eight) / 1e9:.2f}" for eight in (False, True)]
        for topology in ("h100:1", "v5e:1x1", "v6e:1x1"):
            found = plan(config, 4, topology)
            cells.append(f"{found.tokens_per_second:.0f}" if found.fits else "–")
        assert f"| {' | '.join(cells)} |".lower() in page.lower(), (name, cells)


def test_figures_are_drawn_from_todays_results():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import figures
    finally:
        sys.path.pop(0)
    for name, (_, source) in figures.SOURCES.items():
        drawn = (ROOT / "docs" / "figures" / f"{name}.svg").read_text(encoding="utf-8")
        assert figures.mark(figures.RESULTS / source) in drawn, f"{name}.svg is older than {source}: run `make figures`"


def test_the_site_builds_strictly(tmp_path):
    import subprocess

    command = [sys.executable, "-W", "default", "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "from_pretrained" in (tmp_path / "api" / "index.html").read_text()
