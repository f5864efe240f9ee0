"""Null in place of a source removes what came before under its name."""

import pytest

from megahybrid.config import load_config, save_config
from megahybrid.errors import UserError
from megahybrid.key import keys
from megahybrid.study.file import load_study
from megahybrid.study.models import make_models
from megahybrid.training.resume import meaning
from tests.config.test_include import COMPLETE

WEB = "data: {sources: {web: {path: web, format: parquet, weight: 2}, code: {path: code, weight: 1}}}\n"
OWN = "{path: own, weight: 1}"


@pytest.fixture
def recipe(tmp_path):
    """Of the entries of data.sources in a recipe that includes two others."""
    (tmp_path / "complete.yaml").write_text(COMPLETE)
    (tmp_path / "web.yaml").write_text(WEB)
    (tmp_path / "without.yaml").write_text("data: {sources: {web: null}}\n")

    def recipe(sources, includes="[complete.yaml, web.yaml]"):
        path = tmp_path / "recipe.yaml"
        path.write_text(f"include: {includes}\ndata: {{sources: {sources}}}\n")
        return path

    return recipe


def test_it_is_as_if_it_had_never_been_there(recipe, tmp_path):
    found = load_config(recipe(f"{{web: null, own: {OWN}}}"))
    (tmp_path / "plain.yaml").write_text(
        f"{COMPLETE[:-2]}, sources: {{code: {{path: code, weight: 1}}, own: {OWN}}}}}\n"
    )
    plain = load_config(tmp_path / "plain.yaml")
    assert list(found.data.sources) == ["code", "own"]
    assert found == plain and meaning(found) == meaning(plain) and list(keys(found)) == list(keys(plain))
    save_config(found, tmp_path / "config.yaml")
    assert "web" not in (tmp_path / "config.yaml").read_text()
    assert load_config(tmp_path / "config.yaml") == found


def test_changes_remove_what_files_have(recipe):
    path = recipe(f"{{own: {OWN}}}")
    assert list(load_config(path, ["data.sources.web=null"]).data.sources) == ["code", "own"]
    assert list(load_config(path, ["data.sources={own: null, code: null}"]).data.sources) == ["web"]
    assert load_config(path, [f"data.sources.{name}=null" for name in ("web", "code", "own")]).data.sources == {}


def test_a_name_that_comes_again_inherits_nothing(recipe):
    """In a later file, or a later change; and its place among the sources is a new one."""
    includes = "[complete.yaml, web.yaml, without.yaml]"
    by_file = load_config(recipe("{web: {path: own, weight: 3}}", includes))
    changes = ["data.sources.web=null", "data.sources.web.path=own", "data.sources.web.weight=3"]
    by_change = load_config(recipe("{}"), changes)
    for config in (by_file, by_change):
        web = config.data.sources["web"]
        assert (web.path, web.format, web.weight) == ("own", "text", 3)
        assert list(config.data.sources) == ["code", "web"]
    later = [*changes, "data.sources.web=null"]
    assert list(load_config(recipe("{}"), later).data.sources) == ["code"]


def test_one_that_takes_another_after_its_example_can_go(recipe):
    path = recipe("{like: '${data.sources.web}'}")
    assert load_config(path).data.sources["like"].path == "web"
    assert list(load_config(path, ["data.sources.like=null"]).data.sources) == ["web", "code"]
    with pytest.raises(UserError, match=r"'data\.sources\.web' not found"):
        load_config(path, ["data.sources.web=null"])


def test_one_that_is_still_to_be_given_can_go(recipe):
    path = recipe("{later: '???'}")
    assert list(load_config(path, ["data.sources.later=null"]).data.sources) == ["web", "code"]


def test_sources_that_are_named_elsewhere_as_a_whole_are_left_alone(recipe):
    path = recipe("'${oc.create:{own: {path: own}}}'")
    with pytest.raises(UserError, match=r"data\.sources had only web, code there"):
        load_config(path, ["data.sources.own=null"])


@pytest.mark.parametrize(
    ("sources", "changes", "reason"),
    [
        ("{wbe: null}", [], "data.sources.wbe is null, which removes what came before under that name, but"),
        ("{wbe: null}", [], "data.sources had only web, code there; correct the name, or leave it out."),
        ("{web: null}", ["data.sources.web=null"], "data.sources had only code there"),
        (f"{{web: null, code: null, own: {OWN}}}", ["data.sources.web=null"], "data.sources had only own there"),
        ("{web: null, code: null}", ["data.sources.web=null"], "data.sources had nothing there"),
        (
            "{own: {path: own}}",
            [],
            "not for own; give every source one, or none, or remove one with null in its place.",
        ),
        ("null", [], "data.sources holds named entries"),
    ],
)
def test_what_cannot_be_removed_is_refused_in_one_sentence(recipe, sources, changes, reason):
    with pytest.raises(UserError) as caught:
        load_config(recipe(sources), changes)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_null_in_a_file_that_comes_first_removes_nothing(recipe):
    with pytest.raises(UserError, match=r"data\.sources had nothing there"):
        load_config(recipe("{}", "[complete.yaml, without.yaml, web.yaml]"))


def test_a_study_removes_a_source_of_its_base(recipe, tmp_path):
    study = tmp_path / "study.yaml"
    study.write_text(
        f"study: own\nbase: {recipe(f'{{own: {OWN}}}')}\nkinds: {{gdn: '(G)*{{layers}}'}}\n"
        "sizes: [{width: 64, layers: 2}]\nbudgets: {tokens: [1000]}\n"
        "overrides: {data.sources.web: null, model.gdn.head_dim: 16, model.gdn.num_heads: 4}\n"
    )
    loaded = load_study(study)
    assert list(make_models(loaded, loaded.sizes[0])["gdn"].config.data.sources) == ["code", "own"]
    study.write_text(study.read_text().replace("kinds: {", "kinds: {lte: null, "))
    with pytest.raises(UserError, match=r"kinds\.lte is null, .* but kinds had nothing there"):
        load_study(study)
