from bitgrain.recipes import PRESETS
from bitgrain.report.schemes import scheme_table_markdown


def test_schemes(run):
    ran = run("schemes")
    assert ran.status == 0
    names = [line.split()[0].rstrip(",") for line in ran.out.splitlines()[1 : len(PRESETS) + 1]]
    assert names == list(PRESETS)
    assert max(map(len, ran.out.splitlines())) <= 100


def test_json_and_markdown(run):
    assert [row["name"] for row in run("schemes", "--json").json] == list(PRESETS)
    assert run("schemes", "--markdown").out == scheme_table_markdown() + "\n"
    assert run("schemes", "--markdown", "--json").status == 2
