"""tasks: the same examples from file and hub, splits that share nothing, refusals, discovery."""

import gzip
import json
import os
import sys

import pytest

from bench.data_sets import UnknownData
from bench.errors import UsageError
from compress.registry import discover
from finetune.tasks import SPLITS, TASKS, Example, Task, checksum, get
from finetune.tasks.base import register
from finetune.tasks.e2e import linearise
from finetune.tasks.qa import typical
from finetune.tasks.task_data import comma_separated, held_out, json_lines, read_text, tab_separated
from finetune.tasks.wikitext import split_articles

NAMES = sorted(TASKS)
USER_DATA = os.environ.get("SLIMBENCH_DATA")  # before the fixtures of the session hide it


def article(number):
    body = f" Body {number} has one sentence . \n"
    return f" = Place {number} = \n \n{body} \n = = Part = = \n \n{body} \n"


def question(number):
    choices = [
        {"label": label, "text": f"{word} {number}"}
        for label, word in zip("ABCDE", ("lamp", "boat", "hill", "cup", "tree"), strict=True)
    ]
    return {
        "id": f"q{number}",
        "answerKey": "ABCDE"[number % 5],
        "question": {"stem": f"Which one is number {number}?", "choices": choices},
    }


def science(number):
    answers = [f"answer {number}", f"another answer {number}"]
    return {"question_id": f"s{number}", "question": f"Why {number}?", "answers": answers}


def pair(number):
    first = f'He said "pie number {number}" does not fit.'
    return [str(number % 2), f"1{number}", f"2{number}", first, f"Pie {number} is out."]


def glue(number):
    """As GLUE spaces the same pair."""
    first = f'He said " pie number {number} " does not fit .'
    second = f"Pie {number} is out ."
    return {"sentence1": first, "sentence2": second, "label": number % 2, "idx": number}


def meaning(number):
    return f"name[Blue Pan {number}], eatType[pub], priceRange[less than £20], near[The Sign]"


