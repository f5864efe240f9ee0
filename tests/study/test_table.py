"""Tables of runs, and what is refused of them."""

import pytest

from megahybrid.errors import UserError
from megahybrid.study.table import FIT_COLUMNS, parse_columns, read_runs
from tests.study import tables


def made(changes=(), **columns):
    parameters, tokens = tables.ladder()
    rows = tables.rows("gdn", tables.LAW, parameters, tokens, 0.002, **columns)
    for place, name, value in changes:
        rows[place][name] = value
    return rows


def test_runs_csv_is_read_as_it_is_written(tmp_path):
    changes = [(0, "held_out", 1), (1, "state", "diverged"), (1, "loss", ""), (2, "excluded", "by hand")]
    rows = made([*changes, (3, "trunk", "t"), (4, "trunk", "t")])
    runs = read_runs(tables.write(tmp_path / "runs.csv", rows))
    assert [run.parameters for run in runs] == [row["parameters"] for row in rows]
    assert [run.loss for run in runs[3:]] == [row["loss"] for row in rows[3:]]
    assert [number for number, run in enumerate(runs) if not run.fitted] == [0, 1, 2]
    assert [run.counts for run in runs] == [True, False, False] + [True] * 9
    assert runs[3].trunk == runs[4].trunk and len({run.trunk for run in runs}) == 11


def test_columns_of_others_and_tokens_from_flops(tmp_path):
    path = tmp_path / "their runs.csv"
    path.write_text("\ufeffModel Size,state,Training FLOP,loss\n1e6,odd,6e14,3.5\n2e6,odder,12e14,3.2\n", "utf-8")
    columns = parse_columns("parameters=Model Size, flops=Training FLOP,loss=loss")
    runs = read_runs(path, columns, drop_largest_losses=1)
    assert [(run.tokens, run.kind) for run in runs] == [(1e8, "all")] * 2
    assert [run.fitted for run in runs] == [False, True] and "largest" in runs[0].excluded
    path.write_text("parameters,tokens,loss\n1e6,1e8,3.5\n")
    assert read_runs(path)[0].flops == 6e14
    path.write_text("parameters,tokens,loss,budget,gpu_hours\n1e6,1e8,3.5,small,-\n")
    assert read_runs(path, wanted=FIT_COLUMNS)[0].loss == 3.5, "what no fit needs may be anything"


@pytest.mark.parametrize(
    "changes, said",
    [
        ([(4, "loss", "nan")], "Run 5 .* loss = 'nan'"),
        ([(4, "loss", "")], "Run 5 .* loss = ''"),
        ([(4, "tokens", "many")], "Run 5 .* tokens = 'many'"),
        ([(4, "parameters", -1e6)], "Run 5 .* parameters = '-1000000.0'"),
        ([(4, "flops", "inf")], "Run 5 .* flops = 'inf'"),
        ([(4, "held_out", "yes")], "Run 5 .* held_out = 'yes'"),
        ([(4, "cell", "gdn-1")], "Runs 2 and 5 .* the same cell"),
        ([(4, name, made()[1][name]) for name in ("parameters", "tokens", "loss")], "Runs 2 and 5 .* the same run"),
    ],
)
def test_bad_values_are_refused_in_a_sentence(tmp_path, changes, said):
    with pytest.raises(UserError, match=said) as refused:
        read_runs(tables.write(tmp_path / "runs.csv", made(changes)))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "text, columns, said",
    [
        ("", None, "no runs"),
        ("parameters,tokens,loss\n", None, "no runs"),
        ("parameters,tokens\n1e6,1e8\n", None, "no column for loss"),
        ("tokens,loss\n1e8,3\n", None, "no column for parameters"),
        ("parameters,loss\n1e6,3\n", None, "no column for tokens or flops"),
        (
            "N,C,loss\n1e6,1e15,3\n",
            {"parameters": "N", "flops": "FLOP", "loss": "loss"},
            "no column 'FLOP'; it has N, C",
        ),
        ("parameters,tokens,loss\n1e6,1e8\n", None, "Run 1 .* as many columns"),
        ("parameters,tokens,loss\n1e6,1e8,3,4\n", None, "Run 1 .* as many columns"),
        ("parameters,parameters,tokens,loss\n1,1,1,3\n", None, "parameters twice"),
        ("\0", None, "no runs|cannot be read"),
    ],
)
def test_bad_tables_are_refused_in_a_sentence(tmp_path, text, columns, said):
    path = tmp_path / "runs.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        read_runs(path, columns)


def test_files_that_are_no_tables_are_refused(tmp_path):
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00\x81")
    for path in (tmp_path, tmp_path / "missing.csv", tmp_path / "bytes.csv"):
        with pytest.raises(UserError, match="cannot be read"):
            read_runs(path)


@pytest.mark.parametrize("text", ["loss", "Loss=loss", "loss=", "loss=a,loss=b", ""])
def test_bad_names_of_columns_are_refused(text):
    with pytest.raises(UserError, match="--columns"):
        parse_columns(text)


@pytest.mark.parametrize("count", [-1, 12, 100])
def test_more_runs_to_drop_than_there_are(tmp_path, count):
    with pytest.raises(UserError, match="--drop-largest-losses"):
        read_runs(tables.write(tmp_path / "runs.csv", made()), None, count)
