"""What a result may depend on, and what of it has changed."""

from minunet.base.environment import differences


def test_differences_name_what_changed_and_stay_short():
    saved = {"numpy": "2.0.0", "python": "3.11", "gone": 1, "threads": {"OMP_NUM_THREADS": "2"}}
    now = {"numpy": "2.1.0", "python": "3.11", "threads": {}, "new": (1, 2)}
    assert differences(saved, now) == [
        "numpy was '2.0.0', is '2.1.0'",
        "threads was {'OMP_NUM_THREADS': '2'}, is {}",
        "new was None, is [1, 2]",
        "gone was 1, is None",
    ]
    assert differences(None, {"a": 1}) == ["a was None, is 1"]
    assert all(len(line) < 200 for line in differences({"a": "x" * 10**6, "y" * 10**6: 1}, {"a": "z"}))
