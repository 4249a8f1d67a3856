"""The answers of OOLONG-style questions, found again by reading the text the way a person would."""

import datetime
import re
from collections import Counter
from itertools import combinations

import pytest

from rlm_runtime import tasks
from rlm_runtime.tasks.label_bank import LABELS, TEMPLATES
from rlm_runtime.tasks.oolong import GROUPS, oolong_score, parse_date
from rlm_runtime.tasks.oolong_pairs import ACROSS, EITHER, OolongPairs, read_pairs

LINE = re.compile(
    r"^Date: (.+?) \|\| User: (\d{5}) \|\| Instance: (.+?)(?: \|\| Label: (.+))?$", re.M
)
PATTERNS = {
    label: [re.compile(re.sub(r"\\{\w+\\}", ".+?", re.escape(t))) for t in templates]
    for label, templates in TEMPLATES.items()
}


def day_of(text):
    return datetime.datetime.strptime(text, "%b %d, %Y").date()


def items_of(text):
    """(date, user, label) of every line, the label judged from the question alone."""
    out = []
    for date, user, question, label in LINE.findall(text):
        kinds = {
            kind
            for kind, patterns in PATTERNS.items()
            if any(p.fullmatch(question) for p in patterns)
        }
        assert len(kinds) == 1, (question, kinds)
        assert label in ("", *kinds)
        out.append((day_of(date), int(user), kinds.pop()))
    return out


def top(counts, rank=0):
    ordered = counts.most_common()
    assert rank + 1 >= len(ordered) or ordered[rank][1] > ordered[rank + 1][1]
    assert rank == 0 or ordered[rank][1] < ordered[rank - 1][1]
    return str(ordered[rank][0])


def compared(text, items):
    a, b = re.search(r"Is label '(.+?)' more common, .* as label '(.+?)'", text).groups()
    counts = Counter(label for _, _, label in items)
    return (
        "more common than"
        if counts[a] > counts[b]
        else "less common than"
        if counts[a] < counts[b]
        else "same frequency as"
    )


def solve(kind, text, items):
    """A second reading of each question, from its words."""
    label = re.search(r"label '(.+?)'", text)
    label = label and label[1]
    if kind == "most":
        return top(Counter(i[2] for i in items))
    if kind == "least":
        return Counter(i[2] for i in items).most_common()[-1][0]
    if kind == "compare":
        return compared(text, items)
    if kind == "count":
        return str(sum(i[2] == label for i in items))
    if kind in ("most_user", "second_user"):
        return top(Counter(i[1] for i in items), int(kind == "second_user"))
    if kind == "user_of_label":
        return top(Counter(i[1] for i in items if i[2] == label))
    if kind == "user_compare":
        user = int(re.search(r"user (\d{5})", text)[1])
        return compared(text, [i for i in items if i[1] == user])
    if kind == "user_subset":
        users = set(map(int, re.findall(r"\b\d{5}\b", text)))
        return str(sum(i[1] in users and i[2] == label for i in items))
    if kind == "day_most":
        return datetime.date.fromisoformat(top(Counter(i[0] for i in items))).strftime("%b %d, %Y")
    if kind == "days_with":
        n = int(re.search(r"exactly (\d+)", text)[1])
        return str(sum(c == n for c in Counter(i[0] for i in items).values()))
    if kind == "before_after":
        side, day = re.search(r"dated (before|after) (\w+ \d+, \d+)", text).groups()
        day = day_of(day)
        return str(
            sum(i[2] == label and (i[0] > day if side == "after" else i[0] < day) for i in items)
        )
    if kind == "month_subset":
        months = re.search(r"of any year: ([\w, ]+), which", text)[1].split(", ")
        return top(Counter(i[2] for i in items if i[0].strftime("%b") in months))
    if kind == "range_subset":
        begin, end = map(
            day_of, re.search(r"from (\w+ \d+, \d+) to (\w+ \d+, \d+),", text).groups()
        )
        return compared(text, [i for i in items if begin <= i[0] <= end])
    assert kind == "months_more"
    a, b = re.findall(r"label '(.+?)'", text)
    months = {}
    for day, _, name in items:
        months.setdefault(day.strftime("%Y-%m"), Counter())[name] += 1
    return str(sum(c[a] > c[b] for c in months.values()))


