import pytest

from megahybrid.config import load_config, save_config
from megahybrid.errors import UserError

COMPLETE = """
run: {dir: here}
model: {pattern: G, hidden_size: 64, vocab_size: 100}
train: {seq_length: 32, micro_batch_size: 1, global_batch_size: 1, steps: 10}
data: {path: shards}
"""


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    write("base/complete.yaml", COMPLETE)
    return write


def test_the_recipe_holds_over_what_it_includes_and_later_files_over_earlier_ones(write):
    write("base/first.yaml", "train: {steps: 20, seed: 1}\nmodel: {hidden_size: 128}\n")
    write("base/second.yaml", "train: {seed: 2}\n")
    names = "[base/complete.yaml, base/first.yaml, base/second.yaml]"
    recipe = write("recipe.yaml", f"include: {names}\nmodel: {{hidden_size: 256}}\n")
    config = load_config(recipe, ["train.global_batch_size=4"])
    assert (config.train.steps, config.train.seed, config.model.hidden_size) == (20, 2, 256)
    assert (config.model.vocab_size, config.train.global_batch_size) == (100, 4)


def test_names_are_relative_to_the_file_that_includes(write, monkeypatch):
    write("base/deeper/leaf.yaml", "train: {steps: 30}\n")
    write("base/middle.yaml", "include: deeper/leaf.yaml\n")
    recipe = write("recipe.yaml", "include: [base/complete.yaml, base/middle.yaml]\n")
    monkeypatch.chdir("/")
    assert load_config(recipe).train.steps == 30


def test_a_file_that_two_others_share_does_not_undo_what_the_first_changed(write):
    write("base/first.yaml", "include: complete.yaml\ntrain: {steps: 40}\n")
    write("base/second.yaml", "include: complete.yaml\ntrain: {seed: 3}\n")
    recipe = write("recipe.yaml", "include: [base/first.yaml, base/second.yaml]\n")
    config = load_config(recipe)
    assert (config.train.steps, config.train.seed) == (40, 3)


def test_the_saved_config_is_complete_without_its_includes(write, tmp_path):
    recipe = write("recipe.yaml", "include: base/complete.yaml\ntrain: {steps: 50}\n")
    config = load_config(recipe)
    saved = tmp_path / "elsewhere" / "config.yaml"
    saved.parent.mkdir()
    save_config(config, saved)
    assert "include" not in [line.split(":")[0] for line in saved.read_text().splitlines()]
    assert load_config(saved) == config


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("include: base/absent.yaml", r"recipe\.yaml' includes 'base/absent\.yaml', but there is no file"),
        ("include: base", "there is no file"),
        ("include: recipe.yaml", "cannot include itself"),
        ("include: base/circle.yaml", r"cannot include itself: .*recipe\.yaml' → .*circle\.yaml' → .*recipe\.yaml'"),
        ("include: 3", "a file name or a list of file names"),
        ("include: {file: base/complete.yaml}", "a file name or a list of file names"),
        ("include: [base/complete.yaml, 3]", "a file name or a list of file names"),
        ("include:", "a file name or a list of file names"),
        ("include: base/broken.yaml", r"broken\.yaml' is not valid YAML"),
        ("include: base/list.yaml", r"list\.yaml' must hold sections"),
        ("include: base/unknown.yaml", r"did you mean train\.steps"),
        ("include: ${nothing}", "there is no file"),
        ("model: {include: base/complete.yaml}", r"Unknown configuration key 'model\.include'"),
    ],
)
def test_bad_includes_are_refused_in_one_sentence(write, text, reason):
    write("base/circle.yaml", "include: ../recipe.yaml\n")
    write("base/broken.yaml", "model: [\n")
    write("base/list.yaml", "- a\n")
    write("base/unknown.yaml", "include: complete.yaml\ntrain: {step: 3}\n")
    recipe = write("recipe.yaml", text + "\n")
    with pytest.raises(UserError, match=reason) as caught:
        load_config(recipe)
    assert "\n" not in str(caught.value)
