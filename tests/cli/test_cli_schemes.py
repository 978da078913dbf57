from bitgrain.recipes import PRESETS
from bitgrain.report.schemes import scheme_table_markdown


def test_schemes(run):
    ran = run("schemes")
    assert ran.status == 0
    rows = [line.split() for line in ran.out.splitlines()[1:] if not line.startswith(" ")]  # a long cell goes on below
    names = [words[0].rstrip(",") for words in rows if len(words) > 1]  # a long alias has a line of its own
    assert names[: len(PRESETS)] == list(PRESETS)
    assert max(map(len, ran.out.splitlines())) <= 100


def test_json_and_markdown(run):
    assert [row["name"] for row in run("schemes", "--json").json] == list(PRESETS)
    assert run("schemes", "--markdown").out == scheme_table_markdown() + "\n"
    assert run("schemes", "--engines").out.startswith("### Which layers\n")
    assert run("schemes", "--markdown", "--json").status == 2