@pytest.mark.parametrize("length", [3000, 16_000])
def test_every_kind_of_question_has_the_right_answer(length, tmp_path):
    seen = set()
    for name in ("oolong", "oolong_labelled"):
        task = tasks.get(name)
        for seed in (1, 2):
            items = None
            for index in range(task.per_context):
                example = task.example(length, seed=seed, index=index, folder=tmp_path)
                if items is None:
                    items = items_of(example.context.read_text())
                    assert len(items) == example.meta["lines"]
                seen.add(example.meta["kind"])
                assert solve(example.meta["kind"], example.question, items) == example.answer, (
                    example
                )
    wanted = 14 if length > 10_000 else 9
    assert len(seen) >= wanted, seen


def test_windows_share_a_context_and_questions_differ(tmp_path):
    task = tasks.get("oolong")
    examples = list(task.examples(8000, 50, folder=tmp_path))
    assert (
        len({e.context for e in examples}) == 2 and len({e.question for e in examples[:25]}) == 25
    )
    assert {e.meta["group"] for e in examples} == set(GROUPS)
    only = tasks.get("oolong:group=user").example(8000, folder=tmp_path)
    assert only.meta["group"] == "user"


def test_the_number_of_lines_follows_the_rule(tmp_path):
    for length in (8192, 32_768, 131_072):
        example = tasks.get("oolong").example(length, folder=tmp_path)
        text = example.context.read_text()
        items = "".join(m[0] + "\n" for m in LINE.finditer(text))
        prompt = (len(text) - len(items)) / 4
        room = 0.95 * length - prompt - 250
        assert (
            abs(len(items) / 4 / room - 1) < 0.03
            and len(items.splitlines()) == example.meta["lines"]
        )


