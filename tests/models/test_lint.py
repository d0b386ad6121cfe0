"""A planted leak is found and named; honest rows raise nothing that stops a training."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from features.catalog import NAMES
from features.facts import TIME
from features.window import DAY_MS
from models import lint, quality
from models.dataset import Rows, build
from models.labels import Label, Outcomes
from proto.errors import ArtifactRejected
from tests.models.shop import START, Shop, rhythms

LABEL = Label(30, 90)
CUTOFFS = [START + day * DAY_MS for day in range(120, 390, 30)]


@pytest.fixture(scope="module")
def shop() -> Shop:
    return rhythms(customers=200)


@pytest.fixture(scope="module")
def rows(shop: Shop) -> Rows:
    return build(shop.customers, shop.facts, LABEL, CUTOFFS)


def planted(rows: Rows, feature: str, values: np.ndarray) -> Rows:
    x = rows.x.copy()
    x[:, NAMES.index(feature)] = values
    return replace(rows, x=x)


def errors(findings: list[lint.Finding]) -> set[tuple[str, str]]:
    return {(finding.check, finding.feature) for finding in findings if finding.error}


def test_honest_rows_pass(rows: Rows) -> None:
    assert errors(lint.lint(rows)) == set()
    lint.check(lint.lint(rows))


def test_the_label_in_another_form_is_found(rows: Rows) -> None:
    noise = np.random.default_rng(0).normal(size=len(rows))
    leaky = planted(rows, "nps_last", rows.y * 4.0 + noise)
    assert errors(lint.lint(leaky)) == {("too_good", "nps_last")}
    with pytest.raises(ArtifactRejected, match=r"nps_last: AUC 0\.9"):
        lint.check(lint.lint(leaky))


def test_a_value_that_only_the_churned_have_is_reported(rows: Rows) -> None:
    some = (rows.y == 1) & (np.random.default_rng(0).random(len(rows)) < 0.5)
    found = lint.lint(planted(rows, "nps_last", np.where(some, 3.0, np.nan)))
    assert [(f.check, f.feature, f.error) for f in found] == [("only_churned", "nps_last", False)]


def test_an_id_is_found(rows: Rows) -> None:
    assert errors(lint.lint(planted(rows, "nps_last", 1000.0 + rows.customer))) == {("identity", "nps_last")}


def remade(shop: Shop, rows: Rows, at: int) -> Rows:
    known = shop.facts[:, TIME] <= at
    again = build([c for c, k in zip(shop.customers, known.tolist(), strict=True) if k], shop.facts[known], LABEL, [at], known_to_ms=at)
    place = {name: i for i, name in enumerate(rows.names)}
    return replace(again, customer=np.array([place[again.names[c]] for c in again.customer.tolist()]), names=rows.names)


def test_a_feature_that_reads_past_the_cut_is_named_and_the_kernel_reads_nothing(shop: Shop, rows: Rows) -> None:
    def rebuilt(at: int) -> Rows:
        return remade(shop, rows, at)

    assert lint.past_the_cut(rows, rebuilt) == []
    # The planted feature: whether a purchase follows within a week, for one customer in twenty.
    who = np.unique(np.array(shop.customers), return_inverse=True)[1]
    future = ~Outcomes(who, shop.facts, Label(7, 90)).churned(rows.customer, rows.at) & (rows.customer % 20 == 0)
    column = rows.x[:, NAMES.index("purchase_count_7d")]
    leaky = planted(rows, "purchase_count_7d", np.where(future, column + 1, column))
    found = lint.past_the_cut(leaky, rebuilt)
    assert {f.feature for f in found} == {"purchase_count_7d"}
    assert all(f.error and 0 < f.value < 0.1 for f in found)


def test_rows_that_exist_only_thanks_to_the_future_are_found(shop: Shop, rows: Rows) -> None:
    found = lint.past_the_cut(rows, lambda at: remade(shop, rows, at).where(np.arange(int((rows.at == at).sum())) > 0))
    assert errors(found) == {("past_the_cut", "-")}


def test_the_report_counts_what_is_missing_and_sees_a_change_of_unit(shop: Shop, rows: Rows) -> None:
    report = quality.of_rows(rows)
    assert [entry["at"] for entry in report["cutoffs"]] == CUTOFFS
    assert report["features"]["nps_last"]["missing"] == 1.0
    assert report["features"]["purchase_count_life"]["missing"] == 0.0
    assert not [w for w in report["warnings"] if "unit" in w]
    spend = rows.x[:, NAMES.index("spend_minor_mean_90d")]
    changed = planted(rows, "spend_minor_mean_90d", np.where(rows.at >= CUTOFFS[5], spend / 100, spend))
    assert [w for w in quality.of_rows(changed)["warnings"] if "unit" in w] == [
        "spend_minor_mean_90d: its median goes from 1000 to 10 between two cut-offs: a change of unit?"
    ]
    holes = shop.facts[(shop.facts[:, TIME] // DAY_MS) % 10 != 0]
    counted = quality.of_facts(holes, rejected=3)
    transactions: Any = counted["transactions"]
    assert transactions["days_without"] > 30
    assert quality.summed([counted, counted])["facts"] == 2 * len(holes)