def write(folder, name, lines):
    (folder / name).parent.mkdir(exist_ok=True)
    data = "".join(lines).encode()
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A data folder with invented rows in the formats of the real files."""

    def as_json(rows):
        return [json.dumps(row) + "\n" for row in rows]

    def as_tabs(rows):
        header = ["\ufeffQuality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
        return ["\t".join(row) + "\r\n" for row in [header, *rows]]

    def as_commas(numbers):
        rows = [
            f'"{meaning(n)}","Blue Pan {n}, a {kind} pub."\n'
            for n in numbers
            for kind in ("nice", "cheap")
        ]
        return ['"mr","ref"\n', *rows]

    write(tmp_path, "wikitext-2-raw/wiki.valid.raw", [" \n", *map(article, range(20))])
    write(tmp_path, "wikitext-2-raw/wiki.test.raw", [" \n", *map(article, range(20, 23))])
    folder = "commonsense_qa"
    write(tmp_path, f"{folder}/train_rand_split.jsonl.gz", as_json(map(question, range(40))))
    write(tmp_path, f"{folder}/dev_rand_split.jsonl", as_json(map(question, range(40, 44))))
    write(tmp_path, "arc-da/train.jsonl", as_json(map(science, range(30))))
    write(tmp_path, "arc-da/test.jsonl", as_json(map(science, range(30, 33))))
    write(tmp_path, "mrpc/msr_paraphrase_train.txt", as_tabs(map(pair, range(30))))
    write(tmp_path, "mrpc/msr_paraphrase_test.txt", as_tabs(map(pair, range(30, 34))))
    write(tmp_path, "mrpc/glue_mrpc_validation.jsonl", as_json(map(glue, (3, 8, 21))))
    write(tmp_path, "e2e-nlg/devset.csv", as_commas(range(20)))
    write(tmp_path, "e2e-nlg/testset_w_refs.csv", as_commas(range(20, 23)))
    monkeypatch.setenv("SLIMBENCH_DATA", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_what_every_task_keeps(name, data):
    task = get(name)
    groups = {}
    for split in SPLITS:
        examples = task.examples(split)
        assert examples == task.examples(split), "two readings differ"
        groups[split] = {example.group for example in examples}
        for example in examples:
            assert example.target.strip() and example.group
            if task.kind == "choice":
                assert example.target in example.candidates
                assert len(set(example.candidates)) == len(example.candidates)
            if task.kind == "generation":
                assert example.target[1:] in example.references
            if task.kind != "language_model":
                assert example.prompt == example.prompt.strip(), "the target brings the space"
                assert example.target[0] == " "
    assert len(checksum(task.examples("train"))) == 64
    assert checksum(task.examples("train")) != checksum(task.examples("validation"))
    assert not groups["train"] & groups["validation"]
    assert not groups["train"] & groups["test"] and not groups["validation"] & groups["test"]
    assert task.padding_token is None or task.padding_token in task.special_tokens
    with pytest.raises(UsageError, match="no split 'dev'"):
        task.examples("dev")


def sizes(name):
    return [len(get(name).examples(split)) for split in SPLITS]


def test_sizes_of_the_splits(data):
    assert sizes("choice") == [36, 4, 4]
    assert sizes("qa") == [27, 3, 3]
    assert sizes("mrpc") == [27, 3, 4]
    assert sizes("e2e") == [36, 2, 3]  # 18 meanings with 2 references each; 2 meanings; 3
    assert sizes("wikitext") == [1, 1, 1]


def test_choice_by_hand(data):
    assert get("choice").examples("test")[0] == Example(
        "Which one is number 40?\n<choice>: lamp 40\n<choice>: boat 40\n<choice>: hill 40\n"
        "<choice>: cup 40\n<choice>: tree 40\n<bot>:",
        " lamp 40",
        (" lamp 40", " boat 40", " hill 40", " cup 40", " tree 40"),
        group="q40",
    )


def test_choice_from_the_hub_is_the_same(data, hub, monkeypatch):
    monkeypatch.setenv("SLIMBENCH_DATA", str(data))
    local = get("choice").examples("validation")
    monkeypatch.delenv("SLIMBENCH_DATA")
    for number in range(40):
        row = question(number)
        choices = row["question"]["choices"]
        columns = {key: [choice[key] for choice in choices] for key in ("label", "text")}
        row |= {"question": row["question"]["stem"], "choices": columns}
        hub.rows.setdefault("train", []).append(row)
    assert get("choice").examples("validation") == local
    assert hub.calls == [{"path": "tau/commonsense_qa", "split": "train"}]


def test_qa_by_hand(data):
    assert get("qa").examples("test")[0] == Example(
        "Question: Why 30?\nAnswer:",
        " answer 30",
        references=("answer 30", "another answer 30"),
        group="s30",
    )


def test_qa_learns_the_answer_that_agrees_most_with_the_others():
    answers = ("habitat", "amount of food", "the food", "predators", "food")
    # Summed F1 with the others: 0, 1/2 + 1/2, 1/2 + 1, 0, 1/2 + 1; the first of equals counts.
    assert typical(answers) == "the food"
    assert typical(("red", "blue")) == "red" and typical(("one",)) == "one"


def test_mrpc_keeps_quotes_and_takes_glues_pairs_out_of_train(data):
    first = get("mrpc").examples("train")[1]
    assert first == Example(
        '1: He said "pie number 1" does not fit.\n2: Pie 1 is out.\nDo both mean the same?',
        " yes",
        (" yes", " no"),
        group="11-21",
    )
    validation = get("mrpc").examples("validation")
    assert [example.group for example in validation] == ["13-23", "18-28", "121-221"]
    assert '"pie number 3"' in validation[0].prompt, "the published text, not GLUE's"


def test_mrpc_refuses_files_that_do_not_belong_together(data):
    (data / "mrpc/glue_mrpc_validation.jsonl").write_text(json.dumps(glue(99)) + "\n")
    with pytest.raises(ValueError, match=r"1 of the 1 pairs of .* are not in .*train.txt"):
        get("mrpc").examples("train")


def test_mrpc_from_the_hub(hub):
    hub.rows = {"validation": [glue(3)]}
    [example] = get("mrpc").examples("validation")
    assert (example.target, example.group) == (" yes", "glue-3")
    assert hub.calls == [{"path": "nyu-mll/glue", "name": "mrpc", "split": "validation"}]


def test_e2e_by_hand(data):
    prompt = "name : Blue Pan 20 | Type : pub | price : less than £20 | near : The Sign ||"
    example = get("e2e").examples("test")[0]
    assert (example.prompt, example.target) == (prompt, " Blue Pan 20, a nice pub.")
    assert example.references == ("Blue Pan 20, a nice pub.", "Blue Pan 20, a cheap pub.")
    assert len(example.group) == 12 and "Pan" not in example.group
    train = get("e2e").examples("train")
    assert train[0].prompt == train[1].prompt and train[0].target != train[1].target


def test_e2e_uses_the_published_split_where_it_can(data, hub, monkeypatch):
    monkeypatch.setenv("SLIMBENCH_DATA", str(data))
    (data / "e2e-nlg/trainset.csv").write_text(f'mr,ref\n"{meaning(50)}",A pub.\n')
    assert sizes("e2e") == [1, 20, 3]  # 40 rows of devset.csv, 20 meanings
    monkeypatch.delenv("SLIMBENCH_DATA")
    row = {"meaning_representation": meaning(1), "human_reference": "Costs Â£20, a cafÃ©."}
    hub.rows = {"train": [row]}
    assert get("e2e").examples("train")[0].target == " Costs £20, a café."


def test_linearise_by_hand():
    text = "name[A, B], customer rating[5 out of 5], familyFriendly[no]"
    assert linearise(text) == "name : A, B | customer rating : 5 out of 5 | family friendly : no"
    for wrong in ("", "a pub", "name[A] and food[B]"):
        with pytest.raises(ValueError, match="not of the form"):
            linearise(wrong)


def test_wikitext_is_cut_between_articles(data):
    train, validation = (get("wikitext").examples(split)[0].target for split in SPLITS[:2])
    assert train + validation == (data / "wikitext-2-raw/wiki.valid.raw").read_text()
    assert validation == article(18) + article(19)
    (data / "wikitext-2-raw/wiki.train.raw").write_text(article(70))
    assert get("wikitext").examples("train")[0].target == article(70)
    assert get("wikitext").examples("validation")[0].target == train + validation


def test_wikitext_from_the_hub(hub):
    hub.rows = {"train": [{"text": ""}, {"text": " = A = \n"}, {"text": ""}]}
    assert get("wikitext").examples("train")[0].target == " \n = A = \n \n"
    assert hub.calls[0]["name"] == "wikitext-2-raw-v1"


def test_articles_by_hand():
    first = " \n = A = \n \n x \n \n = = B = = \n \n = = = C = = = \n \n"
    first += " so k \n = 1 and c = \n 2 \n \n"
    assert split_articles(first + " = 2 D = \n \n y \n") == [first, " = 2 D = \n \n y \n"]
    assert split_articles("no title") == ["no title"]


def test_held_out_does_not_depend_on_order_and_keeps_equal_keys_together():
    keys = [f"key {n}" for n in range(50)]
    assert held_out(keys) == held_out(reversed(keys * 3))
    assert len(held_out(keys)) == 5 and held_out(keys) < set(keys)
    assert held_out(["one", "two"]) == {"one"}  # SHA-256 begins with 7692 and with 3fc4


@pytest.mark.parametrize("name", NAMES)
def test_data_that_is_nowhere_says_what_would_help(name, hub, tmp_path, monkeypatch):
    hub.rows = {}  # load_dataset raises KeyError
    with pytest.raises(UnknownData) as caught:
        get(name).examples("test")
    assert "SLIMBENCH_DATA is not set" in str(caught.value)
    assert ("the hub gave KeyError" in str(caught.value)) == (name != "qa")
    monkeypatch.setenv("SLIMBENCH_DATA", str(tmp_path))
    monkeypatch.setitem(sys.modules, "datasets", None)  # import fails
    with pytest.raises(UnknownData) as caught:
        get(name).examples("test")
    assert f"in SLIMBENCH_DATA={tmp_path}" in str(caught.value)
    cure = "put arc-da/test.jsonl there" if name == "qa" else "pip install 'slimbench[hub]'"
    assert cure in str(caught.value)


def test_a_row_that_does_not_fit_is_named(data):
    file = data / "arc-da/test.jsonl"
    file.write_text(json.dumps(science(1)) + "\n" + json.dumps({"question": "x"}) + "\n")
    with pytest.raises(ValueError, match=r"test.jsonl: row 2 is not of this task \(KeyError"):
        get("qa").examples("test")
    file.write_text("\n")
    with pytest.raises(ValueError, match="split 'test' is empty"):
        get("qa").examples("test")


def test_files_that_are_damaged_are_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": 1}\n\n[2]\n')
    with pytest.raises(ValueError, match=r"rows.jsonl line 3: not a JSON object"):
        json_lines(file)
    file.write_text("{\n")
    with pytest.raises(ValueError, match=r"rows.jsonl line 1: not JSON"):
        json_lines(file)
    file.write_text('mr,ref\n"a, b",c\nd\n')
    with pytest.raises(ValueError, match="row 2 has 1 fields, not 2"):
        comma_separated(file)
    file.write_text('mr,ref\n"a, ""b""",c\n')
    assert comma_separated(file) == [{"mr": 'a, "b"', "ref": "c"}]
    file.write_text('x\ty\n"a\tb"\n')
    assert tab_separated(file) == [{"x": '"a', "y": 'b"'}]
    file.write_text("")
    with pytest.raises(ValueError, match="not a table with a header"):
        tab_separated(file)
    file.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="byte 3 is not UTF-8"):
        read_text(file)
    packed = tmp_path / "rows.gz"
    packed.write_bytes(gzip.compress(b"x" * 1000)[:-20])
    with pytest.raises(ValueError, match="damaged gzip file"):
        read_text(packed)


