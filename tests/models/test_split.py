"""Cut-offs and folds leave a gap as long as the label."""

import numpy as np
import pytest

from features.window import DAY_MS
from models.labels import Label
from models.split import Split
from proto.errors import BadInput


def ms(day: str) -> int:
    return int(np.datetime64(day, "ms").astype(np.int64))


def day(instant: int) -> str:
    return str(np.datetime64(instant, "ms").astype("datetime64[D]"))


SHOP = Split(ms("2010-12-01"), ms("2010-03-01"), ms("2011-06-30T20:08"), Label(90, 180))


def test_the_cutoffs_are_those_of_the_reference() -> None:
    train, test = [day(t) for t in SHOP.train_cutoffs()], [day(t) for t in SHOP.test_cutoffs()]
    assert (train[0], train[-1], len(train)) == ("2010-03-06", "2010-09-02", 13)
    assert (test[0], test[-1], len(test)) == ("2010-12-01", "2011-03-31", 9)


def test_no_training_label_reaches_into_the_test() -> None:
    assert max(SHOP.train_cutoffs()) + SHOP.label.horizon_ms <= min(SHOP.test_cutoffs())


def test_no_early_label_reaches_into_the_late_part() -> None:
    at = np.arange(SHOP.first, SHOP.train_last + 1, DAY_MS)
    early, late = SHOP.folds(at, 30 * DAY_MS)
    assert at[early].max() + SHOP.label.horizon_ms <= at[late].min()
    assert not np.any(early & late)
    assert at[late].max() <= SHOP.train_last


def test_without_a_complete_label_after_the_split_there_is_no_test() -> None:
    assert Split(SHOP.at, SHOP.first, SHOP.at + 89 * DAY_MS, SHOP.label).test_cutoffs() == []


def test_too_little_history_is_said() -> None:
    with pytest.raises(BadInput, match="needs more"):
        Split(SHOP.at, SHOP.at - 80 * DAY_MS, SHOP.end, SHOP.label)