def test_users_are_skewed_and_dates_are_spread(tmp_path):
    items = items_of(tasks.get("oolong").example(100_000, folder=tmp_path).context.read_text())
    users = Counter(i[1] for i in items)
    busiest = sum(n for _, n in users.most_common(len(users) // 5))
    assert 0.72 < busiest / len(items) < 0.88
    months = {(i[0].year, i[0].month) for i in items}
    assert 40 <= len(months) <= 41
    assert set(Counter(i[2] for i in items)) == set(LABELS)


def test_labels_are_written_out_only_where_asked(tmp_path):
    assert "Label:" not in tasks.get("oolong").example(4000, folder=tmp_path).context.read_text()
    assert (
        "|| Label: "
        in tasks.get("oolong_labelled").example(4000, folder=tmp_path).context.read_text()
    )


@pytest.mark.parametrize(
    ("answer", "kind", "reply", "score"),
    [
        ("entity", "label", "Label: entity", 1.0),
        ("entity", "label", "I think so. **Label: [entity]** ", 1.0),
        ("entity", "label", "Label: human being", 0.0),
        ("entity", "label", "entity", 1.0),
        ("12", "number", "Answer: 12", 1.0),
        ("12", "number", "Answer: 13", 0.75),
        ("12", "number", "Answer: **9**", 0.75**3),
        ("12", "number", "Answer: a dozen", 0.0),
        ("1200", "number", "Answer: 1,199", 0.75),
        ("0", "number", "Answer: 40", 0.75**40),
        ("54321", "user", "User: 54321", 1.0),
        ("54321", "user", "User: 54322", 0.0),
        ("Jan 06, 2023", "date", "Date: January 6, 2023", 1.0),
        ("Jan 06, 2023", "date", "Date: 2023-01-06", 1.0),
        ("Jan 06, 2023", "date", "Date: Jan 07, 2023", 0.0),
        ("Jan 06, 2023", "date", "Date: soon", 0.0),
        ("more common than", "comparison", "Answer: entity is more common than location", 1.0),
        ("more common than", "comparison", "Answer: more common", 1.0),
        ("more common than", "comparison", "Answer: entity is less common than location", 0.0),
        ("less common than", "comparison", "Answer: less common than or more common than", 0.0),
        ("same frequency as", "comparison", "Answer: [same frequency as]", 1.0),
        ("entity", "label", "", 0.0),
    ],
)
def test_scores(answer, kind, reply, score):
    assert oolong_score(answer, kind, reply) == pytest.approx(score)


def test_dates_are_read_in_the_usual_forms():
    for text in (
        "Jan 06, 2023",
        "January 6th, 2023",
        "6 January 2023",
        "2023-01-06",
        "1/6/2023",
        "2023-01-06T00:00:00",
    ):
        assert parse_date(text) == datetime.date(2023, 1, 6), text
    for text in ("Feb 30, 2023", "Foo 01, 2023", "2023", "13/13/2023", ""):
        assert parse_date(text) is None


# -- pairs


def pairs_from(question, items):
    """The pairs by trying every two users, the condition read from the words of the question."""
    of = {}
    for item in items:
        of.setdefault(item[1], []).append(item)

    def has(user, parts):
        counts = Counter(i[2] for i in of[user])
        return all(
            counts[lab] == int(n) if how == "exactly" else counts[lab] >= int(n)
            for how, n, lab in parts
        )

    part = r"(exactly|at least) (\d+) questions? with label '(.+?)'"
    both = re.search(r"at least one question with label '(.+?)' or '(.+?)'", question)
    rule = re.search(
        r"all questions with label '(.+?)' of both users are dated (before|after) (\w+ \d+, \d+)",
        question,
    )
    out = set()
    for u, v in combinations(sorted(of), 2):
        if both:
            ok = all(any(i[2] in both.groups() for i in of[w]) for w in (u, v))
            if ok and rule:
                lab, side, day = rule[1], rule[2], day_of(rule[3])
                dated = [i[0] for w in (u, v) for i in of[w] if i[2] == lab]
                ok = all(d > day if side == "after" else d < day for d in dated)
        else:
            one, other = re.search(
                r"one user has (.+), and the other user has (.+?)\. Judge", question
            ).groups()
            one, other = re.findall(part, one), re.findall(part, other)
            assert one and other
            ok = (has(u, one) and has(v, other)) or (has(v, one) and has(u, other))
        if ok:
            out.add((u, v))
    return out


def test_all_twenty_queries(tmp_path):
    task = tasks.get("oolong_pairs")
    questions, some = set(), 0
    for length, seed in ((6000, 1), (20_000, 2)):
        for index in range(20):
            example = task.example(length, seed=seed, index=index, folder=tmp_path)
            if index == 0:
                items = items_of(example.context.read_text())
            want = pairs_from(example.question, items)
            assert {tuple(p) for p in example.answer} == want, example.question
            assert all(a < b for a, b in want)
            questions.add(example.question)
            some += bool(want)
    assert len(questions) == 20 and some > 30 and set(EITHER) | set(ACROSS) == set(range(1, 21))


def test_f1_over_pairs():
    task = OolongPairs()
    example = tasks.Example("x", None, "", [[10000, 20000], [10000, 30000]])
    assert task.score(example, "(10000, 20000)\n(10000, 30000)") == 1.0
    assert task.score(example, "(20000, 10000)\n10000,30000\n(10000, 20000)") == 1.0
    assert task.score(example, "(10000, 20000)") == pytest.approx(2 / 3)
    assert task.score(example, [[10000, 20000], ["10000", "99999"]]) == 0.5
    assert task.score(example, "") == 0.0
    assert task.score(tasks.Example("x", None, "", []), "none") == 1.0
    assert read_pairs("(123456, 22222) (11111, 11111)") == set()