def test_an_unknown_task_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match="no task 'mprc'; did you mean mrpc"):
        get("mprc")


def test_a_file_in_the_folder_is_a_task(tmp_path, monkeypatch):
    (tmp_path / "planted_tasks").mkdir()
    (tmp_path / "planted_tasks/__init__.py").touch()
    (tmp_path / "planted_tasks/colours.py").write_text(
        "from finetune.tasks.base import Example, Task, register\n"
        "class Colours(Task):\n"
        "    name, kind, metric = 'colours', 'choice', 'accuracy'\n"
        "    def read(self, split):\n"
        "        return [Example('sky:', ' blue', (' blue', ' red'), group=split)]\n"
        "register(Colours())\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        discover("planted_tasks")
        assert isinstance(get("colours"), Task)
        assert get("colours").examples("test")[0].target == " blue"
        with pytest.raises(ValueError, match="registered twice"):
            register(get("colours"))
    finally:
        TASKS.pop("colours", None)
        for name in [name for name in sys.modules if name.startswith("planted_tasks")]:
            del sys.modules[name]


@pytest.fixture
def real_data(monkeypatch):
    """The user's own data folder, if there is one."""
    if not USER_DATA:
        pytest.skip("SLIMBENCH_DATA is not set")
    monkeypatch.setenv("SLIMBENCH_DATA", USER_DATA)


def test_sizes_of_the_real_data(real_data):
    assert sizes("choice") == [8767, 974, 1221]
    assert sizes("mrpc") == [3668, 408, 1725]
    assert sizes("qa") == [1125, 125, 1397]
    assert sizes("e2e")[1:] == [55, 630]
